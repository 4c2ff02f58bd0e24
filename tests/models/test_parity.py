"""Checkpoints that `transformers` wrote give the logits and the tokens that `transformers` gives.

Each case is a random checkpoint of an odd shape. Four sequences of unequal length go through as one ragged batch:
the prompts in one step, then `STEPS` steps of one token each over a page table in random order, crossing a page's
end and, where there is one, the sliding window. All steps have room for `ROOM` tokens, so that one program is
compiled for them.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import maxlike
from maxlike import ReturnLogits
from maxlike.models import parse_config, save_model

STEPS = 16
PROMPT_LENGTHS = (5, 1, 58, 23)  # pages hold 64 tokens: the third crosses into its second while decoding
ROOM = 96


@dataclass(frozen=True)
class Case:
    """A model of `transformers`, and how it runs here; `scored`: also without a cache."""

    model_type: str
    config: dict[str, Any]
    n_devices: int = 1
    use_subgraphs: bool = False
    scored: bool = False


def sizes(hidden: int, heads: int, kv_heads: int, layers: int = 2, **more: Any) -> dict[str, Any]:
    return dict(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=layers,
                intermediate_size=120, vocab_size=1003, max_position_embeddings=256, tie_word_embeddings=False,
                rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2) | more


def odd(**more: Any) -> dict[str, Any]:
    return sizes(96, 6, 3, head_dim=80, **more)


LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
LINEAR = dict(rope_type="linear", rope_theta=1e6, factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
PARTIAL = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
S, F = "sliding_attention", "full_attention"
WINDOW = dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)
GEMMA = dict(sliding_window=8, query_pre_attn_scalar=50)

CASES = {
    "llama-biases": Case("llama", odd(attention_bias=True, mlp_bias=True), 3, scored=True),
    "llama-llama3-tied": Case("llama", sizes(64, 8, 1, rope_parameters=LLAMA3, tie_word_embeddings=True), 8, True),
    "llama-linear": Case("llama", sizes(64, 4, 4, rope_parameters=LINEAR, mlp_bias=True)),
    "llama-yarn-tied": Case("llama", sizes(64, 4, 2, rope_parameters=YARN, tie_word_embeddings=True)),
    "llama-partial": Case("phi3", sizes(64, 4, 2, pad_token_id=0, rope_parameters=PARTIAL)),
    "mistral-window": Case("mistral", odd(sliding_window=8), 3, True, scored=True),
    "mistral-yarn-tied": Case("mistral", sizes(64, 4, 1, sliding_window=None, tie_word_embeddings=True,
                                               rope_parameters=YARN | dict(beta_fast=8.0, beta_slow=2.0,
                                                                           attention_factor=1.3))),
    "qwen2-yarn": Case("qwen2", odd(rope_parameters=YARN | dict(truncate=False))),
    "qwen2-window-tied": Case("qwen2", sizes(64, 4, 2, layers=4, **WINDOW | dict(max_window_layers=2),
                                             tie_word_embeddings=True), 4, True),
    "qwen3-tied": Case("qwen3", odd(tie_word_embeddings=True), 3, True),
    "qwen3-window": Case("qwen3", sizes(64, 4, 1, head_dim=24, attention_bias=True, **WINDOW, rope_parameters=LLAMA3),
                         scored=True),
    "gemma3_text": Case("gemma3_text", odd(layers=5, layer_types=[S, F, S, F, S], **GEMMA, tie_word_embeddings=True,
                                           attn_logit_softcapping=5.0, final_logit_softcapping=9.0,
                                           rope_parameters={F: LINEAR, S: dict(rope_type="default", rope_theta=1e4)}),
                        3, True, scored=True),
    "gemma3_text-untied": Case("gemma3_text", sizes(64, 4, 1, head_dim=16, layer_types=[S, F], **GEMMA,
                                                    attention_bias=True)),
    "gemma3": Case("gemma3", dict(
        text_config=sizes(64, 4, 2, head_dim=24, layer_types=[S, F], **GEMMA, tie_word_embeddings=True),
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                           image_size=28, patch_size=14),
        mm_tokens_per_image=4, image_token_index=1002, boi_token_index=1001, eoi_token_index=1000)),
}
SLOW = {"llama-linear", "mistral-yarn-tied"}  # what they add is in other cases as well, or in the tests of the rope


@pytest.fixture(scope="module")
def oracle() -> Any:
    """Skips where there is no torch or no transformers, and only there."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name)
    from tests.models import oracle

    return oracle


def write(case: Case, oracle: Any, folder: Path) -> Any:
    """Writes the case's checkpoint; returns the model of `transformers`."""
    model = oracle.random_model(case.model_type, **case.config)
    if case.model_type == "phi3":  # the only one here of which transformers rotates a part of each head
        oracle.save_as_llama(model, folder)
    else:
        model.save_pretrained(folder)
    return model


