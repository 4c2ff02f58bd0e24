"""The engine's programs for Llama 3.1 8B as the TPU compiler makes them, for a slice that is not here."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from maxlike.engine.config import EngineConfig
from maxlike.engine.runner import ModelRunner
from maxlike.models.build import abstract_model, build_model
from tests.nn.transformer.test_compiled_for_tpu import LLAMA_8B
from tests.tpu_compile import count_collectives, loop_body, requires_libtpu, topology_mesh

pytestmark = requires_libtpu


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    """Its weights are shapes and shardings alone."""
    mesh = topology_mesh("v6e:2x4", {"model": 8})
    model = abstract_model(functools.partial(build_model, LLAMA_8B, devices=mesh))
    config = EngineConfig(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=8192)
    runner = ModelRunner(model, config.for_model(LLAMA_8B, "tpu"))
    runner.n_pages = 2048
    return runner


@pytest.mark.parametrize("n_tokens", [64, pytest.param(512, marks=pytest.mark.slow)])
def test_a_step_of_decodes_or_prompts_writes_the_cache_in_place(n_tokens: int, runner: ModelRunner) -> None:
    compiled = runner.lower("forward", n_tokens).compile()
    pages = runner.n_pages * runner.kv_params.bytes_per_page(runner.mesh)
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pages
    assert memory.temp_size_in_bytes < 64 * 2**20
    assert count_collectives(loop_body(compiled.as_text())) == {"all-reduce": 2}


@pytest.mark.parametrize("kind", ["greedy", pytest.param("full", marks=pytest.mark.slow)])
def test_the_tail_is_the_head_and_little_beside(kind: str, runner: ModelRunner) -> None:
    memory: Any = runner.lower(kind, 64).compile().memory_analysis()
    head = 2 * runner.vocab_size * 4096 // 8
    assert head <= memory.argument_size_in_bytes < 1.5 * head + 64 * runner.vocab_size * 6
    logits = 4 * 64 * runner.vocab_size
    assert memory.temp_size_in_bytes < 8 * logits
