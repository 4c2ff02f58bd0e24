"""How the benchmarks' engines are timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

WARM_UP_STEPS = 2  # of each round of decoding; not timed
Timing = tuple[float, float]
"""Seconds by the clock, and seconds of processor time over all threads."""


def timed(run: Callable[[], Any]) -> Timing:
    """How long `run()` takes."""
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu
