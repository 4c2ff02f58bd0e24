"""Losses on a model's hidden states, without the logits of all tokens ever being there.

A head's logits are the largest array of a training step: float32[8192, 128256] is 4 GB. Here they are worked out for
a chunk of tokens at a time, and so is their derivative. `cross_entropy` knows what its derivative will be multiplied
by, a number, and therefore takes it in the same pass as the loss (https://arxiv.org/abs/2410.10989, section 3.2), so
that each chunk's logits are worked out once; `token_logprobs` works them out again on the way back.

The vocabulary may be cut over the mesh: the softmax's maximum and sum, and the target's logit, are reduced over it,
the logits stay where they are. Tokens may be cut as well: each shard walks through its own chunks, and the head's
gradient is summed over the shards once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from maxlike.nn.module import gathered, on_mesh_of, rows_of
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer

_CHUNK_LOGITS = 2**25
"""Logits of a chunk on one device: 128 MB in float32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossSums:
    """Sums over a batch's tokens, float32 scalars. Divided by `weight` they are means.

    Args:
        loss: what is to be minimised, `nll + z`; the only one that has a derivative.
        nll: negative log-probabilities of the targets, in nats, weighted.
        z: the z-loss, weighted.
        weight: of all targets.
        correct: weight of the targets than which no token is likelier.
    """

    loss: jax.Array
    nll: jax.Array
    z: jax.Array
    weight: jax.Array
    correct: jax.Array


def cross_entropy(model: DistributedTransformer, hidden: jax.Array, targets: jax.Array, weights: jax.Array, *,
                  z_loss: float = 0.0, chunk: int | None = None) -> LossSums:
    """The weighted sum over tokens of `-log p(target) + z_loss * log(Z)^2`, Z the softmax's denominator.

    The second term (PaLM, https://arxiv.org/abs/2204.02311, section 5) keeps logits from drifting. Differentiable in
    `hidden` and the head's parameters; the softmax is float32 over logits in the model's dtype.

    Args:
        hidden: `[T, D]`, what `model.hidden_states` returns; T may be cut over devices, then the others alike.
        targets: `int32[T]`, in the vocabulary.
        weights: `float32[T]`.
        chunk: tokens, of each shard, whose logits there are at a time; `None`: as many as take 128 MB.

    Raises:
        ValueError: shapes do not fit, or `chunk` is below 1.
    """
    head, leaves = _head(model, hidden, targets, chunk)
    if weights.shape != targets.shape:
        raise ValueError(f"Each target needs a weight: got shapes {targets.shape} and {weights.shape}.")
    loss, statistics = _weighted_loss(head, z_loss, leaves, hidden, targets, weights)
    nll, log_z, correct = jax.lax.stop_gradient(statistics)
    return LossSums(loss, jnp.sum(weights * nll), z_loss * jnp.sum(weights * jnp.square(log_z)), jnp.sum(weights),
                    jnp.sum(weights * correct))


def token_logprobs(model: DistributedTransformer, hidden: jax.Array, targets: jax.Array, *,
                   chunk: int | None = None) -> jax.Array:
    """`log p(target)` of each token, `float32[T]`; derivative and errors as `cross_entropy`'s.

    Args:
        model, hidden, targets, chunk: as `cross_entropy` has them.
    """
    head, leaves = _head(model, hidden, targets, chunk)
    return _logprobs(head, leaves, hidden, targets)


