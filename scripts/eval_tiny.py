"""Measures the embedded model on the files that it was not trained on: `python scripts/eval_tiny.py [FOLDER]`.

Two figures: bits per byte, next to `xz -9` on the same bytes, and how often the greedy continuation of a function's
head is Python. They mean something only under the Python version that the model was trained with: another one
has other files, and a file held out there may have been trained on here.
"""

from __future__ import annotations

import argparse
import ast
import json
import lzma
import math
import platform
import random
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from flax import nnx
from tiny_corpus import END, Corpus, SourceFile, encode_documents
from tqdm import tqdm

import maxlike
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer
from maxlike.train.loss import token_logprobs

EMBEDDED = Path(__file__).resolve().parents[1] / "maxlike" / "embedded"
SCORED_TOKENS = 8192  # of a batch
CONTEXT = 1024  # tokens of a window


@partial(jax.jit, static_argnums=0)
def token_losses(graphdef: nnx.GraphDef, params: nnx.State, tokens: jax.Array, targets: jax.Array,
                 row_offsets: jax.Array) -> jax.Array:
    """Negative log likelihood of each target, in nats: `float32[T]`.

    Args:
        graphdef, params: a model, split.
        tokens, targets: `int32[T]`.
        row_offsets: `int32[S + 1]`.
    """
    model = nnx.merge(graphdef, params)
    with jax.sharding.use_abstract_mesh(model.mesh.abstract_mesh):
        hidden, _ = model.hidden_states(tokens, None, row_offsets)
        return -token_logprobs(model, hidden, targets)


def bits_per_byte(model: DistributedTransformer, tokenizer: tokenizers.Tokenizer, files: Sequence[SourceFile],
                  context: int = CONTEXT) -> float:
    """Bits that the model needs for `files`, each from its own beginning, over their bytes in UTF-8.

    Windows of `context` tokens overlap by half, so that every token is scored once and with at least
    `context / 2` tokens before it, or all that there are. The first token of a file is predicted from `BEGIN`,
    which costs nothing; `END` is paid for.
    """
    windows = []  # (inputs, targets, how many of the first targets were scored in the window before)
    stride = context // 2
    for document in encode_documents(tokenizer, [file.text for file in files]):
        ids = np.array(document, np.int32)
        for start in range(0, max(1, len(ids) - 1 - stride), stride):
            end = min(start + context, len(ids) - 1)
            windows.append((ids[start:end], ids[start + 1:end + 1], stride if start else 0))
    graphdef, params = nnx.split(model)
    nats = 0.0
    per_batch = max(1, SCORED_TOKENS // context)
    for i in tqdm(range(0, len(windows), per_batch), desc="scoring", unit="batch", mininterval=5):
        inputs, targets, skipped = zip(*windows[i:i + per_batch], strict=True)
        offsets = np.cumsum([0, *(len(x) for x in inputs)])
        room = (0, per_batch * context - offsets[-1])
        losses = np.asarray(token_losses(
            graphdef, params, np.pad(np.concatenate(inputs), room), np.pad(np.concatenate(targets), room),
            np.pad(offsets, (0, per_batch + 1 - len(offsets)), mode="edge").astype(np.int32)))
        for start, end, skip in zip(offsets[:-1], offsets[1:], skipped, strict=True):
            nats += float(losses[start + skip:end].sum(dtype=np.float64))
    return nats / math.log(2) / sum(len(file.text.encode()) for file in files)


def xz_bits_per_byte(files: Sequence[SourceFile]) -> float:
    """What `xz -9` makes of the files laid end to end, which is kinder to it than one at a time."""
    data = b"".join(file.text.encode() for file in files)
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


def continue_greedily(model: DistributedTransformer, prompts: Sequence[Sequence[int]], new_tokens: int,
                      end: int) -> list[list[int]]:
    """The likeliest next tokens of each prompt, up to `new_tokens` or the first `end`, which is kept."""
    S = len(prompts)
    M = model.kv_params.pages_for(max(map(len, prompts)) + new_tokens)
    pages = model.kv_params.allocate(S * M, model.mesh)
    table = np.arange(S * M, dtype=np.int32).reshape(S, M)
    tokens = np.concatenate(prompts).astype(np.int32)
    offsets = np.cumsum([0, *map(len, prompts)]).astype(np.int32)
    lengths = np.zeros(S, np.int32)
    chosen = []
    for _ in tqdm(range(new_tokens), desc="continuing", unit="step", mininterval=5):
        (logits,), pages = model(tokens, (pages, lengths, table), None, offsets)
        lengths = lengths + np.diff(offsets)
        tokens, offsets = np.asarray(logits.argmax(-1), np.int32), np.arange(S + 1, dtype=np.int32)
        chosen.append(tokens)
    rows = np.stack(chosen, axis=1).tolist()
    return [row[:row.index(end) + 1] if end in row else row for row in rows]


def parses(head: str, continuation: str, complete: bool) -> bool:
    """Whether head and continuation are Python: all of it if it is `complete`, else as far as its last complete line,
    of which the continuation must hold at least one: the head alone proves nothing."""
    text = head + continuation
    if not complete:
        text = text[:text.rfind("\n") + 1]
    if len(text) <= len(head):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except (SyntaxError, ValueError):
            return False
    return True


def continue_heads(model: DistributedTransformer, tokenizer: tokenizers.Tokenizer, corpus: Corpus, count: int,
                   new_tokens: int = 128, seed: int = 0) -> list[tuple[str, bool]]:
    """Continues `count` function heads that no training file has; each text, and whether it is Python."""
    functions = random.Random(seed).sample(corpus.unseen_functions, count)
    prompts = [tokenizer.encode(function.head).ids for function in functions]
    end = tokenizer.token_to_id(END)
    results = []
    for function, ids in zip(functions, continue_greedily(model, prompts, new_tokens, end), strict=True):
        continuation = tokenizer.decode(ids)
        results.append((function.head + continuation, parses(function.head, continuation, complete=ids[-1] == end)))
    return results


def measure(folder: Path, corpus: Corpus, context: int = CONTEXT, heads: int = 50,
            show: bool = False) -> dict[str, Any]:
    """All figures of the checkpoint in `folder`, by name, the second for so many `heads`; `show` prints those."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = maxlike.load(folder, devices=jax.devices()[:1], dtype="float32")
    continued = continue_heads(model, tokenizer, corpus, heads)
    if show:
        for text, good in continued:
            print(f"# ---- {'Python' if good else 'not Python'}\n{text}")
    return {
        "python": platform.python_version(),
        "held_out_files": len(corpus.held_out),
        "held_out_bytes": sum(len(file.text.encode()) for file in corpus.held_out),
        "bits_per_byte": round(bits_per_byte(model, tokenizer, corpus.held_out, context), 4),
        "xz_bits_per_byte": round(xz_bits_per_byte(corpus.held_out), 4),
        "heads": heads,
        "heads_python": sum(good for _, good in continued),
    }


def main() -> None:
    """Prints the figures, as text or as one JSON object."""
    parser = argparse.ArgumentParser(description="Measure the embedded model on files it was not trained on.")
    parser.add_argument("folder", nargs="?", type=Path, default=EMBEDDED, help="checkpoint; default: the embedded one")
    parser.add_argument("--context", type=int, default=CONTEXT, metavar="TOKENS", help=f"default {CONTEXT}")
    parser.add_argument("--show", action="store_true", help="print the continued functions too")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args()
    figures = measure(args.folder, Corpus.of_standard_library(), args.context, show=args.show)
    print(json.dumps(figures) if args.json else "\n".join(f"{name}: {value}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
