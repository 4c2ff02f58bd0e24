"""Which token comes next, decided on the device: masks, penalties, edits, then the likeliest or a draw within limits.

Nothing here sorts the vocabulary. A limit keeps the largest of a row's values, and where they end is found by halving
the range of float32 until one value is left: 32 times over, count what lies above the middle. Ties are cut exactly too.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from maxlike.engine.sampling_params import MAX_EDITS, MAX_LOGPROBS

CHUNK = 512
"""Token ids that one `fill_slot` counts."""
_Column = Any  # a jax.Array where it is traced, a numpy array where the host fills it in
# Rows taken at a time. What is made on the way of 256 rows at once would be a gigabyte that the cache cannot have; on
# the CPU, where each run asks the system for its memory anew, some megabytes already take longer than the work on them.
_BLOCK, _CPU_BLOCK = 64, 4
_LEAST = -(2**31)
_REACHED = 1 - 2**-22  # of top_p: probabilities are float32, and nine tenths of one need not add up to its 0.9


class SlotState(NamedTuple):
    """What is remembered of the requests that run, a row for each slot; the tail program takes it donated.

    Only rows of `Rows` that ask for penalties or edits read theirs: a slot needs `clear_slot` and `fill_slot` just when
    such a request enters it.

    Args:
        history: `int32[slots, V]`, twice how often a token stands in the output, and 1 more if it does in the prompt.
        edit_ids: `int32[slots, MAX_EDITS]`, tokens treated apart; V or more: none.
        edit_values: `float32[slots, MAX_EDITS]`, added to their logits; `-inf` forbids.
        edit_until: `int32[slots, MAX_EDITS]`: the edit applies to draws with a lower number.
    """

    history: jax.Array
    edit_ids: jax.Array
    edit_values: jax.Array
    edit_until: jax.Array


class Rows(NamedTuple):
    """What is asked for each row of the logits: arrays of length R, named and meant as in `SamplingParams`.

    Args:
        slots: int32, the row of `SlotState`; as many as there are slots, or more, for padding.
        temperature, top_p, min_p, repetition, frequency, presence: float32.
        top_k: int32; 0 is all.
        seed: `uint32[R, 2]`, as `seed_words` makes it.
        draw: int32, number of the output token, the first being 0. With the seed it decides the random numbers.
        live: bool; false for padding, whose token means nothing.
        edited: bool, whether the slot's edits are looked at.
        masked: bool, whether the row of `mask` is.
        logprobs: bool, whether they are reported.
    """

    slots: _Column
    temperature: _Column
    top_k: _Column
    top_p: _Column
    min_p: _Column
    repetition: _Column
    frequency: _Column
    presence: _Column
    seed: _Column
    draw: _Column
    live: _Column
    edited: _Column
    masked: _Column
    logprobs: _Column


class Sampled(NamedTuple):
    """The tokens, and how likely the model found them, before anything was done to its logits.

    Where no row asked for logprobs, all but `tokens` is zeros. A vocabulary of fewer than 20 has fewer alternatives.

    Args:
        tokens: `int32[R]`.
        logprob: `float32[R]`, natural logarithm.
        rank: `int32[R]`, 1 + how many tokens have a higher logit.
        top_ids, top_logprobs: `int32[R, 20]` and `float32[R, 20]`, the likeliest first, of equals the lower id.
    """

    tokens: jax.Array
    logprob: jax.Array
    rank: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def seed_words(seed: int) -> tuple[int, int]:
    """The two words, high and low, of a seed of up to 64 bits, negative ones as two's complement."""
    return seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF


def empty_state(n_slots: int, vocab_size: int) -> SlotState:
    """State of `n_slots` slots that have no edits and no history."""
    edits = n_slots, MAX_EDITS
    return SlotState(jnp.zeros((n_slots, vocab_size), jnp.int32), jnp.full(edits, vocab_size, jnp.int32),
                     jnp.zeros(edits, jnp.float32), jnp.zeros(edits, jnp.int32))


