"""llama.cpp, as a worker process of `bench_decode.py` runs it; needs `llama-cpp-python` and `gguf`."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_timing import WARM_UP_STEPS, Timing, timed

CONTEXT_STEP = 256  # llama.cpp rounds contexts up to it
LARGEST_BATCH = 512  # tokens a call, llama.cpp's own default


def is_installed() -> bool:
    """Whether both packages are."""
    return all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


class LlamaCpp:
    """llama.cpp on the CPU: weights of one type from a memory-mapped file, a cache in float16, all else as it comes.

    Raises:
        ValueError: the shape is none that it has.
    """

    def __init__(self, task: Mapping[str, Any], weight_type: str):
        import llama_cpp
        import random_gguf
        from llama_cpp._logger import set_verbose

        from maxlike.models.registry import family_of

        set_verbose(False)  # errors are told; what it loads is not
        self.task, self.lib = task, llama_cpp
        self.config = config = family_of(task["config"]).parse(task["config"])
        if reason := random_gguf.why_not(config):
            raise ValueError(f"llama.cpp cannot be compared: {reason}.")
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory(prefix="bench-llama-cpp-") as folder:
            path = Path(folder) / f"{weight_type}.gguf"
            self.weights = random_gguf.write_gguf(path, config, weight_type, random_gguf.draw_randomly())
            self.model = self._load(path)  # mapped: it stays when the name is gone
        itemsize = {"F32": 4}.get(weight_type, 2)
        self.streamed = self.weights
        if not config.tie_word_embeddings:  # of the embedding, a step reads some rows
            self.streamed -= config.vocab_size * config.hidden_size * itemsize
        self.prefill_context = self._context(1, task["prompt_tokens"])
        longest = task["context"] + WARM_UP_STEPS + task["steps"]
        self.contexts = {s: self._filled_context(s, longest) for s in task["batch"]}

    def _load(self, path: Path) -> Any:
        parameters = self.lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        model = self.lib.llama_model_load_from_file(str(path).encode(), parameters)
        if not model:
            raise RuntimeError("llama.cpp does not load the file written for it; it says why above.")
        return model

    def _context(self, n_sequences: int, n_tokens: int) -> Any:
        parameters = self.lib.llama_context_default_params()
        parameters.n_ctx = n_sequences * -(-n_tokens // CONTEXT_STEP) * CONTEXT_STEP
        parameters.n_seq_max = n_sequences
        parameters.n_batch = max(LARGEST_BATCH, self.task["prompt_tokens"], n_sequences)
        parameters.n_threads = parameters.n_threads_batch = self.task["threads"]
        context = self.lib.llama_init_from_model(self.model, parameters)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context of {parameters.n_ctx} tokens; it says why above.")
        return context

    def _filled_context(self, n_sequences: int, n_tokens: int) -> Any:
        context = self._context(n_sequences, n_tokens)
        prompt = np.random.default_rng(1).integers(self.config.vocab_size, size=self.task["context"])
        for s in range(n_sequences):
            for start in range(0, len(prompt), LARGEST_BATCH):
                part = prompt[start:start + LARGEST_BATCH]
                self.step(context, part, range(start, start + len(part)), [s] * len(part), [len(part) - 1])
        return context

    def about(self) -> dict[str, Any]:
        """What there is to know before anything is timed."""
        config, float16 = self.config, 2
        return {"version": f"llama-cpp-python {self.lib.__version__}", "platform": "cpu", "weight_bytes": self.weights,
                "streamed_bytes": self.streamed,
                "kv_bytes_per_token": len(config.layers) * config.num_key_value_heads * 2 * config.head_dim * float16}

    def step(self, context: Any, tokens: Sequence[int] | np.ndarray, positions: Sequence[int],
             sequences: Sequence[int], wanted: Sequence[int]) -> np.ndarray:
        """Takes tokens, each at a position of a sequence; `float32[len(wanted), V]`, the logits at those tokens."""
        n = len(tokens)
        batch = self.lib.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
                batch.token[i], batch.pos[i] = int(token), position
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, 0
            for i in wanted:
                batch.logits[i] = 1
            if code := self.lib.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode returns {code} for {n} tokens; it says why above.")
        finally:
            self.lib.llama_batch_free(batch)
        # Read once it is there, in the order of the batch.
        return np.ctypeslib.as_array(self.lib.llama_get_logits(context), (len(wanted), self.config.vocab_size))

    def prefill(self) -> Timing:
        """One prompt into an empty cache, in one call."""
        n = self.task["prompt_tokens"]
        prompt = np.random.default_rng(0).integers(self.config.vocab_size, size=n)
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.prefill_context), True)
        return timed(lambda: self.step(self.prefill_context, prompt, range(n), [0] * n, [n - 1]).argmax(-1))

    def decode(self, batch: int) -> Timing:
        """`steps` steps of `batch` sequences, from a cache of `context` tokens."""
        context, tokens, position = self.contexts[batch], np.arange(batch), self.task["context"]

        def run(n_steps: int) -> None:
            nonlocal tokens, position
            for _ in range(n_steps):
                tokens = self.step(context, tokens, [position] * batch, range(batch), range(batch)).argmax(-1)
                position += 1

        run(WARM_UP_STEPS)
        timing = timed(lambda: run(self.task["steps"]))
        memory = self.lib.llama_get_memory(context)
        for s in range(batch):
            self.lib.llama_memory_seq_rm(memory, s, self.task["context"], -1)
        return timing
