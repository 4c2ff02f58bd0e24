"""Trains the embedded model from scratch: `python scripts/train_tiny.py --minutes 56`.

A small Llama on the source of the running Python's standard library. Whole files teach it how files go on, and short
functions, each a document of its own, that a function's head is followed by a body and an end. Matrices are
optimised by Muon, embedding and norms by Adam (https://arxiv.org/abs/2502.16982, which scales the two alike).
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from eval_tiny import EMBEDDED, bits_per_byte, measure, token_losses
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon
from tiny_corpus import BEGIN, END, Corpus, encode_documents, functions_of, train_tokenizer, write_tokenizer

from maxlike.mesh import ShardingRules, make_mesh
from maxlike.models.build import build_model
from maxlike.models.checkpoint import save_model
from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.nn.rotary_embedding import RotaryEmbedding

MINUTES = 56.0  # and measuring what came out takes a few more
REPLICATED = ShardingRules(heads=(), kv_heads=(), mlp=(), vocab=())
"""Muon multiplies a matrix by its own transpose, which a dimension that lies on a mesh axis does not allow."""


@dataclass(frozen=True)
class Recipe:
    """How the model is made and trained.

    Args:
        batch_tokens: T of a step.
        window: tokens that a file is cut into; a file in `1 / long_every` is cut into `long_window` instead, so that
            far positions are known too.
        function_share: share of the tokens that are single functions, of at most `function_tokens` tokens each.
        learning_rate: reached after `warmup` of the run, from where it falls in a straight line to 0.
    """

    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    max_position_embeddings: int = 2048
    batch_tokens: int = 4096
    window: int = 512
    long_window: int = 2048
    long_every: int = 5
    function_share: float = 0.2
    function_tokens: int = 150
    learning_rate: float = 6e-3
    warmup: float = 0.03
    weight_decay: float = 0.1

    def config(self, tokenizer: tokenizers.Tokenizer) -> TransformerConfig:
        """The model's description, its vocabulary the tokenizer's."""
        head_dim = self.hidden_size // self.heads
        return TransformerConfig(
            "llama", tokenizer.get_vocab_size(), self.hidden_size, self.intermediate_size, self.heads, self.kv_heads,
            head_dim, (LayerConfig(RotaryEmbedding(head_dim)),) * self.layers, self.max_position_embeddings,
            tie_word_embeddings=True, bos_token_id=tokenizer.token_to_id(BEGIN),
            eos_token_ids=(tokenizer.token_to_id(END),))

    def rate_at(self, progress: float) -> float:
        """The learning rate when `progress` of the run, 0 to 1, is done."""
        return self.learning_rate * min(progress / self.warmup, (1 - progress) / (1 - self.warmup), 1.0)


@dataclass(frozen=True)
class Batch:
    """One step's data: `tokens` and `targets` `int32[T]`, `row_offsets` `int32[S + 1]`; T is always full."""

    tokens: np.ndarray
    targets: np.ndarray
    row_offsets: np.ndarray


def windows(documents: Sequence[np.ndarray], rng: np.random.Generator, recipe: Recipe) -> Iterator[np.ndarray]:
    """The documents cut into windows, for ever, in an order and at places that differ from round to round.

    A window holds one token more than it has inputs: the target of the last one.
    """
    while True:
        pieces = []
        for document in documents:
            size = recipe.long_window if rng.integers(recipe.long_every) == 0 else recipe.window
            starts = [0, *range(int(rng.integers(1, size + 1)), len(document) - 1, size)]
            pieces += [document[a:b + 1] for a, b in itertools.pairwise([*starts, len(document) - 1])]
        yield from (pieces[i] for i in rng.permutation(len(pieces)))


