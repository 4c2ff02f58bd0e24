"""Sweeps: every mesh, ranked; and the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from maxlike.engine.config import EngineConfig
from maxlike.plan import Serving, Training, plot, sweep, sweep_table
from maxlike.plan.arithmetic import tensor_parallel
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


def test_what_cannot_be_swept_is_said() -> None:
    for topologies, options, says in (
        (["h200:8"], Serving(tp=16), "No mesh of h200:8 suits"),
        (["h200:8"], Serving(tp=3), "Legal sizes"),
        (["h200:8", "cpu:1"], None, "got 'cpu:1'. This machine is planned for by --topology cpu:N"),
        (["h200:8"], Serving(engine=EngineConfig(max_model_len=10**6)), "max_model_len=1000000 was asked for"),
        (["h200:8"], Training(tp=3), "Legal sizes"),
        (["h200:8"], Training(tp=2, fsdp=8), "No mesh of h200:8 suits"),
        (["h200:8"], Training(data=8, tokens_per_batch=1001), "cut a batch into 8 parts are left out"),
    ):
        with pytest.raises(ValueError, match=says):
            sweep(CONFIGS["llama-3.1-8b"], topologies, options)


def test_meshes_to_train_on() -> None:
    def meshes(**given: int) -> set[tuple[int, int, int]]:
        plans = sweep(CONFIGS["llama-3.1-8b"], ["h200:8"], Training(), **given)
        return {(one.mesh.get("data", 1), one.mesh.get("fsdp", 1), tensor_parallel(one.mesh)) for one in plans}

    assert meshes() == {(1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8)}
    assert meshes(tp=2) == {(1, 4, 2)} and meshes(tp=1) == {(1, 8, 1)}
    assert meshes(fsdp=2) == {(1, 2, 4)} and meshes(data=2) == {(2, 4, 1), (2, 2, 2), (2, 1, 4)}
    assert meshes(data=2, fsdp=2) == {(2, 2, 2)}


def test_a_compiler_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maxlike.plan.compiling.importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="is not installed"):
        sweep(CONFIGS["llama-3.1-8b"], ["h200:8", "v5e:1x1"], compile=True)


def test_meshes_that_do_not_divide_a_batch_are_told_of() -> None:
    plans = sweep(CONFIGS["llama-3.1-8b"], ["h200:4", "h200:8"], Training(tokens_per_batch=1002))
    assert {one.mesh.get("fsdp", 1) for one in plans} == {1, 2}
    told = "meshes that cut a batch into 4, 8 parts are left out: tokens_per_batch, 1,002, is no multiple of these"
    assert all(told in one.notes for one in plans) and sweep_table(plans).endswith(f"note: {told}")


def test_a_chip_by_its_other_name() -> None:
    plans = sweep(CONFIGS["llama-3.1-8b"], ["v7x"], tp=2)
    assert plans and plans == sweep(CONFIGS["llama-3.1-8b"], ["tpu7x"], tp=2)


def test_how_it_was_found_is_told() -> None:
    by_arithmetic = sweep(CONFIGS["llama-3.1-8b"], ["h200:8"])
    compiled = [replace(one, method="compiled") for one in by_arithmetic]
    assert "by arithmetic alone, at most" in sweep_table(by_arithmetic)
    assert "as the compiler has it, at most" in sweep_table(compiled)
    assert "TPUs as the compiler has them, GPUs by arithmetic" in sweep_table([*by_arithmetic, *compiled])
