"""Loss and every gradient of a packed batch are those of `transformers` and torch's autograd.

There each sequence is run on its own, so that neither packing nor masks can be wrong in the same way on both sides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import maxlike
from maxlike.mesh import make_mesh
from maxlike.models.family import hf_name
from maxlike.models.registry import family_of
from maxlike.nn.transformer.segments import named_parameters
from maxlike.train.batch import Batch
from maxlike.train.objective import SupervisedObjective, sequence_logprobs
from maxlike.train.step import REMAT_POLICIES, place_batch
from tests.models.checkpoints import FAMILIES, config_of

LENGTHS = [[5, 21, 1], [17, 8]]  # of two shards; the second has a sequence fewer, and more padding
ROOM = 32  # tokens of a shard
V = 1003
HOW: dict[str, dict[str, Any]] = {  # each family another way; every one of them is exact
    "llama": dict(axes={"fsdp": 2}, n=4, use_subgraphs=True, remat="full", chunk=5),
    "mistral": dict(axes={"data": 2}, n=2, use_subgraphs=False, remat="none", chunk=None),
    "qwen2": dict(axes={"data": 2, "fsdp": 2}, n=8, use_subgraphs=True, remat="dots", chunk=32),
    "qwen3": dict(axes={}, n=2, use_subgraphs=False, remat="full", chunk=7),
    "gemma3_text": dict(axes={"fsdp": 2}, n=2, use_subgraphs=True, remat="full", chunk=None),
}


@pytest.fixture(scope="module")
def oracle() -> Any:
    """Skips where there is no torch or no transformers, and only there."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name)
    from tests.models import oracle

    return oracle


def sequences() -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Of each shard the sequences: tokens and their weights as targets, a third of them none."""
    rng = np.random.default_rng(0)
    return [[(rng.integers(V, size=n).astype(np.int32), rng.choice(np.float32([0, 1, 0.25]), n)) for n in shard]
            for shard in LENGTHS]


def packed(shards: int) -> Batch:
    """All sequences in 1, 2 or 4 shards; with 4, two of them have none."""
    groups: list[list[tuple[np.ndarray, np.ndarray]]] = sequences()
    room = ROOM if shards > 1 else 2 * ROOM
    groups = [[*groups[0], *groups[1]]] if shards == 1 else groups + [[]] * (shards - 2)
    tokens, targets = np.zeros((2, shards, room), np.int32)
    weights = np.zeros((shards, room), np.float32)
    offsets = np.zeros((shards, 6), np.int32)
    for r, group in enumerate(groups):
        at = 0
        for s, (ids, weight) in enumerate(group):
            end = at + len(ids)
            tokens[r, at:end], targets[r, at:end - 1], weights[r, at:end - 1] = ids, ids[1:], weight[1:]
            at = offsets[r, s + 1] = end
        offsets[r, len(group) + 1:] = at
    return Batch(tokens.reshape(-1), targets.reshape(-1), weights.reshape(-1), offsets)


def theirs(model: Any, z_loss: float) -> tuple[float, dict[str, np.ndarray], list[float]]:
    """Mean loss, gradients by name, and the sum of log-probabilities of each sequence."""
    import torch

    total, weight, sums = torch.zeros(()), 0.0, []
    for ids, weights in (sequence for shard in sequences() for sequence in shard):
        tokens = torch.tensor(ids, dtype=torch.long)
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        logprobs = torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0]
        w = torch.tensor(weights[1:])
        total = total + (w * (z_loss * torch.logsumexp(logits, -1) ** 2 - logprobs)).sum()
        sums.append((w * logprobs).sum().item())
        weight += float(w.sum())
    loss = total / weight
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, sums


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient(family: str, oracle: Any, tmp_path: Path, devices: list[jax.Device]) -> None:
    how = HOW[family]
    reference = oracle.random_model(**config_of(family))
    reference.save_pretrained(tmp_path)
    z_loss = 1e-3
    loss, gradients, sums = theirs(reference, z_loss)

    mesh = make_mesh(devices[:how["n"]], n_heads=8, n_kv_heads=2, **how["axes"])
    model = maxlike.load(tmp_path, devices=mesh, use_subgraphs=how["use_subgraphs"], dtype="float32")
    graphdef, params = nnx.split(model)
    batch = place_batch(packed(how["axes"].get("data", 1) * how["axes"].get("fsdp", 1)), mesh)
    objective = SupervisedObjective(z_loss, how["chunk"])

    @jax.jit
    def ours(params: nnx.State) -> Any:
        def mean(params: nnx.State) -> jax.Array:
            found = objective(nnx.merge(graphdef, params), batch, REMAT_POLICIES[how["remat"]])
            return found["loss"] / found["weight"]

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.value_and_grad(mean)(params), sequence_logprobs(nnx.merge(graphdef, params), batch)

    (value, grads), found_sums = ours(params)
    assert abs(float(value) - loss) <= 1e-4 * loss
    spans = np.diff(batch.row_offsets) > 0
    np.testing.assert_allclose(np.asarray(found_sums)[spans], sums, rtol=1e-4)

    seen = set()
    for names, stacked, param in named_parameters(nnx.merge(graphdef, grads)):
        array = np.asarray(param.get_value())
        for name, found in zip(names, array if stacked else [array], strict=True):
            name = hf_name(family_of({"model_type": family}), name)
            expected = gradients[name]
            found = found[tuple(slice(size) for size in expected.shape)]  # without its padding
            seen.add(name)
            difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            assert jnp.isfinite(difference) and difference <= 1e-4, f"{name}: {difference:.1e}"
    assert seen == set(gradients)