def clear_slot(state: SlotState, slot: jax.Array, edit_ids: jax.Array, edit_values: jax.Array,
               edit_until: jax.Array) -> SlotState:
    """Forgets the slot's history and sets its edits.

    Args:
        state: donated, it is changed in place.
        slot: int32.
        edit_ids, edit_values, edit_until: `[MAX_EDITS]`, as a row of `SlotState` has them.
    """
    def put(rows: jax.Array, row: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(rows, row, slot, 0)

    nothing = jnp.zeros(state.history.shape[1:], jnp.int32)
    return SlotState(put(state.history, nothing), put(state.edit_ids, edit_ids), put(state.edit_values, edit_values),
                     put(state.edit_until, edit_until))


def fill_slot(state: SlotState, slot: jax.Array, ids: jax.Array, n_prompt: jax.Array, n: jax.Array) -> SlotState:
    """Adds tokens to the slot's history: of `ids`, `int32[CHUNK]`, the first `n_prompt` to the prompt, those behind
    them up to `n` to the output. The prompt comes first. `state`, donated, is changed in place.
    """
    place, beyond = jnp.arange(ids.shape[0]), state.history.shape[1]
    prompt = jnp.where(place < n_prompt, ids, beyond)
    output = jnp.where((place >= n_prompt) & (place < n), ids, beyond)
    history = state.history.at[slot, prompt].max(1, mode="drop")
    return state._replace(history=history.at[slot, output].add(2, mode="drop"))


def greedy(logits: jax.Array) -> jax.Array:
    """The first of each row's highest: `float32[R, V] -> int32[R]`; any token for a row with a NaN."""
    # jnp.argmax, which on XLA:CPU goes pair by pair through values and indices, takes several times as long; and so do
    # reductions of integers. As float32 the ids are exact.
    last = logits.shape[-1] - 1
    highest = jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(logits == highest, jnp.arange(last + 1, dtype=jnp.float32), last), axis=-1)
    return first.astype(jnp.int32)


def score(logits: jax.Array, targets: jax.Array) -> Sampled:
    """How likely given tokens are.

    Args:
        logits: `float32[C, V]`.
        targets: `int32[C]`, the token behind each row.

    Returns:
        For each row its target, that token's log-probability and rank, and the likeliest tokens.
    """
    highest = jnp.max(logits, axis=-1, keepdims=True)
    log_total = jnp.log(jnp.sum(jnp.exp(_below(logits, highest)), axis=-1, keepdims=True))
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    rank = 1 + jnp.sum(logits > chosen, axis=-1, dtype=jnp.int32)
    # The highest must not be taken from the top: with a slice of it XLA:CPU sorts the vocabulary instead.
    top, top_ids = lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    return Sampled(targets, (_below(chosen, highest) - log_total)[:, 0], rank, top_ids.astype(jnp.int32),
                   _below(top, highest) - log_total)


def sample(logits: jax.Array, rows: Rows, state: SlotState, mask: jax.Array) -> tuple[Sampled, SlotState]:
    """A token for each row, all that a request may ask for; what no row asks for takes no time.

    In this order: the mask, penalties, edits; then the highest logit where the temperature is 0, else a draw among the
    tokens that top-k, top-p and min-p leave. Where every token is forbidden, or a logit is NaN, it is any token.

    Args:
        logits: `float32[R, V]`, replicated.
        rows: of R rows.
        state: donated, it is changed in place: the tokens of live rows are counted.
        mask: `uint32[R, ceil(V / 32)]`; bit `i % 32` (the lowest is 0) of word `i // 32` allows token `i`.

    Returns:
        The tokens, and the state to go on with.
    """
    rows = Rows(*map(jnp.asarray, rows))
    sampled = lax.platform_dependent(logits, rows, state, mask, cpu=partial(_in_blocks, _CPU_BLOCK),
                                     default=partial(_in_blocks, _BLOCK))
    slots = jnp.where(rows.live, rows.slots, state.history.shape[0])
    return sampled, state._replace(history=state.history.at[slots, sampled.tokens].add(2, mode="drop"))


