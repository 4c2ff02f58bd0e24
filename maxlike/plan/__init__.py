"""Plans: what a model takes on devices that are not there, by the compiler's own reckoning."""

from maxlike.plan.options import Serving, Training
from maxlike.plan.planner import plan
from maxlike.plan.plot import plot
from maxlike.plan.result import Plan
from maxlike.plan.sweep import sweep, sweep_table

__all__ = ["Plan", "Serving", "Training", "plan", "plot", "sweep", "sweep_table"]
