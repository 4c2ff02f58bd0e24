"""Plans for training against arithmetic by hand, and against the compiler's refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from maxlike.cli import EMBEDDED_MODEL
from maxlike.plan import Plan, Training, plan
from maxlike.plan.arithmetic import KnownShapes
from maxlike.plan.chips import parse_topology
from maxlike.plan.planner import described, reckoned
from tests.plan.known import CONFIGS, PUBLISHED
from tests.tpu_compile import requires_libtpu


def by_arithmetic(name: str, topology: str, **options: Any) -> Plan:
    _, config = described(CONFIGS[name])
    return reckoned(name, config, parse_topology(topology), Training(**options), KnownShapes(config))


@requires_libtpu
def test_a_small_model_on_a_mesh_of_two_axes() -> None:
    """The compiler's plan, that by arithmetic beside it."""
    options = Training(tp=2, tokens_per_batch=2048, accumulation=2)
    found = plan(EMBEDDED_MODEL, "v5e:2x2", options)
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    layers = config["num_hidden_layers"]
    assert found.fits and found.method == "compiled" and found.mesh == {"fsdp": 2, "model": 2} and found.cache is None
    # Weights and Adam's two moments in float32, each device its quarter; norms are cut by fsdp alone.
    assert found.memory.weights == pytest.approx(4 * found.parameters / 4, rel=0.02)
    assert found.memory.state == pytest.approx(2 * found.memory.weights, rel=0.01)
    step = found.step("train")
    assert step.tokens == 2048 and step.sequences == 4 and step.context == 512
    moved = {c.kind: c for c in step.collectives}
    # Of each micro-batch weights are gathered in bfloat16, forward and on the way back; gradients are scattered once.
    assert moved["all-gather"].count >= 2 * 2 * 7 * layers
    assert moved["all-gather"].bytes >= 2 * 2 * 2 * found.parameters / 2
    # The embedding's come twice, of its rows in bfloat16 and as the head's weight.
    scattered = 4 * found.parameters + 2 * config["vocab_size"] * config["hidden_size"]
    assert moved["reduce-scatter"].bytes == pytest.approx(2 * scattered / 2, rel=0.05)
    # Six operations a parameter and token, two more for remat; and in as many passes attention's four for each channel
    # of the heads and token seen, which is half of a sequence. The embedding is the head here.
    attention = 4 * config["num_attention_heads"] * config["head_dim"] * (512 / 2) * layers
    assert step.flops == pytest.approx((8 * found.parameters + 4 * attention) * 2048 / 4, rel=0.01)
    table = found.table()
    assert "optimizer" in table and "trained on v5e:2x2" in table and "reduce-scatter" in table
    _, described_config = described(EMBEDDED_MODEL)
    beside = reckoned("embedded", described_config, parse_topology("v5e:2x2"), options, KnownShapes(described_config))
    for field in ("weights", "state"):
        assert getattr(beside.memory, field) == pytest.approx(getattr(found.memory, field), rel=0.02)
    assert beside.step("train").flops == step.flops and beside.method == "arithmetic"


def test_arithmetic_is_that_by_hand() -> None:
    found = by_arithmetic("llama-3.1-8b", "h200:8", tokens_per_batch=32768)
    assert found.fits and found.memory.weights == pytest.approx(4 * PUBLISHED["llama-3.1-8b"] / 8, rel=0.01)
    assert found.memory.state == pytest.approx(8 * PUBLISHED["llama-3.1-8b"] / 8, rel=0.01)
    alone = by_arithmetic("llama-3.1-8b", "h200:1", lora_rank=16, tokens_per_batch=4096)
    adapters = 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert alone.memory.weights == pytest.approx(2 * PUBLISHED["llama-3.1-8b"] + 4 * adapters, rel=0.01)
    assert alone.memory.state == pytest.approx(8 * adapters, rel=0.01)
    assert alone.step("train").collectives == ()
    # Frozen weights have no gradients: six passes of eight.
    whole = by_arithmetic("llama-3.1-8b", "h200:1", tokens_per_batch=4096)
    assert not whole.fits and "are missing on each device" in whole.problem
    more = by_arithmetic("llama-3.1-8b", "h200:8", tp=8, tokens_per_batch=4096)
    assert {c.kind for c in more.step("train").collectives} == {"all-reduce"}
    assert more.step("train").flops == pytest.approx(alone.step("train").flops / 8 * 4 / 3, rel=1e-6)


@requires_libtpu
@pytest.mark.slow
def test_a_step_is_refused_and_what_is_suggested_fits() -> None:
    """Qwen3-0.6B on one v5e with too many tokens at once: by the compiler, as is the cheapest of its suggestions."""
    asked: dict[str, Any] = dict(topology="v5e:1x1", tokens_per_batch=131072)
    found = plan(CONFIGS["qwen3-0.6b"], options=Training(), **asked)
    assert not found.fits and "the compiler refuses the step" in found.problem
    assert found.memory.head_room < 0
    assert found.suggestions == ("--accumulation 4", "--topology v5e:2x2")
    again = plan(CONFIGS["qwen3-0.6b"], options=Training(), **asked, accumulation=4)
    assert again.fits, again.problem


def test_what_cannot_be_trained_so_is_said() -> None:
    for topology, options, says in (
        ("h200:8", dict(tp=3), "does not use the 8 devices|Legal sizes"),
        ("h200:8", dict(data=2, fsdp=2), "does not use the 8 devices"),
        ("h200:8", dict(tokens_per_batch=1001), "a multiple of the 8 equal parts"),
        ("h200:8", dict(remat="some"), "remat"),
        ("h200:8", dict(lora_rank=0), "lora_rank must be"),
    ):
        with pytest.raises(ValueError, match=says):
            plan(CONFIGS["llama-3.1-8b"], topology, Training(**options))
