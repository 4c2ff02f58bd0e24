"""Sweeps: every mesh, ranked; and the picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from maxlike.plan import Training, plot, sweep, sweep_table
from maxlike.plan.sweep import per_chip
from tests.plan.known import CONFIGS


def test_every_mesh_is_ranked() -> None:
    plans = sweep(CONFIGS["llama-3.1-8b"], ["v5e", "h100:4"])
    seen = {(one.topology, one.replicas) for one in plans}
    # Tensor-parallel sizes that divide 32 heads, and 8 KV heads or are a multiple of them.
    assert seen == {(f"v5e:{shape}", chips // tp) for shape, chips in (
        ("1x1", 1), ("2x2", 4), ("2x4", 8), ("4x4", 16), ("4x8", 32), ("8x8", 64))
        for tp in (1, 2, 4, 8, 16, 32) if tp <= chips} | {("h100:4", n) for n in (1, 2, 4)}
    fitting = [one for one in plans if one.fits]
    assert plans[:len(fitting)] == fitting and 0 < len(fitting) < len(plans)
    yields = [per_chip(one) for one in fitting]
    assert yields == sorted(yields, reverse=True) and yields[-1] > 0
    # 16 GB of weights do not fit one v5e, whatever the slice.
    assert {one.fits for one in plans if one.topology.startswith("v5e") and one.mesh == {"model": 1}} == {False}
    table = sweep_table(plans)
    assert len(table.splitlines()) == 27 and f"and {len(plans) - 24} more" in table
    assert table.splitlines()[2].split()[0] == plans[0].topology


def test_a_picture(tmp_path: Path) -> None:
    for options, name in ((None, "serve.png"), (Training(), "train.svg")):
        plot(sweep(CONFIGS["llama-3.1-8b"], ["v6e:2x2", "v6e:2x4", "h200:8"], options), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000
    drawn = (tmp_path / "train.svg").read_text()
    for words in ("chips", "tokens a second and chip, at most", "GB on each device", "temporaries"):
        assert f"<!-- {words} -->" in drawn
    with pytest.raises(ValueError, match=r"ends in \.png"):
        plot(sweep(CONFIGS["llama-3.1-8b"], ["h200:8"]), tmp_path / "sweep.gif")
    with pytest.raises(ValueError, match="No mesh of"):
        sweep(CONFIGS["llama-3.1-8b"], ["h200:8"], tp=3)