def _in_blocks(most: int, logits: jax.Array, rows: Rows, state: SlotState, mask: jax.Array) -> Sampled:
    block = math.gcd(logits.shape[0], most)
    if block == logits.shape[0]:
        return _sample(logits, rows, state, mask)
    blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), (logits, rows, mask))
    sampled = lax.map(lambda block: _sample(block[0], block[1], state, block[2]), blocks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), sampled)


def _sample(logits: jax.Array, rows: Rows, state: SlotState, mask: jax.Array) -> Sampled:
    penalised = rows.live & ((rows.repetition != 1) | (rows.frequency != 0) | (rows.presence != 0))
    edited, masked = rows.live & rows.edited, rows.live & rows.masked

    def adjusted() -> jax.Array:
        x = lax.cond(masked.any(), lambda: _mask(logits, mask, masked), lambda: logits)
        x = lax.cond(penalised.any(), lambda: _penalise(x, rows, state, penalised), lambda: x)
        return lax.cond(edited.any(), lambda: _edit(x, rows, state, edited), lambda: x)

    tokens = _pick(lax.cond((masked | penalised | edited).any(), adjusted, lambda: logits), rows)
    unasked = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(score, logits, tokens))
    return lax.cond((rows.live & rows.logprobs).any(), lambda: score(logits, tokens),
                    lambda: unasked._replace(tokens=tokens))


def _mask(x: jax.Array, mask: jax.Array, masked: jax.Array) -> jax.Array:
    bits = mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    allowed = bits.reshape(x.shape[0], -1)[:, :x.shape[1]] != 0
    return jnp.where(allowed | ~masked[:, None], x, -jnp.inf)


def _penalise(x: jax.Array, rows: Rows, state: SlotState, penalised: jax.Array) -> jax.Array:
    history = state.history.at[rows.slots].get(mode="clip")
    counts = history >> 1
    repetition, frequency, presence = (column[:, None] for column in (rows.repetition, rows.frequency, rows.presence))
    repeated = jnp.where(history > 0, jnp.where(x > 0, x / repetition, x * repetition), x)
    return jnp.where(penalised[:, None], repeated - frequency * counts - presence * (counts > 0), x)


def _edit(x: jax.Array, rows: Rows, state: SlotState, edited: jax.Array) -> jax.Array:
    ids = state.edit_ids.at[rows.slots].get(mode="clip")
    applies = edited[:, None] & (rows.draw[:, None] < state.edit_until.at[rows.slots].get(mode="clip"))
    row = jnp.arange(x.shape[0])[:, None]
    return x.at[row, jnp.where(applies, ids, x.shape[1])].add(state.edit_values.at[rows.slots].get(mode="clip"),
                                                              mode="drop")


def _pick(x: jax.Array, rows: Rows) -> jax.Array:
    draws = rows.live & (rows.temperature > 0)
    return lax.cond(draws.any(), lambda: greedy(jnp.where(draws[:, None], _race(x, rows, draws), x)), lambda: greedy(x))


def _race(x: jax.Array, rows: Rows, draws: jax.Array) -> jax.Array:
    """Values `float32[R, V]` of which the highest is the draw; those of tokens beyond the limits are negative."""
    V = x.shape[1]
    below = _below(x, jnp.max(x, axis=-1, keepdims=True))
    weights = jnp.exp(jnp.where(below == 0, 0, below / rows.temperature[:, None]))
    k = jnp.where(draws & (rows.top_k > 0) & (rows.top_k < V), rows.top_k, V)
    kept = lax.cond((k < V).any(), lambda: _top_k(_ordered(x), k), lambda: jnp.ones(x.shape, bool))
    p = jnp.where(draws, rows.top_p, 1)
    kept = lax.cond((p < 1).any(), lambda: kept & _top_p(jnp.where(kept, weights, 0), _ordered(x), p), lambda: kept)
    kept = kept & (weights >= rows.min_p[:, None])
    # Each token's exponential variable divided by its weight is a waiting time, and the shortest is token i's with
    # probability weights[i] / sum(weights): Gumbel-max, without its logarithms of weights and times.
    return jnp.where(kept, weights / _exponentials(rows.seed, rows.draw, V), -1)


