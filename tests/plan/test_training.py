"""Plans for training against arithmetic by hand, and against the compiler's refusals."""

from __future__ import annotations

import json
from typing import Any

import jax
import pytest

from maxlike.cli import EMBEDDED_MODEL
from maxlike.plan import Plan, Training, plan
from maxlike.plan.arithmetic import KnownShapes
from maxlike.plan.chips import parse_topology
from maxlike.plan.compiling import DoesNotFitError
from maxlike.plan.planner import described, reckoned
from tests.plan.known import CONFIGS, PUBLISHED
from tests.tpu_compile import requires_libtpu


def by_arithmetic(name: str, topology: str, **options: Any) -> Plan:
    _, config = described(CONFIGS[name])
    return reckoned(name, config, parse_topology(topology), Training(**options), KnownShapes(config))


@requires_libtpu
def test_a_small_model_on_a_mesh_of_two_axes() -> None:
    """The compiler's plan, that by arithmetic beside it."""
    options = Training(tp=2, tokens_per_batch=1024, accumulation=2)
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
    # The embedding's come twice in float32, as that of its rows and as the head's; the layers' in bfloat16, of which
    # the compiler has the smallest all-reduced instead.
    embedding = config["vocab_size"] * config["hidden_size"]
    scattered = 2 * 4 * embedding + 2 * (found.parameters - embedding)
    assert 0.9 * 2 * scattered / 2 < moved["reduce-scatter"].bytes < 2 * scattered / 2
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
    assert found.suggestions == ("--accumulation 4 --tokens-per-batch 32768", "--topology v5e:2x2")
    again = plan(CONFIGS["qwen3-0.6b"], "v5e:1x1", Training(accumulation=4, tokens_per_batch=32768))
    assert again.tokens_per_s and again.step("train").tokens == 131072
    assert again.fits, again.problem


def test_a_step_takes_several_batches() -> None:
    """As `Feed` does it: each of `tokens_per_batch` tokens."""
    once = by_arithmetic("llama-3.1-8b", "h200:8", tokens_per_batch=32768)
    thrice = by_arithmetic("llama-3.1-8b", "h200:8", tokens_per_batch=32768, accumulation=3)
    assert (once.step("train").tokens, thrice.step("train").tokens) == (32768, 3 * 32768)
    assert thrice.step("train").flops == pytest.approx(3 * once.step("train").flops)
    assert thrice.memory == once.memory  # a device works on one at a time
    assert "a step of 98,304 tokens, 4,096 on a device at a time" in thrice.notes[0]


def test_adapters_are_cut_as_their_weights_are(devices: list[jax.Device], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> list[Any]:
        raise DoesNotFitError(None, None, "of no matter here")

    monkeypatch.setattr("maxlike.plan.training.compile_all", refuse)  # which would take a while
    options = Training(lora_rank=8, tp=2, fsdp=2, tokens_per_batch=64)
    found = plan(EMBEDDED_MODEL, "cpu:4", options)
    _, config = described(EMBEDDED_MODEL)
    beside = reckoned("embedded", config, parse_topology("h200:4"), options, KnownShapes(config))
    assert beside.mesh == found.mesh == {"fsdp": 2, "model": 2}
    assert beside.memory.weights == found.memory.weights
    assert beside.memory.state == pytest.approx(found.memory.state, rel=1e-3)  # and a counter


def test_suggestions_leave_the_users_options() -> None:
    asked: dict[str, Any] = dict(fsdp=4, tp=2, tokens_per_batch=262144, remat="none")
    found = plan(CONFIGS["llama-3.1-8b"], "a100:8", Training(**asked))
    assert not found.fits and found.suggestions == ("--remat full", "--accumulation 8 --tokens-per-batch 32768")
    assert plan(CONFIGS["llama-3.1-8b"], "a100:8", Training(**{**asked, "remat": "full"})).fits
    fewer = {**asked, "accumulation": 8, "tokens_per_batch": 32768}
    assert plan(CONFIGS["llama-3.1-8b"], "a100:8", Training(**fewer)).fits
    # Half as many copies would need another fsdp, which was given.
    alone = plan(CONFIGS["llama-3.1-8b"], "a100:8", Training(data=4, fsdp=2))
    assert not alone.fits and all("--data" not in told for told in alone.suggestions)
    assert "--data 2" in plan(CONFIGS["llama-3.1-8b"], "a100:8", Training(data=4)).suggestions


def test_what_cannot_be_trained_so_is_said() -> None:
    for topology, options, says in (
        ("h200:8", dict(tp=3), "does not use the 8 devices|Legal sizes"),
        ("h200:8", dict(data=2, fsdp=2), "does not use the 8 devices"),
        ("h200:8", dict(tokens_per_batch=1001), "a multiple of the 8 equal parts"),
        ("h200:8", dict(remat="some"), "remat"),
        ("h200:8", dict(optimizer="foo"), "optimizer must be one of adamw, adafactor, lion, muon, sgd; got 'foo'"),
        ("h200:8", dict(lora_rank=0), "lora_rank must be"),
    ):
        with pytest.raises(ValueError, match=says):
            plan(CONFIGS["llama-3.1-8b"], topology, Training(**options))
