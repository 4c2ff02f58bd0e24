"""The compiled programs of a model, and what they share on the devices: weights, cache, the tokens drawn last.

A step is two programs. The *forward* one, compiled for numbers of tokens, ends at the final norm; the *tail*, compiled
for numbers of rows, has the head and the drawing. So what a request asks of drawing never multiplies the dear
programs, and the tail may wait for a grammar's mask while the forward pass already runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P
from jax.sharding import NamedSharding
from tqdm import tqdm

from maxlike.engine.batch import ROW_FIELDS, ForwardLayout, bucket_for, unpack_rows
from maxlike.engine.config import EngineConfig
from maxlike.engine.sampling import (
    CHUNK,
    Sampled,
    SlotState,
    clear_slot,
    empty_state,
    fill_slot,
    greedy,
    sample,
    score,
)
from maxlike.engine.sampling_params import MAX_EDITS
from maxlike.mesh import compiler_options, mesh_platform
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer

SCORED_ROWS = 64
"""Rows of a prompt whose log-probabilities are worked out at a time."""


class ModelRunner:
    """Runs steps of a model over a cache that it owns.

    The model is split once, into a flat tuple of arrays: handing those to a compiled step costs a fraction of
    what traversing the module does.

    Args:
        model: any; the head is applied to the rows that need it, whatever its `return_logits`.
        config: as `EngineConfig.for_model` gives it.

    `allocate` makes the cache, after `temporary_bytes` has told what the programs need beside it. `n_compiled` counts
    programs, `compile_s` the seconds that `warm_up` took.
    """

    def __init__(self, model: DistributedTransformer, config: EngineConfig):
        assert config.max_num_seqs is not None and config.max_model_len is not None
        self.mesh, self.kv_params, self.vocab_size = model.mesh, model.kv_params, model.vocab_size
        self.platform = mesh_platform(model.mesh)
        self.token_buckets = config.token_buckets(self.platform)
        self.row_buckets = config.row_buckets(self.platform)
        self.n_slots = config.max_num_seqs
        self.pages_per_sequence = self.kv_params.pages_for(config.max_model_len)
        self.mask_words = -(-self.vocab_size // 32)
        self.n_pages, self.n_compiled, self.compile_s = 0, 0, 0.0
        self._programs: dict[tuple[str, int], jax.stages.Compiled] = {}
        self._replicated = NamedSharding(model.mesh, P())
        embedding, state = nnx.split(model.embedding)
        self._row = jax.eval_shape(self._jit(lambda state, ids: nnx.merge(embedding, state)(ids)), state,
                                   jax.ShapeDtypeStruct((1,), jnp.int32))
        self._state_shapes = jax.eval_shape(partial(empty_state, self.n_slots, self.vocab_size))
        self.set_weights(model)

    # -- weights and memory

    def set_weights(self, model: DistributedTransformer) -> None:
        """Goes on with the parameters of `model`, which is of the same structure."""
        self._graphdef, state = nnx.split(model)
        self._leaves, self._treedef = jax.tree.flatten(state)
        # The head alone, so that the tail is not handed every layer. A tied weight is the same array.
        self._head_graphdef, head = nnx.split(model.output)
        self._head_leaves, self._head_treedef = jax.tree.flatten(head)

    def let_go_of_weights(self) -> None:
        """Forgets the arrays, so that those which the model exchanges are freed; `set_weights` is to follow."""
        self._leaves, self._head_leaves = [], []

    @property
    def state_bytes(self) -> int:
        """Bytes on each device of what sampling keeps of the slots."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._state_shapes))

    @property
    def largest_programs(self) -> list[tuple[str, int]]:
        """Those that need most beside weights and cache."""
        programs = [("forward", self.token_buckets[-1]), ("full", self.row_buckets[-1])]
        if self.row_buckets[-1] < SCORED_ROWS:  # then it is a prompt's rows that need most logits
            programs.append(("score", self.token_buckets[-1]))
        return programs

    def temporary_bytes(self) -> int:
        """Bytes on each device that the largest programs need beside weights and cache: compiled, they tell."""
        largest = [self.lower(kind, n, n_pages=1).compile() for kind, n in self.largest_programs]
        self.n_compiled += len(largest)
        return self.state_bytes + max(temporaries_of(compiled) for compiled in largest)

    def allocate(self, n_pages: int) -> None:
        """Makes the cache, of `n_pages` pages a layer, and the state of the slots."""
        self.n_pages = n_pages
        self._pages = self.kv_params.allocate(n_pages, self.mesh)
        self._last_tokens = jax.device_put(np.zeros(self.n_slots, np.int32), self._replicated)
        make = jax.jit(partial(empty_state, self.n_slots, self.vocab_size), out_shardings=self._replicated)
        self._state: SlotState = make()
        self._all_allowed: dict[int, jax.Array] = {}

    # -- programs

    def warm_up(self, progress: bool | None = None) -> None:
        """Compiles all programs there are, with a progress bar (`None`: on a terminal)."""
        wanted = [(kind, n) for n in self.token_buckets for kind in ("forward", "score")]
        wanted += [(kind, n) for n in self.row_buckets for kind in ("greedy", "full")]
        wanted += [("clear", 0), ("fill", 0)]
        start = time.perf_counter()
        wanted = [key for key in wanted if key not in self._programs]
        bar = tqdm(total=len(wanted), desc="compiling", disable=None if progress is None else not progress, leave=False)
        with bar, ThreadPoolExecutor(os.cpu_count()) as threads:  # the compiler leaves the interpreter to others
            compiled = {threads.submit(self.lower(*key).compile): key for key in wanted}
            for future in as_completed(compiled):
                self._programs[compiled[future]] = future.result()
                bar.update()
        self.n_compiled += len(wanted)
        self.compile_s += time.perf_counter() - start
        for n in self.row_buckets:
            self._mask(n, None)

    def layout(self, n_tokens: int) -> ForwardLayout:
        """Of the forward program for `n_tokens`."""
        return ForwardLayout(n_tokens, min(n_tokens, self.n_slots), self.pages_per_sequence)

    def compile(self, kind: str, n: int) -> jax.stages.Compiled:
        """The program of a kind, compiled at the first asking.

        `forward` and `score` are for n tokens, `greedy` and `full` for n rows; of `clear` and `fill` there is one, 0.
        """
        if (kind, n) not in self._programs:
            self._programs[kind, n] = self.lower(kind, n).compile()
            self.n_compiled += 1
        return self._programs[kind, n]

    def lower(self, kind: str, n: int, n_pages: int | None = None) -> jax.stages.Lowered:
        """As `compile`, before the compiler; for a cache of `n_pages`, by default the one that there is."""

        def given(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self._replicated)

        def rows(n: int) -> jax.ShapeDtypeStruct:
            return given(n, self._row.shape[-1], dtype=self._row.dtype)

        state = jax.tree.map(lambda x: given(*x.shape, dtype=x.dtype), self._state_shapes)
        last, last_tokens, scalar = rows(self.n_slots), given(self.n_slots), given()
        if kind == "forward":
            pages = jax.ShapeDtypeStruct(self.kv_params.shape(n_pages or self.n_pages, self.platform),
                                         self.kv_params.dtype, sharding=self.kv_params.sharding(self.mesh))
            layout = self.layout(n)
            return self._jit(partial(self._forward, layout), donate=1).lower(
                self._leaves, pages, last_tokens, given(layout.size))
        if kind == "greedy":
            return self._jit(self._greedy).lower(self._head_leaves, last, last_tokens, given(2, n))
        if kind == "full":
            return self._jit(self._full, donate=3).lower(
                self._head_leaves, last, last_tokens, state, given(2, n), given(n, 1 + len(ROW_FIELDS)),
                given(n, self.mask_words, dtype=jnp.uint32))
        if kind == "score":
            return self._jit(self._score).lower(self._head_leaves, rows(n), given(2, SCORED_ROWS))
        if kind == "clear":
            return self._jit(clear_slot, donate=0).lower(
                state, scalar, given(MAX_EDITS), given(MAX_EDITS, dtype=jnp.float32), given(MAX_EDITS))
        assert kind == "fill", kind
        return self._jit(fill_slot, donate=0).lower(state, scalar, given(CHUNK), scalar, scalar)

    def _jit(self, function: Callable[..., Any], donate: int | tuple[int, ...] = ()) -> Any:
        def within_mesh(*args: Any) -> Any:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return function(*args)

        named = function.func if isinstance(function, partial) else function
        within_mesh.__name__ = named.__name__.lstrip("_")  # profiles call the program by it
        return jax.jit(within_mesh, donate_argnums=donate, compiler_options=compiler_options(self.mesh))

    # -- what the programs compute

    def _forward(self, layout: ForwardLayout, leaves: list[jax.Array], pages: jax.Array, last_tokens: jax.Array,
                 packed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        model = nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))
        tokens, offsets, lengths, table = layout.parts(packed)
        tokens = jnp.where(tokens < 0, last_tokens.at[-1 - tokens].get(mode="clip"), tokens)
        hidden, written = model.hidden_states(tokens, (pages, lengths, table), offsets)
        assert written is not None
        last = hidden.at[offsets[1:] - 1].get(mode="clip")
        return jnp.pad(last, ((0, self.n_slots - layout.n_sequences), (0, 0))), hidden, written

    def _logits(self, head_leaves: list[jax.Array], x: jax.Array) -> jax.Array:
        head = nnx.merge(self._head_graphdef, jax.tree.unflatten(self._head_treedef, head_leaves))
        return head(x).astype(jnp.float32)

    def _greedy(self, head_leaves: list[jax.Array], last: jax.Array, last_tokens: jax.Array,
                where: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows, slots = where
        tokens = greedy(self._logits(head_leaves, last.at[rows].get(mode="clip")))
        return tokens, last_tokens.at[slots].set(tokens, mode="drop")

    def _full(self, head_leaves: list[jax.Array], last: jax.Array, last_tokens: jax.Array, state: SlotState,
              where: jax.Array, drawing: jax.Array, mask: jax.Array) -> tuple[Sampled, jax.Array, SlotState]:
        at, slots = where
        logits = self._logits(head_leaves, last.at[at].get(mode="clip"))
        sampled, state = sample(logits, unpack_rows(drawing, slots, self.n_slots), state, mask)
        return sampled, last_tokens.at[slots].set(sampled.tokens, mode="drop"), state

    def _score(self, head_leaves: list[jax.Array], hidden: jax.Array, where: jax.Array) -> Sampled:
        rows, targets = where
        return score(self._logits(head_leaves, hidden.at[rows].get(mode="clip")), targets)

    # -- steps

    def forward(self, layout: ForwardLayout, packed: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """The layers over a step's tokens: `(last [slots, D], hidden [T, D])`, still being computed.

        `last` has each sequence's last row, in the order of the step.

        Args:
            layout: that of the program, as `layout` gives it for a number in `token_buckets`.
            packed: `int32[layout.size]`, the step's numbers, as `ForwardLayout.pack` gives them.
        """
        program = self.compile("forward", layout.n_tokens)
        last, hidden, self._pages = program(self._leaves, self._pages, self._last_tokens, packed)
        return last, hidden

    def draw_greedily(self, last: jax.Array, where: np.ndarray) -> jax.Array:
        """The likeliest token of the rows in `where` (see `pack_rows`): `int32[R]`, still being computed."""
        program = self.compile("greedy", where.shape[1])
        tokens, self._last_tokens = program(self._head_leaves, last, self._last_tokens, where)
        return tokens

    def draw(self, last: jax.Array, where: np.ndarray, drawing: np.ndarray, mask: np.ndarray | None) -> Sampled:
        """A token of each row, as its request asks, with its log-probability.

        Args:
            last: `[slots, D]`, what `forward` returned.
            where: `int32[2, R]`, as `pack_rows` gives it.
            drawing: `int32[R, 1 + len(ROW_FIELDS)]`, as `pack_drawing` gives it.
            mask: `uint32[R, V / 32]`, bit `t % 32` of word `t // 32` is token t's; `None`: all are allowed.
        """
        program = self.compile("full", where.shape[1])
        sampled, self._last_tokens, self._state = program(
            self._head_leaves, last, self._last_tokens, self._state, where, drawing, self._mask(where.shape[1], mask))
        return sampled

    def score(self, hidden: jax.Array, rows: np.ndarray, targets: np.ndarray) -> Sampled:
        """Log-probability and rank of tokens, each behind its row of `hidden`.

        Args:
            hidden: `[T, D]`, what `forward` returned.
            rows, targets: `int32[C]`, C at most `SCORED_ROWS`: rows of `hidden`, and the tokens behind them.
        """
        where = np.zeros((2, SCORED_ROWS), np.int32)
        where[:, :len(rows)] = rows, targets
        return self.compile("score", hidden.shape[0])(self._head_leaves, hidden, where)

    def enter_slot(self, slot: int, prompt: list[int], output: list[int],
                   edits: list[tuple[int, float, int]]) -> None:
        """Tells the device of a request whose penalties or edits concern it.

        Args:
            slot: the request's.
            prompt, output: its token ids so far.
            edits: token id, what its logit gets, and before which draw.
        """
        ids = np.full(MAX_EDITS, self.vocab_size, np.int32)
        values, until = np.zeros(MAX_EDITS, np.float32), np.zeros(MAX_EDITS, np.int32)
        for i, (token, value, before) in enumerate(edits):
            ids[i], values[i], until[i] = token, value, before
        self._state = self.compile("clear", 0)(self._state, np.int32(slot), ids, values, until)
        known = np.array([*prompt, *output], np.int32)
        for start in range(0, len(known), CHUNK):
            chunk = known[start:start + CHUNK]
            n_prompt = np.int32(np.clip(len(prompt) - start, 0, len(chunk)))
            self._state = self.compile("fill", 0)(
                self._state, np.int32(slot), np.pad(chunk, (0, CHUNK - len(chunk))), n_prompt, np.int32(len(chunk)))

    def _mask(self, n_rows: int, mask: np.ndarray | None) -> jax.Array | np.ndarray:
        if mask is not None:
            return mask
        if n_rows not in self._all_allowed:
            ones = np.full((n_rows, self.mask_words), 2**32 - 1, np.uint32)
            self._all_allowed[n_rows] = jax.device_put(ones, self._replicated)
        return self._all_allowed[n_rows]

    def token_bucket(self, n: int) -> int:
        """The number of tokens of the program that takes `n`."""
        return bucket_for(n, self.token_buckets)

    def row_bucket(self, n: int) -> int:
        """The number of rows of the tail that takes `n`."""
        return bucket_for(n, self.row_buckets)


def temporaries_of(compiled: jax.stages.Compiled) -> int:
    """Bytes on each device that a program needs beside what it is given, its results included."""
    memory: Any = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