def _exponentials(seed: jax.Array, draw: jax.Array, n: int) -> jax.Array:
    """Standard exponential variables `float32[R, n]`; a row's depend on its seed and draw alone."""
    def words(seed: jax.Array, draw: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), draw)
        # Threefry makes two words at a time, of which jax.random.bits throws one away and a split none.
        return jax.random.key_data(jax.random.split(key, -(-n // 2))).T.reshape(-1)[:n]

    # Small ones win races, so they are the ones that need all the bits.
    uniform = jax.vmap(words)(seed, draw).astype(jnp.float32) * 2.0**-32 + 2.0**-33
    return -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24))


def _below(x: jax.Array, highest: jax.Array) -> jax.Array:
    """`x` less the highest, which even where it is infinite becomes 0."""
    return jnp.where(x == highest, 0, x - highest)


def _ordered(x: jax.Array) -> jax.Array:
    """Integers in the order of the floats: float32 -> int32."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.int32)  # of two zeros neither is the higher
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def _top_k(ordered: jax.Array, k: jax.Array) -> jax.Array:
    """The k highest of each row, of equals the first: `int32[R, V]`, `int32[R]`, `1 <= k <= V` -> `bool[R, V]`."""
    cut, above = _cut(ordered, k, weighted=False)
    equal, wanted = ordered == cut[:, None], k - above

    def first() -> jax.Array:
        early = jnp.where(equal, jnp.arange(equal.shape[1], 0, -1, dtype=jnp.int32), 0)
        return equal & (early >= _cut(early, wanted, weighted=False)[0][:, None])

    surplus = jnp.sum(equal, axis=-1) > wanted
    return (ordered > cut[:, None]) | lax.cond(surplus.any(), first, lambda: equal)


def _top_p(weights: jax.Array, ordered: jax.Array, p: jax.Array) -> jax.Array:
    """The fewest likeliest of each row whose weights make up the share p of all, of equals the first.

    Shares are exact to V / 2**31, which shows only where nearly all tokens are about as likely as each other.

    Args:
        weights: `float32[R, V]`, the highest 1; 0 stays out where p is below 1.
        ordered: `int32[R, V]`, in the order of likelihood.
        p: `float32[R]`.
    """
    # As whole numbers they add up to the same in whatever order, and just so below 2**31.
    unit = jnp.exp2(30 - jnp.ceil(jnp.log2(jnp.sum(weights, axis=-1, keepdims=True))))
    masses = jnp.round(weights * unit).astype(jnp.int32)
    total = jnp.sum(masses, axis=-1, dtype=jnp.int32)
    needed = jnp.clip((total * (p * _REACHED)).astype(jnp.int32), 1, total)
    cut, above = _cut(masses, needed, weighted=True)
    equal = masses == cut[:, None]
    wanted = -((above - needed) // jnp.maximum(cut, 1))
    # Masses are equal sooner than logits are.
    surplus = (p < 1) & (jnp.sum(equal, axis=-1) > wanted)
    equal = lax.cond(
        surplus.any(),
        lambda: equal & _top_k(jnp.where(equal, ordered, _LEAST), jnp.where(surplus, wanted, weights.shape[1])),
        lambda: equal)
    return (masses > cut[:, None]) | equal | (p >= 1)[:, None]


def _cut(values: jax.Array, needed: jax.Array, *, weighted: bool) -> tuple[jax.Array, jax.Array]:
    """The highest `cut` for which a row's values from `cut` upwards come to what is needed, and what those above come
    to: `int32[R, V]`, `int32[R]` -> two of `int32[R]`.

    `weighted`: they come to their sum, and none is negative; otherwise, to their number.
    """
    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        low, high, above = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean without overflow
        counted = jnp.where(values >= middle[:, None], values if weighted else 1, 0)
        comes_to = jnp.sum(counted, axis=-1, dtype=jnp.int32)
        enough = comes_to >= needed
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle), jnp.where(enough, above, comes_to)

    low = jnp.full_like(needed, 0 if weighted else _LEAST)
    cut, _, above = lax.fori_loop(0, 32, halve, (low, jnp.max(values, axis=-1) + 1, jnp.zeros_like(needed)))
    return cut, above