def dpo_loss(margins: jax.Array, reference_margins: jax.Array, *, beta: float, label_smoothing: float = 0.0,
             kind: str = "sigmoid") -> jax.Array:
    """The loss of preference pairs, `float32[...]`, one a pair.

    With `h` the margin less the reference's, `sigmoid` is `-log sigmoid(beta h)` (DPO, Rafailov et al. 2023,
    https://arxiv.org/abs/2305.18290, eq. 7), and with label smoothing e, the chance that a pair is labelled the wrong
    way round, `(1 - e)` of it and `e` of that of `-h` (https://ericmitchell.ai/cdpo.pdf); `ipo` is
    `(h - 1 / (2 beta))^2` (https://arxiv.org/abs/2310.12036, eq. 17).

    Args:
        margins: `float32[...]`: the chosen sequence's log-probability, summed over its tokens, less the rejected one's.
        reference_margins: the same by the model that was there before.

    Raises:
        ValueError: `kind` is neither, `beta` not above 0, or `label_smoothing` not from 0 to below 0.5, or not 0
            with `ipo`.
    """
    if kind not in ("sigmoid", "ipo"):
        raise ValueError(f"The kind of loss is {kind!r}; expected 'sigmoid' or 'ipo'.")
    if not beta > 0:
        raise ValueError(f"beta is {beta}; expected a number above 0.")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and kind == "ipo"):
        raise ValueError(f"label_smoothing is {label_smoothing} for the kind {kind!r}; expected 0 to below 0.5, and 0 "
                         "with 'ipo'.")
    h = margins - reference_margins
    if kind == "ipo":
        return jnp.square(h - 1 / (2 * beta))
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(beta * h) - label_smoothing * jax.nn.log_sigmoid(-beta * h)


@dataclass(frozen=True)
class _Head:
    """What of a head is no array, and how its work is cut. Its arrays go beside it, as a tuple of leaves."""

    graphdef: nnx.GraphDef
    tree: jax.tree_util.PyTreeDef
    vocab_size: int
    chunk: int

    def logits(self, leaves: Sequence[jax.Array], hidden: jax.Array) -> jax.Array:
        """`float32[c, rows]`, cut over the vocabulary as the head is; rows from `vocab_size` on are padding."""
        return nnx.merge(self.graphdef, self.tree.unflatten(leaves)).ungathered(hidden).astype(jnp.float32)

    def statistics(self, logits: jax.Array, targets: jax.Array) -> Statistics:
        logits = jnp.where(_ids(logits) < self.vocab_size, logits, -jnp.inf)
        top = jnp.max(logits, axis=1)
        log_z = top + jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), axis=1))
        # By comparison: a sharded axis cannot be indexed.
        chosen = jnp.sum(jnp.where(_ids(logits) == targets[:, None], logits, 0), axis=1)
        return log_z - chosen, log_z, (chosen >= top).astype(jnp.float32)

    def gradient(self, logits: jax.Array, targets: jax.Array, log_z: jax.Array, weights: jax.Array,
                 z_loss: float) -> jax.Array:
        """Of the weighted loss in the logits: `weight * (p * (1 + 2 z log(Z)) - [it is the target])`."""
        p = jnp.where(_ids(logits) < self.vocab_size, jnp.exp(logits - log_z[:, None]), 0)
        is_target = _ids(logits) == targets[:, None]
        return p * (weights * (1 + 2 * z_loss * log_z))[:, None] - jnp.where(is_target, weights[:, None], 0)


Statistics = tuple[jax.Array, jax.Array, jax.Array]
"""Of each token, float32: negative log-probability of its target, log(Z), and 1 where no other token is likelier."""


def _head(model: DistributedTransformer, hidden: jax.Array, targets: jax.Array,
          chunk: int | None) -> tuple[_Head, tuple[jax.Array, ...]]:
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden must be [T, D] and targets int32[T]; got shapes {hidden.shape} and {targets.shape}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"A chunk must have at least 1 token; got {chunk}.")
    graphdef, state = nnx.split(model.output)
    leaves, tree = jax.tree.flatten(state)
    if chunk is None:
        logits = jax.eval_shape(lambda x: model.output.ungathered(x), hidden)
        chunk = max(1, _CHUNK_LOGITS // jax.typeof(logits).sharding.shard_shape(logits.shape)[1])
    return _Head(graphdef, tree, model.vocab_size, chunk), tuple(leaves)


def _ids(logits: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1, out_sharding=on_mesh_of(
        logits, *jax.typeof(logits).sharding.spec))


# The custom derivatives. Of their outputs only the loss and the log-probabilities have one.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_loss(head: _Head, z_loss: float, leaves: tuple[jax.Array, ...], hidden: jax.Array, targets: jax.Array,
                   weights: jax.Array) -> tuple[jax.Array, Statistics]:
    statistics = _statistics(head, leaves, hidden, targets)
    return _total(z_loss, statistics, weights), statistics


