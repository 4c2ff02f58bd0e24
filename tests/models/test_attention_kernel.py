"""Whole models through the TPU's attention kernel, interpreted: the tokens are those of the XLA path."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from maxlike.kernels.paged_attention import Implementation, MosaicTpu, Xla
from maxlike.models.build import build_model
from maxlike.models.checkpoint import read_weights
from maxlike.models.registry import family_of, parse_config
from maxlike.nn import KVCacheParams
from tests.models.checkpoints import FAMILIES, config_of, write

PAGE_SIZE, HEAD_DIM = 16, 64  # heads of 64 fill a register with K and V, on any platform
# The first sequence's window leaves its first page on the way, the second comes to its second page.
PROMPT_LENGTHS, STEPS = (22, 12), 6


def greedy(folder: Path, implementation: Implementation) -> np.ndarray:
    """Tokens [STEPS + 1, sequences] that continue two prompts, the second of which joins a step after the first."""
    config, _ = parse_config(folder)
    params = KVCacheParams(jnp.float32, config.num_key_value_heads, HEAD_DIM, len(config.layers),
                           page_size=PAGE_SIZE, implementation=implementation)
    model = nnx.eval_shape(partial(build_model, config, devices=jax.devices()[:1], use_subgraphs=True,
                                   kv_params=params))
    read_weights(model, family_of({"model_type": config.model_type}), folder)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(config.vocab_size, size=n, dtype=np.int32) for n in PROMPT_LENGTHS]
    table = rng.permutation(8).astype(np.int32).reshape(2, 4)
    pages = params.allocate(8, model.mesh)
    lengths, chosen = np.zeros(2, np.int32), []

    def step(tokens: np.ndarray, new: tuple[int, int], bucket: int) -> np.ndarray:
        nonlocal pages, lengths
        tokens = np.pad(tokens, (0, bucket - len(tokens)))
        (logits,), pages = model(tokens, (pages, lengths, table), None, np.cumsum([0, *new], dtype=np.int32))
        lengths = lengths + np.array(new, np.int32)
        return np.asarray(logits).argmax(-1).astype(np.int32)

    first = step(prompts[0], (len(prompts[0]), 0), 32)[0]
    tokens = step(np.concatenate([[first], prompts[1]]).astype(np.int32), (1, len(prompts[1])), 32)  # mixed
    for _ in range(STEPS):
        chosen.append(tokens)
        tokens = step(tokens, (1, 1), 8)
    return np.stack([*chosen, tokens])


@pytest.mark.parametrize("family", [
    "gemma3_text", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in FAMILIES if name != "gemma3_text")])
def test_the_kernel_chooses_the_same_tokens(family: str, tmp_path: Path) -> None:
    write(tmp_path, config_of(family, head_dim=HEAD_DIM, num_attention_heads=4))
    kernel = MosaicTpu(interpret=pltpu.InterpretParams())
    np.testing.assert_array_equal(greedy(tmp_path, kernel), greedy(tmp_path, Xla()))
