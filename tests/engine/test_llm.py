"""`LLM`, as a program uses it, against what transformers and a recomputation say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from maxlike import LLM, SamplingParams
from maxlike.cli import EMBEDDED_MODEL
from tests.compilation_cache import compiling_once
from tests.engine.engines import logits_after, near_ties, source_tokens, tokenizer

CHATML = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.fixture(scope="module", autouse=True)
def cached(programs: Path) -> Iterator[None]:
    with compiling_once(programs):
        yield


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(EMBEDDED_MODEL, devices=jax.devices("cpu")[:1], dtype="float32", max_num_seqs=8,
               max_num_batched_tokens=32, page_size=16, max_model_len=256, num_pages=80, chat_template=CHATML)


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    texts = ["def area(radius):\n", "import os\nimport ", "class Stack:\n    def push("] * 4
    outputs = llm.generate(texts, SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)
    assert [output.prompt for output in outputs] == texts and all(output.finished for output in outputs)
    for text, output in zip(texts, outputs, strict=True):
        assert output.prompt_token_ids == tokenizer().encode(text)
        (completion,) = output.outputs
        near_ties(output.prompt_token_ids, completion.token_ids)
        assert completion.text == tokenizer().decode([*output.prompt_token_ids, *completion.token_ids])[len(text):]
        assert output.metrics.first_token is not None and output.metrics.finished is not None


@pytest.mark.parametrize("prompts", ["import os\n", [5, 6, 7], ["import os\n"], [[5, 6, 7]], np.array([5, 6, 7])])
def test_forms_of_prompts(prompts: Any, llm: LLM) -> None:
    (output,) = llm.generate(prompts, SamplingParams(max_tokens=2), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 2


def test_params_of_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, n=n) for n in (1, 2, 3)]
    outputs = llm.generate(["a = ", "b = ", "c = "], params, priority=[2, 1, 0], use_tqdm=False)
    assert [[len(c.token_ids) for c in output.outputs] for output in outputs] == [[1], [2, 2], [3, 3, 3]]
    with pytest.raises(ValueError, match="sampling_params has 3 entries for 2 prompts"):
        llm.generate(["a", "b"], params)


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "sort a list"}]
    greedy = SamplingParams(temperature=0, max_tokens=5)
    (one,) = llm.chat(messages, greedy, use_tqdm=False)
    expected = "<|user|>sort a list\n<|assistant|>"
    assert one.prompt_token_ids == tokenizer().encode(expected, add_special_tokens=False)
    many = llm.chat([messages, messages], greedy, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in many] == [one.outputs[0].token_ids] * 2


def test_a_chat_template_of_one_s_own(llm: LLM) -> None:
    messages = [{"role": "user", "content": "sort"}]
    (output,) = llm.chat(messages, SamplingParams(max_tokens=1), chat_template="{{ messages[0].content }}!",
                         use_tqdm=False)
    assert output.prompt_token_ids == tokenizer().encode("sort!", add_special_tokens=False)
    with pytest.raises(ValueError, match="chat template that was given, line 1: "):
        llm.chat(messages, chat_template="{% for x in %}")


def test_scores_are_the_model_s_logprobs(llm: LLM) -> None:
    prompts = [source_tokens(n, start=n) for n in (1, 2, 33, 100)]
    for prompt, score in zip(prompts, llm.score(prompts, use_tqdm=False), strict=True):
        logits = logits_after(prompt).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = logprobs[np.arange(len(prompt) - 1), prompt[1:]]
        assert score.logprobs[0] is None
        np.testing.assert_allclose(np.array(score.logprobs[1:], float), expected, atol=2e-4)
        assert score.total == pytest.approx(expected.sum(), abs=1e-2)


def test_embeddings_have_length_1_and_tell_texts_apart(llm: LLM) -> None:
    one, same, other = (np.array(e.embedding) for e in llm.embed(
        ["import os", "import os", "class Stack:\n    pass"], use_tqdm=False))
    assert abs(np.linalg.norm(one) - 1) < 1e-6 and np.allclose(one, same, atol=1e-4) and one @ other < 0.99


def test_a_refused_prompt_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        llm.generate([[5], []])
    for wrong, says in ((None, "Prompts are text.*got NoneType"), ([1, 2.5], "whole numbers; got 2.5"),
                        ([[1, None]], "whole numbers; got None")):
        with pytest.raises(ValueError, match=says):
            llm.generate(wrong)
    assert llm.generate([]) == llm.score([]) == llm.embed([]) == []
    with pytest.raises(ValueError, match="A prompt is text or a list of token ids; got dict"):
        llm.generate([{"prompt": "x"}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="sampling_params has 0 entries for 1 prompts"):
        llm.generate([5], [])
    assert not llm.engine.has_work()
    with pytest.raises(ValueError, match="priority must be between"):
        llm.generate([[5], [6]], priority=[0, 2**40])
    assert not llm.engine.scheduler.has_requests


@pytest.mark.parametrize("options, says", [
    (dict(max_num_seqs=0), "max_num_seqs must be a whole number of at least 1; got 0"),
    (dict(max_model_len=10**6), "max_model_len=1000000 was asked for; the model takes 2048"),
    (dict(num_pages=3, kv_cache_memory=100), "both size the KV cache"),
    (dict(kv_cache_memory=1000), r"There is no room for a KV cache: a page of 64 tokens takes .* MiB"),
    (dict(max_num_seqs=64, max_num_batched_tokens=32), "max_num_batched_tokens=32 is less than max_num_seqs=64"),
    (dict(memory_share=1.5), "memory_share must be above 0 and at most 1; got 1.5"),
])
def test_sizes_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LLM(EMBEDDED_MODEL, devices=jax.devices("cpu")[:1], **options)


def test_a_checkpoint_without_a_tokenizer_takes_ids(tmp_path: Path) -> None:
    for file in EMBEDDED_MODEL.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file)
    llm = LLM(tmp_path, devices=jax.devices("cpu")[:1], max_num_seqs=1, max_model_len=64, num_pages=1)
    (output,) = llm.generate([5, 6, 7], SamplingParams(max_tokens=3), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3 and output.outputs[0].text == ""
    for call, says in ((lambda: llm.generate("text"), "no tokenizer, which text needs"),
                       (lambda: llm.generate([5], SamplingParams(stop="x")), "the checkpoint has no tokenizer"),
                       (lambda: llm.chat([{"role": "user", "content": "x"}]), "no tokenizer, which chat needs")):
        with pytest.raises(ValueError, match=says):
            call()