def _total(z_loss: float, statistics: Statistics, weights: jax.Array) -> jax.Array:
    nll, log_z, _ = statistics
    return jnp.sum(weights * (nll + z_loss * jnp.square(log_z)))


def _weighted_loss_forward(head: _Head, z_loss: float, *primals: Any) -> tuple[Any, Any]:
    arrays, trained = _taken_apart(primals)
    statistics, gradients = _with_gradients(head, z_loss, trained, *arrays)
    return (_total(z_loss, statistics, arrays[-1]), statistics), gradients


def _weighted_loss_backward(head: _Head, z_loss: float, gradients: Any, cotangents: Any) -> Any:
    d_loss = cotangents[0]
    if isinstance(d_loss, jax.custom_derivatives.SymbolicZero):
        gradients = jax.tree.map(jnp.zeros_like, gradients)
    else:
        gradients = jax.tree.map(lambda g: (g * d_loss).astype(g.dtype), gradients)
    return *gradients, None, None


_weighted_loss.defvjp(_weighted_loss_forward, _weighted_loss_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(head: _Head, leaves: tuple[jax.Array, ...], hidden: jax.Array, targets: jax.Array) -> jax.Array:
    return -_statistics(head, leaves, hidden, targets)[0]


def _logprobs_forward(head: _Head, *primals: Any) -> tuple[Any, Any]:
    arrays, trained = _taken_apart(primals)
    # Whether a leaf is trained is told by there being an array, since residuals can be nothing else.
    return _logprobs(head, *arrays), (arrays, tuple(() if of_it else None for of_it in trained))


def _logprobs_backward(head: _Head, saved: Any, d_logprobs: Any) -> Any:
    arrays, trained = saved
    if isinstance(d_logprobs, jax.custom_derivatives.SymbolicZero):
        d_logprobs = jnp.zeros_like(arrays[-1], jnp.float32)
    leaves, hidden, targets = arrays
    _, gradients = _with_gradients(head, 0.0, tuple(of_it is not None for of_it in trained), leaves, hidden, targets,
                                   -d_logprobs)
    return *gradients, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward, symbolic_zeros=True)


def _taken_apart(primals: Any) -> tuple[Any, tuple[bool, ...]]:
    """The arrays, and which of the head's are being differentiated: under LoRA its largest is not."""
    def is_primal(x: Any) -> bool:
        return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)

    arrays = jax.tree.map(lambda x: x.value, primals, is_leaf=is_primal)
    return arrays, tuple(leaf.perturbed for leaf in primals[0])


# The work, chunk by chunk, on each shard of the tokens.


def _statistics(head: _Head, leaves: tuple[jax.Array, ...], hidden: jax.Array, targets: jax.Array) -> Statistics:
    shards = _Shards.of(hidden)

    def local(leaves: tuple[jax.Array, ...], hidden: jax.Array, targets: jax.Array) -> Statistics:
        def body(_: None, chunk: Any) -> tuple[None, Statistics]:
            hidden, targets = chunk
            return None, head.statistics(head.logits(leaves, hidden), targets)

        _, statistics = jax.lax.scan(body, None, _cut(head.chunk, hidden, targets))
        return _joined(statistics, len(targets))

    return shards.map(local, (P(), shards.rows, shards.rows), shards.rows)(shards.gather(leaves), hidden, targets)