def shuffled(documents: Sequence[np.ndarray], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The documents whole, for ever, in a new order each round."""
    while True:
        yield from (documents[i] for i in rng.permutation(len(documents)))


def batches(files: Sequence[np.ndarray], functions: Sequence[np.ndarray], rng: np.random.Generator,
            recipe: Recipe) -> Iterator[Batch]:
    """Batches without padding, for ever: what no longer fits into one is the beginning of the next."""
    streams = windows(files, rng, recipe), shuffled(functions, rng)
    given = [0, 0]  # tokens from each
    rest = np.zeros(0, np.int32)
    T, S = recipe.batch_tokens, max(1, recipe.batch_tokens // 8)
    while True:
        inputs: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        room = T
        while room:
            if len(rest) < 2:
                kind = int(given[1] < recipe.function_share * sum(given))
                rest = next(streams[kind])
                given[kind] += len(rest) - 1
                continue
            n = min(room, len(rest) - 1)
            inputs.append(rest[:n])
            targets.append(rest[1:n + 1])
            rest, room = rest[n:], room - n
        offsets = np.cumsum([0, *map(len, inputs)])
        if len(inputs) > S:
            raise ValueError(f"{len(inputs)} documents fell into a batch of {T} tokens; there is room for {S}. "
                             "Documents of so few tokens teach nothing: leave them out.")
        yield Batch(np.concatenate(inputs), np.concatenate(targets),
                    np.pad(offsets, (0, S - len(inputs)), mode="edge").astype(np.int32))


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Updates for a learning rate of 1: the step multiplies them by the rate of the moment."""
    def dimensions(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: MuonDimensionNumbers() if x.ndim == 2 and "embedding" not in str(path) else None, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(1.0, weight_decay=recipe.weight_decay, adam_b2=0.95, consistent_rms=0.2,
             muon_weight_dimension_numbers=dimensions))


def make_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """`(params, opt_state, batch arrays..., rate) -> (params, opt_state, mean loss in nats)`, compiled; the first
    two are donated."""
    def loss_of(params: nnx.State, *batch: jax.Array) -> jax.Array:
        return token_losses(nnx.merge(graphdef, params), *batch).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: nnx.State, opt_state: Any, tokens: jax.Array, targets: jax.Array, row_offsets: jax.Array,
             rate: jax.Array) -> tuple[nnx.State, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(params, tokens, targets, row_offsets)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return jax.tree.map(lambda p, u: p + rate * u, params, updates), opt_state, loss

    return step


def save(graphdef: nnx.GraphDef, params: nnx.State, config: TransformerConfig, tokenizer: tokenizers.Tokenizer,
         folder: Path) -> None:
    """Writes the checkpoint, its weights in bfloat16."""
    rounded = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    save_model(rounded, config, folder)
    write_tokenizer(tokenizer, folder, config.max_position_embeddings)


def train(corpus: Corpus, recipe: Recipe, folder: Path, *, minutes: float | None = None, steps: int | None = None,
          seed: int = 0, save_every: float = 600.0) -> None:
    """Trains for `minutes` or for `steps`, whichever is given, and leaves a checkpoint in `folder`.

    The schedule follows the clock when minutes are given, which count from the call, the tokenizer's training
    included: a machine busy with other things ends with the rate at 0 as well.

    Args:
        save_every: seconds from one checkpoint, and measurement on held-out text, to the next.

    Raises:
        ValueError: neither or both of `minutes` and `steps` are given, or not above 0.
    """
    limit = minutes if steps is None else steps
    if limit is None or limit <= 0 or None not in (minutes, steps):
        raise ValueError(f"Give either minutes or steps, above 0; got minutes={minutes} and steps={steps}.")
    begun = time.perf_counter()
    tokenizer = train_tokenizer((file.text for file in corpus.training), recipe.vocab_size)
    files = [np.array(ids, np.int32) for ids in encode_documents(tokenizer, [f.text for f in corpus.training])]
    texts = sorted({function.text for file in corpus.training for function in functions_of(file.text)})
    functions = [np.array(ids, np.int32) for ids in encode_documents(tokenizer, texts)
                 if 16 <= len(ids) <= recipe.function_tokens]
    print(f"{sum(map(len, files)):,} tokens in {len(files)} files, {sum(map(len, functions)):,} in {len(functions)} "
          f"functions, {time.perf_counter() - begun:.0f} s", flush=True)

    config = recipe.config(tokenizer)
    mesh = make_mesh(jax.devices()[:1])
    model = build_model(config, devices=mesh, dtype="float32", use_subgraphs=False, rules=REPLICATED,
                        rngs=nnx.Rngs(seed))
    graphdef, params = nnx.split(model)
    optimizer = make_optimizer(recipe)
    opt_state = optimizer.init(params)
    step = make_step(graphdef, optimizer)
    sample = corpus.held_out[::24]
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters", flush=True)

    shown = saved = time.perf_counter()
    losses: list[float] = []
    for number, batch in enumerate(batches(files, functions, np.random.default_rng(seed), recipe)):
        progress = (number if minutes is None else (time.perf_counter() - begun) / 60) / limit
        if progress >= 1:
            break
        params, opt_state, loss = step(params, opt_state, batch.tokens, batch.targets, batch.row_offsets,
                                       np.float32(recipe.rate_at(progress)))
        losses.append(float(loss))  # waits: the clock that the schedule follows is that of finished steps
        now = time.perf_counter()
        if now - shown > 20 or number == 0:
            speed = len(losses) * recipe.batch_tokens / (now - shown)
            print(f"step {number + 1}, {100 * progress:.1f} %, {(number + 1) * recipe.batch_tokens:,} tokens, "
                  f"{speed:,.0f} tok/s, loss {np.mean(losses):.4f} nats", flush=True)
            losses, shown = [], now
        if now - saved > save_every:
            save(graphdef, params, config, tokenizer, folder)
            figure = bits_per_byte(nnx.merge(graphdef, params), tokenizer, sample)
            print(f"saved; {figure:.4f} bits per byte on {len(sample)} held-out files", flush=True)
            saved = time.perf_counter()
    save(graphdef, params, config, tokenizer, folder)
    print(f"{number} steps, {number * recipe.batch_tokens:,} tokens, {(time.perf_counter() - begun) / 60:.1f} minutes",
          flush=True)


def main() -> None:
    """Trains, then measures what came out as `eval_tiny.py` does."""
    parser = argparse.ArgumentParser(description="Train the embedded model on the standard library's source.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help=f"how long to train; default {MINUTES:.0f}")
    length.add_argument("--steps", type=int, help="train so many steps instead")
    parser.add_argument("--output", type=Path, default=EMBEDDED, metavar="FOLDER", help="default: maxlike/embedded")
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate, metavar="RATE",
                        help=f"the highest; default {Recipe.learning_rate}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    minutes = MINUTES if args.minutes is None and args.steps is None else args.minutes
    corpus = Corpus.of_standard_library()
    recipe = replace(Recipe(), learning_rate=args.learning_rate)
    train(corpus, recipe, args.output, minutes=minutes, steps=args.steps, seed=args.seed)
    for name, value in measure(args.output, corpus).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
