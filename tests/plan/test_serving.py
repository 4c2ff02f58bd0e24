"""Plans for serving against arithmetic by hand, against the compiler's refusals, and against an engine that runs."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from maxlike.cli import EMBEDDED_MODEL
from maxlike.engine.config import EngineConfig
from maxlike.engine.loading import load_engine
from maxlike.engine.runner import temporaries_of
from maxlike.plan import Plan, plan, sweep
from maxlike.plan.compiling import DoesNotFitError
from tests.plan.known import CONFIGS, PLANS, PUBLISHED, by_hand
from tests.tpu_compile import requires_libtpu

SMALL: dict[str, Any] = dict(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=512)


def tp_of(found: Plan) -> int:
    tp = 1
    for axis in ("model", "kv", "rep"):
        tp *= found.mesh.get(axis, 1)
    return tp


def check_by_hand(name: str, found: Plan) -> None:
    """Bytes to 1 %, and the other figures from those that the plan names."""
    hand, memory, cache, chip = by_hand(name, tp_of(found)), found.memory, found.cache, found.chip
    assert cache is not None and chip is not None
    assert found.parameters == pytest.approx(PUBLISHED[name], rel=0.01)
    assert memory.weights == pytest.approx(hand.weights, rel=0.01)
    assert cache.bytes_per_token == pytest.approx(hand.cache_of_a_token, rel=0.01)
    assert memory.weights + memory.cache == pytest.approx(hand.weights + cache.tokens * hand.cache_of_a_token, rel=0.01)
    # Nine tenths of the memory are used, but for less than a page.
    left = 0.9 * memory.limit - memory.weights - memory.cache - memory.state - memory.temporaries
    assert -0.005 * memory.limit < left < cache.page_size * cache.bytes_per_token
    layers = json.loads(CONFIGS[name].read_text())
    layers = layers.get("text_config", layers)["num_hidden_layers"]
    for step in found.steps:
        reduced = next(c for c in step.collectives if c.kind == "all-reduce")
        assert reduced.count == 2 * layers + 1
        assert step.memory_s == step.bytes / chip.bandwidth and step.compute_s == step.flops / chip.peak
        assert step.binds and step.floor_s == getattr(step, f"{step.binds}_s") == max(
            step.memory_s, step.compute_s, step.links_s or 0.0)
    assert found.step("decode").bytes > memory.weights / 2
    assert found.step("prefill").flops > 2 * step.tokens * 0.9 * hand.weights / 2


@pytest.mark.parametrize(("name", "topology"), [*PLANS, ("llama-3.1-8b", "h200:2"), ("llama-3.1-70b", "tpu7x:2x4x4")])
def test_arithmetic_is_that_by_hand(name: str, topology: str) -> None:
    from maxlike.plan.arithmetic import KnownShapes
    from maxlike.plan.chips import parse_topology
    from maxlike.plan.options import Serving
    from maxlike.plan.planner import described, reckoned

    _, config = described(CONFIGS[name])
    found = reckoned(name, config, parse_topology(topology), Serving(), KnownShapes(config))
    assert found.method == "arithmetic" and found.fits
    check_by_hand(name, found)


@requires_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("name", "topology"), [PLANS[0], pytest.param(*PLANS[-1], marks=pytest.mark.exhaustive)])
def test_known_models_fit(name: str, topology: str) -> None:
    """The others: `python scripts/plan_known_models.py`."""
    found = plan(CONFIGS[name], topology)
    assert found.method == "compiled" and found.fits and not found.suggestions
    check_by_hand(name, found)
    assert found.memory.temporaries < 0.1 * found.memory.limit
    table = found.table()
    assert "It fits." in table and "all-reduce" in table and found.chip and found.chip.source in table


@requires_libtpu
def test_a_small_model_on_a_slice_that_is_not_here() -> None:
    """Compiled: in two replicas, heads shared by twos, with a narrow cache."""
    found = plan(EMBEDDED_MODEL, "v5e:2x4", data=2, cache_dtype="int8", **SMALL)
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    assert (found.method, found.replicas, found.devices, tp_of(found)) == ("compiled", 2, 8, 4)
    assert found.mesh == {"kv": heads, "rep": 4 // heads} and found.fits and found.cache
    assert found.cache.tokens == 8 * 512  # what the sequences can fill, and no more
    lanes = max(128, 2 * config["hidden_size"] // config["num_attention_heads"])
    assert found.cache.bytes_per_token == layers * lanes  # of one KV head, a byte each
    decode, prefill = found.step("decode"), found.step("prefill")
    V, D = config["vocab_size"], config["hidden_size"]
    assert [(c.kind, c.count) for c in decode.collectives] == [("all-reduce", 2 * layers + 1), ("all-gather", 1)]
    assert decode.collectives[1].bytes == 2 * decode.tokens * V
    assert prefill.collectives[0].bytes == (2 * layers + 1) * 64 * D * 2  # in bfloat16
    assert json.loads(json.dumps(found.to_json()))["steps"][0]["binds"] == decode.binds
    assert any("scales" in note for note in found.notes)

    # What a sweep says of the same is no other story.
    (swept,) = sweep(EMBEDDED_MODEL, ["v5e:2x4"], tp=4, cache_dtype="int8", **SMALL)
    assert swept.method == "arithmetic" and swept.replicas == 2
    assert (swept.cache, swept.mesh, swept.memory.state) == (found.cache, found.mesh, found.memory.state)
    assert swept.memory.weights == found.memory.weights and swept.memory.temporaries >= found.memory.temporaries
    for ours, its in zip(swept.steps, found.steps, strict=True):
        assert (ours.bytes, ours.flops, ours.tokens) == (its.bytes, its.flops, its.tokens)
        for mine, the_compilers in zip(ours.collectives, its.collectives, strict=True):
            assert (mine.kind, mine.count) == (the_compilers.kind, the_compilers.count)
            assert the_compilers.bytes == pytest.approx(mine.bytes, rel=0.02)


@requires_libtpu
def test_the_compiler_refuses_and_what_is_suggested_fits() -> None:
    """Llama-3.1-8B in float32 on one v5e: 32 GB of weights, of 17. No program is compiled to its end."""
    found = plan(CONFIGS["llama-3.1-8b"], "v5e:1x1", dtype="float32", max_num_seqs=64, max_num_batched_tokens=256)
    assert not found.fits and not found.steps and found.method == "compiled"
    assert "the compiler refuses a program" in found.problem and "16.91 GB" in found.problem
    assert found.suggestions == ("--topology v5e:2x2",)
    assert "It does not fit: the compiler" in found.table() and "--topology v5e:2x2" in found.table()
    assert found.memory.head_room < 0


@requires_libtpu
@pytest.mark.slow
def test_suggestions_fit_when_they_are_planned() -> None:
    """Two of them, by the compiler."""
    name = "qwen3-0.6b"
    asked: dict[str, Any] = dict(topology="v5e:2x2", data=4, memory_share=0.5, max_num_seqs=8,
                                 max_num_batched_tokens=64, max_model_len=40960, cache_dtype="float32")
    found = plan(CONFIGS[name], **asked)
    assert not found.fits and "sequences of 40,960 were asked for" in found.problem
    fields: dict[str, tuple[str, type]] = {
        "--data": ("data", int), "--cache-dtype": ("cache_dtype", str), "--max-len": ("max_model_len", int),
        "--topology": ("topology", str)}
    assert {suggestion.split()[0] for suggestion in found.suggestions} == set(fields)
    for suggestion in found.suggestions:
        flag, value = suggestion.split()
        if flag not in ("--cache-dtype", "--topology"):  # the others took as long again, and fitted as well
            continue
        field, kind = fields[flag]
        again = plan(CONFIGS[name], **{**asked, field: kind(value)})
        assert again.fits, f"{suggestion}: {again.problem}"


def test_the_engine_holds_what_was_planned(devices: list[jax.Device], tp: int = 2) -> None:
    """The bytes of the arrays on a device, and the most that a program needs beside them, to 2 %."""
    size: dict[str, Any] = dict(max_num_seqs=1, max_num_batched_tokens=8, max_model_len=512, num_pages=24)
    planned = plan(EMBEDDED_MODEL, f"cpu:{tp}", **size)
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    engine = load_engine(EMBEDDED_MODEL, EngineConfig(**size, warm_up=True), devices=devices[:tp])
    gc.collect()
    held = sum(shard.data.nbytes for array in jax.live_arrays() if id(array) not in before
               for shard in array.addressable_shards if shard.device == devices[0])
    held += max(temporaries_of(program) for program in engine.runner._programs.values())
    memory = planned.memory
    assert planned.fits and planned.cache and planned.cache.pages == 24
    assert memory.weights + memory.cache + memory.state + memory.temporaries == pytest.approx(held, rel=0.02)
    assert memory.temporaries > 0.05 * held  # so that it counts


@pytest.mark.parametrize("size", [dict(num_pages=1_000_000), dict(kv_cache_memory=10**12, max_num_seqs=1024)])
def test_a_cache_larger_than_the_memory_does_not_fit(size: dict[str, Any]) -> None:
    found = plan(CONFIGS["llama-3.1-8b"], "h200:1", **size)
    assert not found.fits and not found.steps and found.cache and found.cache.pages > 100_000
    over = -found.memory.head_room
    assert found.problem == f"{over / 1e9:,.2f} GB are missing on each device."


def test_a_share_of_the_whole_fits() -> None:
    """The masks come after the pages, with the engine as here."""
    found = plan(CONFIGS["llama-3.1-8b"], "h200:1", memory_share=1.0)
    assert found.fits and found.memory.head_room < found.cache.page_size * found.cache.bytes_per_token


def test_no_room_for_a_page_is_told_as_it_is() -> None:
    for topology, options, says in (
        ("h200:1", dict(kv_cache_memory=1000), r"kv_cache_memory is 1,000 bytes, and a page of the KV cache takes \d"),
        ("cpu:1", dict(kv_cache_memory=1000), r"kv_cache_memory is 1,000 bytes"),
        ("cpu:1", dict(memory_share=1e-9), r"of what the host has free beside the weights; 0.24\d MB are"),
        ("h200:1", dict(memory_share=1e-9), r"within 0% of a device's memory; 0.\d\d GB are missing"),
    ):
        found = plan(EMBEDDED_MODEL, topology, **SMALL, **options)
        assert not found.fits and re.search(says, found.problem), found.problem


def test_a_refused_programs_bytes_are_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> list[Any]:
        raise DoesNotFitError(10**12, 10**11, "too much")

    monkeypatch.setattr("maxlike.plan.serving.compile_all", refuse)
    found = plan(EMBEDDED_MODEL, "cpu:1", **SMALL)
    memory = found.memory
    masks = 4 * (json.loads((EMBEDDED_MODEL / "config.json").read_text())["vocab_size"] // 32 * (1 + 8) + 8)
    assert memory.temporaries == 10**12 - memory.weights - memory.cache - memory.state + masks
    assert "the compiler refuses a program that needs 1000.00 GB" in found.problem and "temporaries" in found.table()


def test_sequences_take_whole_pages() -> None:
    found = plan(CONFIGS["llama-3.1-8b"], "h200:1", num_pages=99, page_size=64, context=65, max_model_len=130)
    assert found.step("decode").sequences == 49  # and not 97
    assert "99 sequences of 64, or 33 of the longest, 130." in found.table()


def test_prefill_does_not_read_the_head() -> None:
    found = plan(CONFIGS["llama-3.1-8b"], "h200:1")
    matrix = 2 * 128256 * 4096  # of embedding and head, in bytes
    decode, prefill, of_a_token = found.step("decode"), found.step("prefill"), by_hand("llama-3.1-8b", 1)
    cached = of_a_token.cache_of_a_token
    assert decode.bytes == found.memory.weights - matrix + decode.tokens * decode.context * cached
    assert prefill.bytes == found.memory.weights - 2 * matrix + prefill.tokens * cached


def test_what_cannot_be_planned_is_said(tmp_path: Path) -> None:
    for topology, options, says in (
        ("v5e:2x4", dict(tp=3), "Legal sizes"),
        ("v5e:2x4", dict(tp=16), "Legal sizes|a replica has 8 devices"),
        ("v5e:4x4", dict(tp=2), "uses all of a slice's devices, here 16; tp 2 was asked for"),
        ("v5e:4x4", {}, "here 16; tp 4 is the most that the model's heads allow"),
        ("v5e:2x4", dict(data=3), "--data may be 1, 2, 4, 8"),
        ("v5e:2x4", dict(sequences=3), "Serving has no option sequences"),
        ("v5e:2x4", dict(max_num_seqs=0), "max_num_seqs must be"),
        ("v5e:2x4", dict(context=600, max_model_len=512), "context of 600 tokens .* max_model_len .* of 512"),
        ("h200:1", dict(context=4096), "context of 4,096 tokens .* the model takes it .2,048"),
        ("cpu:64", {}, "xla_force_host_platform_device_count=64"),
        ("v5e:1x3", {}, "no topology v5e:1x3"),
    ):
        with pytest.raises(ValueError, match=says):
            plan(EMBEDDED_MODEL, topology, **options)
    with pytest.raises(ValueError, match="cannot be read"):
        plan(tmp_path, "h200:8")