def _with_gradients(head: _Head, z_loss: float, trained: tuple[bool, ...], leaves: tuple[jax.Array, ...],
                    hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
    """The statistics, and the weighted loss's gradients in (leaves, `None` where not trained; hidden)."""
    shards = _Shards.of(hidden)

    def local(leaves: tuple[jax.Array, ...], hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
        def body(sums: Any, chunk: Any) -> tuple[Any, Any]:
            hidden, targets, weights = chunk

            def logits_of(some: Sequence[jax.Array | None], hidden: jax.Array) -> jax.Array:
                return head.logits([leaf if it is None else it for it, leaf in zip(some, leaves, strict=True)], hidden)

            logits, pull = jax.vjp(logits_of, _only(trained, leaves), hidden)
            statistics = head.statistics(logits, targets)
            d_leaves, d_hidden = pull(head.gradient(logits, targets, statistics[1], weights, z_loss))
            # Added up in float32, in whatever dtype each chunk's are.
            return jax.tree.map(lambda total, d: total + d.astype(jnp.float32), sums, d_leaves), (statistics, d_hidden)

        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), _only(trained, leaves))
        sums, (statistics, d_hidden) = jax.lax.scan(body, zeros, _cut(head.chunk, hidden, targets, weights))
        return _joined(statistics, len(targets)), jax.tree.map(lambda total: total[None], sums), (
            _joined(d_hidden, len(targets)))

    statistics, sums, d_hidden = shards.map(
        local, (P(), shards.rows, shards.rows, shards.rows), shards.rows)(
            shards.gather(leaves), hidden, targets, weights)
    return statistics, (tuple(None if total is None else shards.scatter(total, leaf).astype(leaf.dtype)
                              for total, leaf in zip(sums, leaves, strict=True)), d_hidden)


def _only(trained: tuple[bool, ...], items: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(item if of_it else None for of_it, item in zip(trained, items, strict=True))


def _cut(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`[T, ...] -> [chunks, c, ...]`, of as equal a size as can be; zeros fill the last."""
    tokens = len(arrays[0])
    chunks = max(1, -(-tokens // chunk))
    size = -(-tokens // chunks)
    return tuple(jnp.pad(x, [(0, chunks * size - tokens)] + [(0, 0)] * (x.ndim - 1)).reshape(
        chunks, size, *x.shape[1:]) for x in arrays)


def _joined(arrays: Any, tokens: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:tokens], arrays)


@dataclass(frozen=True)
class _Shards:
    """The mesh axes that T is cut over.

    On those axes the work is written for one shard, since a chunk is to be a part of each shard's tokens, not of all;
    on the other axes, the vocabulary's, arrays are as everywhere.
    """

    mesh: Any
    axes: tuple[str, ...]

    @classmethod
    def of(cls, hidden: jax.Array) -> _Shards:
        entry = rows_of(hidden) or ()
        return cls(jax.typeof(hidden).sharding.mesh, entry if isinstance(entry, tuple) else (entry,))

    @property
    def rows(self) -> P:
        return P(self.axes or None)

    def map(self, local: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        if not self.axes:
            return local
        return jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs,
                             axis_names=set(self.axes), check_vma=False)

    def gather(self, leaves: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """The leaves whole, where each shard stores a part."""
        return tuple(gathered(leaf, *(None if entry in self.axes else entry for entry in
                                      jax.typeof(leaf).sharding.spec)) for leaf in leaves)

    def scatter(self, sums: jax.Array, leaf: jax.Array) -> jax.Array:
        """What each of R shards has as a leaf's gradient, `[R, ...]`, added up and sharded as the leaf is."""
        if not self.axes:
            return sums[0]
        spec = jax.typeof(leaf).sharding.spec

        def add(sums: jax.Array) -> jax.Array:
            total = sums[0]
            for dimension, entry in enumerate(spec):
                if entry in self.axes:
                    total = jax.lax.psum_scatter(total, entry, scatter_dimension=dimension, tiled=True)
            rest = tuple(axis for axis in self.axes if axis not in spec)
            return jax.lax.psum(total, rest) if rest else total

        return jax.shard_map(add, mesh=self.mesh, in_specs=jax.typeof(sums).sharding.spec, out_specs=spec,
                             check_vma=False)(sums)