def assert_close(ours: np.ndarray, theirs: np.ndarray, where: str) -> None:
    """To 1e-4, where logits are large to 2e-5 of the largest: `transformers` is as far from its own float64."""
    assert np.isfinite(ours).all() and ours.shape == theirs.shape, where
    worst, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert worst <= max(1e-4, 2e-5 * largest), f"{where}: off by {worst:.2e}, the largest logit being {largest:.1f}"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def test_logits_and_tokens_are_those_of_transformers(name: str, oracle: Any, tmp_path: Path, devices: list[jax.Device],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    soft_cap_scores(case, monkeypatch)
    theirs = write(case, oracle, tmp_path)
    check(theirs, tmp_path, oracle, devices[:case.n_devices], case.use_subgraphs, case.scored)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
def test_the_other_way_of_running_them(name: str, oracle: Any, tmp_path: Path, devices: list[jax.Device],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Scanned where the test above is not and the other way round, and on another number of devices."""
    case = CASES[name]
    soft_cap_scores(case, monkeypatch)
    theirs = write(case, oracle, tmp_path)
    n_devices = 1 if case.n_devices > 1 else case.config.get("text_config", case.config)["num_attention_heads"]
    check(theirs, tmp_path, oracle, devices[:n_devices], not case.use_subgraphs, True)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.model_type != "phi3"])
def test_what_is_saved_is_the_same_model_to_transformers(name: str, oracle: Any, tmp_path: Path,
                                                         devices: list[jax.Device]) -> None:
    """Read from sharded files, on several devices, written again: config and every tensor, to the last bit."""
    case = CASES[name]
    theirs = oracle.random_model(case.model_type, **case.config)
    theirs.save_pretrained(tmp_path / "given", max_shard_size="100KB")
    assert len([*(tmp_path / "given").glob("*.safetensors")]) > 3
    model = maxlike.load(tmp_path / "given", devices=devices[:case.n_devices], use_subgraphs=case.use_subgraphs)
    save_model(model, parse_config(tmp_path / "given")[0], tmp_path / "saved", max_shard_bytes=100_000)
    tokens = np.random.default_rng(0).integers(0, 1000, 40).tolist()
    np.testing.assert_array_equal(oracle.all_logits(oracle.load(tmp_path / "saved"), tokens),
                                  oracle.all_logits(theirs, tokens))


def soft_cap_scores(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformers` reads this field of Gemma 3's, and then does not hand it to the function that knows it."""
    if cap := case.config.get("attn_logit_softcapping"):
        gemma3 = importlib.import_module("transformers.models.gemma3.modeling_gemma3")
        monkeypatch.setattr(gemma3, "eager_attention_forward", partial(gemma3.eager_attention_forward, softcap=cap))


def check(theirs: Any, folder: Path, oracle: Any, devices: list[jax.Device], use_subgraphs: bool,
          scored: bool) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 1003, n).tolist() for n in PROMPT_LENGTHS]
    continued = [prompt + oracle.greedy(theirs, prompt, STEPS + 1) for prompt in prompts]
    expected = [oracle.all_logits(theirs, tokens[:-1]) for tokens in continued]
    assert max(np.abs(logits).max() for logits in expected) > 2  # else 1e-4 would say little

    model = maxlike.load(folder, devices=devices, use_subgraphs=use_subgraphs, return_logits=ReturnLogits.ALL)
    lengths = np.zeros(len(prompts), np.int32)
    table = rng.permutation(2 * len(prompts)).astype(np.int32).reshape(-1, 2)
    pages = model.kv_params.allocate(table.size, model.mesh)
    upcoming = [list(prompt) for prompt in prompts]
    for step in range(STEPS + 1):
        offsets = np.cumsum([0, *map(len, upcoming)]).astype(np.int32)
        tokens = np.full(ROOM, 7, np.int32)
        tokens[:offsets[-1]] = np.concatenate(upcoming)
        (last, logits, _), pages = model(tokens, (pages, lengths, table), None, offsets)
        rows = np.split(np.asarray(logits)[:offsets[-1]], offsets[1:-1])
        for s in range(len(prompts)):
            assert_close(rows[s], expected[s][lengths[s]:lengths[s] + len(upcoming[s])], f"step {step}, sequence {s}")
            np.testing.assert_array_equal(rows[s][-1], last[s])
        lengths = lengths + np.diff(offsets)
        upcoming = [[int(np.argmax(row))] for row in np.asarray(last)]
        assert [[tokens[n]] for tokens, n in zip(continued, lengths, strict=True)] == upcoming, f"step {step}"

    if not scored:
        return
    offsets = np.cumsum([0, *map(len, expected)]).astype(np.int32)
    (_, logits, _), no_pages = model(np.concatenate([tokens[:-1] for tokens in continued]), None, None, offsets)
    assert no_pages is None
    assert_close(np.asarray(logits), np.concatenate(expected), "without a cache")
