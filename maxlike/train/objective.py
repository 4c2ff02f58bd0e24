"""What a step minimises: a batch's loss as a sum over its tokens or pairs, and what else is worth knowing of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from maxlike.nn.module import on_mesh_of, rows_of
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer
from maxlike.nn.transformer.segments import CheckpointPolicy
from maxlike.train.batch import Batch
from maxlike.train.loss import cross_entropy, dpo_loss, token_logprobs

Sums = dict[str, jax.Array]
"""float32 scalars: `loss`, which is minimised, `weight`, which it and all others are to be divided by, and others."""


class Objective(Protocol):
    """What a step minimises: a function of a model and a batch, pure, and hashable so that it can be compiled for."""

    def __call__(self, model: DistributedTransformer, batch: Any, remat: CheckpointPolicy | None) -> Sums:
        """The sums over one (micro-)batch, float32 scalars by name, `loss` and `weight` among them.

        Args:
            model: in the step's dtype.
            batch: what the objective is for, on the mesh.
            remat: what is kept for the backward pass, for `model.hidden_states`.
        """
        ...


@dataclass(frozen=True)
class SupervisedObjective:
    """Cross entropy of a `Batch`'s targets, by their weights: `loss`, `nll`, `accuracy` and `weight`.

    Args:
        z_loss, chunk: see `cross_entropy`.
    """

    z_loss: float = 0.0
    chunk: int | None = None

    def __call__(self, model: DistributedTransformer, batch: Batch, remat: CheckpointPolicy | None) -> Sums:
        """As `Objective`."""
        hidden, _ = model.hidden_states(batch.tokens, None, batch.row_offsets, remat)
        sums = cross_entropy(model, hidden, jnp.asarray(batch.targets), jnp.asarray(batch.weights),
                             z_loss=self.z_loss, chunk=self.chunk)
        return dict(loss=sums.loss, nll=sums.nll, accuracy=sums.correct, weight=sums.weight)


def sequence_logprobs(model: DistributedTransformer, batch: Batch, remat: CheckpointPolicy | None = None, *,
                      chunk: int | None = None) -> jax.Array:
    """Of each sequence the weighted sum of its targets' log-probabilities: `float32[R, S]`, sharded over R.

    Args:
        model: whose probabilities they are.
        batch: on the model's mesh.
        remat: as `DistributedTransformer.hidden_states` has it.
        chunk: as `token_logprobs` has it.
    """
    hidden, _ = model.hidden_states(batch.tokens, None, batch.row_offsets, remat)
    logprobs = jnp.asarray(batch.weights) * token_logprobs(model, hidden, jnp.asarray(batch.targets), chunk=chunk)
    shards = batch.row_offsets.shape[0]
    logprobs = jnp.reshape(logprobs, (shards, -1), out_sharding=on_mesh_of(logprobs, rows_of(logprobs), None))
    token = jnp.arange(logprobs.shape[1], dtype=jnp.int32)
    first, end = batch.row_offsets[:, :-1, None], batch.row_offsets[:, 1:, None]
    # Not a difference of running sums: a long batch's would leave few digits to a short sequence.
    return jnp.sum(jnp.where((first <= token) & (token < end), logprobs[:, None], 0), axis=2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreferenceBatch:
    """Pairs: sequence `2i` of each shard was chosen over sequence `2i + 1`, for the same prompt.

    Args:
        batch: S is even, and sequences that are not there are empty; weights are 0 in the prompts.
        reference_logprobs: `float32[R, S]`, each sequence's by the reference model (`make_scoring_step`).
    """

    batch: Batch
    reference_logprobs: Any


@dataclass(frozen=True)
class PreferenceObjective:
    """Direct preference optimisation on a `PreferenceBatch`; `weight` counts the pairs.

    Beside `loss` it tells `accuracy`, how often the policy prefers the chosen one by more than the reference does, and
    `reward_chosen`, `reward_rejected` and `reward_margin`, rewards being `beta` times what the policy's log-probability
    is above the reference's.

    Args:
        beta, label_smoothing, kind: see `dpo_loss`.
        chunk: see `token_logprobs`.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    kind: str = "sigmoid"
    chunk: int | None = None

    def __call__(self, model: DistributedTransformer, batch: PreferenceBatch, remat: CheckpointPolicy | None) -> Sums:
        """As `Objective`.

        Raises:
            ValueError: S is odd, or a field is out of range.
        """
        offsets = jnp.asarray(batch.batch.row_offsets)
        if offsets.shape[1] % 2 == 0:
            raise ValueError("Sequences must come in pairs, chosen and rejected; row_offsets has shape "
                             f"{offsets.shape}, which is {offsets.shape[1] - 1} sequences a shard.")
        policy = _pairs(sequence_logprobs(model, batch.batch, remat, chunk=self.chunk))
        reference = jax.lax.stop_gradient(_pairs(batch.reference_logprobs))
        loss = dpo_loss(policy[..., 0] - policy[..., 1], reference[..., 0] - reference[..., 1], beta=self.beta,
                        label_smoothing=self.label_smoothing, kind=self.kind)
        there = jnp.all(_pairs(offsets[:, 1:] > offsets[:, :-1]), axis=2)
        rewards = jax.lax.stop_gradient(self.beta * (policy - reference))
        margin = rewards[..., 0] - rewards[..., 1]

        def total(values: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(there, values, 0), dtype=jnp.float32)

        return dict(loss=total(loss), weight=total(there), accuracy=total(margin > 0), reward_margin=total(margin),
                    reward_chosen=total(rewards[..., 0]), reward_rejected=total(rewards[..., 1]))


def _pairs(values: jax.Array) -> jax.Array:
    """`[R, S] -> [R, S / 2, 2]`."""
    shape = values.shape[0], values.shape[1] // 2, 2
    return jnp.reshape(values, shape, out_sharding=on_mesh_of(values, rows_of(values), None, None))
