"""What a run's steps are fed: batches of a stream of data, cut as the mesh cuts them, for this process's devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import P
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from maxlike.mesh import ShardingRules
from maxlike.models.tokenizer import Tokenizer
from maxlike.train.batch import Batch
from maxlike.train.data import DataConfig, PackedDataset, load_dataset
from maxlike.train.stream import Summary, merge_states


@dataclass(frozen=True)
class Fed:
    """One step's data: `arrays`, those of this process, as `place_batch` takes them; `tokens` without padding, and in
    how many `sequences`, of all processes together (reckoned from this one's)."""

    arrays: Batch
    tokens: int
    sequences: int


class Feed:
    """The data of a run.

    Args:
        config: `shards` as `shards_for` gives it.
        steps: of the run; `None`: as many as `config.epochs` make.
        accumulation: batches of a step.
        vocab_size: of the model.
        progress: show bars for what takes long.

    Raises:
        ValueError: what the data cannot do.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, mesh: Mesh, *, steps: int | None, accumulation: int,
                 vocab_size: int, progress: bool = False):
        self._vocab_size, self._accumulation = vocab_size, accumulation
        self._mesh_shards, own = _token_shards(mesh)
        self._together = config.shards // self._mesh_shards
        own_shards = [shard for cut in own for shard in range(cut * self._together, (cut + 1) * self._together)]
        self._share = len(own) / self._mesh_shards
        if steps is not None:
            config = replace(config, epochs=None)
        elif config.epochs is None:
            raise ValueError("data.epochs is none, without end: then steps must say when the run ends.")
        self.config = config
        training, validation = load_dataset(config, tokenizer, own_shards=own_shards, progress=progress)
        self.preference = training.preference
        if validation is not None and validation.preference != self.preference:
            raise ValueError("Of training and validation data the one are pairs of chosen and rejected answers, the "
                             "other are not.")
        if steps is None:
            batches = _counted(training, progress)
            steps = -(-batches // accumulation)
            training = training.with_length(steps * accumulation)
        if validation is not None:  # read once now: a bad record is not to end a run that has begun
            batches = _counted(validation, progress)
            validation = validation.with_length(batches) if jax.process_count() > 1 else validation
        self.steps = steps
        self._training, self._validation = iter(training), validation

    def next(self) -> Fed:
        """The next step's data."""
        batches = [next(self._training) for _ in range(self._accumulation)]
        fed = [self._fed(batch) for batch in batches]
        if self._accumulation == 1:
            return fed[0]
        return Fed(jax.tree.map(lambda *arrays: np.stack(arrays), *(one.arrays for one in fed)),
                   sum(one.tokens for one in fed), sum(one.sequences for one in fed))

    def validation(self) -> Iterator[Fed]:
        """What is held out, batch by batch, from its beginning; nothing where nothing is."""
        if self._validation is None:
            return
        stream = iter(self._validation)
        try:
            yield from map(self._fed, stream)
        finally:
            stream.close()

    def _fed(self, batch: Batch) -> Fed:
        if (largest := int(batch.tokens.max())) >= self._vocab_size:
            raise ValueError(f"The tokenizer gave a token of id {largest}, and the model's vocabulary has "
                             f"{self._vocab_size}: they do not belong together.")
        lengths = np.diff(batch.row_offsets, axis=1)
        return Fed(joined_shards(batch, self._together), round(int(lengths.sum()) / self._share),
                   round(int((lengths > 0).sum()) / self._share))

    def get_state(self) -> Any:
        """Where this process goes on, as JSON."""
        return self._training.get_state()

    def set_state(self, states: Sequence[Any]) -> None:
        """Goes on from the states that all processes had, however many they were."""
        self._training.set_state(merge_states(states))

    def summary(self) -> Summary:
        """What this process has read of the training data."""
        return self._training.summary()

    def close(self) -> None:
        """Ends threads."""
        self._training.close()


def shards_for(config: DataConfig, mesh: Mesh, saved: int | None) -> int:
    """Into how many shards the data are to be cut, a multiple of those that the mesh cuts a batch into.

    Where that can be it is what the run had so far, so that another mesh is fed the same batches.

    Args:
        saved: what it was when the run was saved.

    Raises:
        ValueError: `config` asks for a number that does not fit the mesh.
    """
    cuts, _ = _token_shards(mesh)
    if config.shards != 1 and config.shards % cuts:
        raise ValueError(f"data.shards must be a multiple of the {cuts} parts that the mesh's data and fsdp axes cut a "
                         f"batch into, or 1 to go by those; got {config.shards}.")
    if config.shards != 1:
        return config.shards
    return saved if saved is not None and saved % cuts == 0 else cuts


def joined_shards(batch: Batch, together: int) -> Batch:
    """The same batch in fewer shards, each of `together` neighbours. Padding between them counts as sequences, of
    which nothing is learned."""
    if together == 1:
        return batch
    offsets = np.asarray(batch.row_offsets)
    R, size = len(offsets), len(batch.tokens) // len(offsets)
    begins = np.arange(together, dtype=np.int32) * size
    # Of each: its sequences' ends, and the end of its padding; twice, so that pairs stay pairs.
    ends = np.concatenate([offsets.reshape(R // together, together, -1)[..., 1:] + begins[:, None],
                           np.broadcast_to(begins[:, None] + size, (R // together, together, 2))], axis=-1)
    ends = ends.reshape(R // together, -1)
    return replace(batch, row_offsets=np.pad(ends, ((0, 0), (1, 0))).astype(np.int32))


def _token_shards(mesh: Mesh) -> tuple[int, list[int]]:
    """Into how many parts the mesh cuts a batch, and which of them lie on this process's devices."""
    axes = ShardingRules().mesh_axes(mesh, "tokens")
    cuts = ShardingRules().shards(mesh, "tokens")
    sharding = NamedSharding(mesh, P(axes or None))
    return cuts, sorted({index[0].indices(cuts)[0] for index in
                         sharding.addressable_devices_indices_map((cuts,)).values() if index is not None})


def _counted(dataset: PackedDataset, progress: bool) -> int:
    """The largest of all processes' numbers of batches.

    Raises:
        ValueError: in all of them, where one of them found a record that is not to be skipped.
    """
    failed: ValueError | None = None
    try:
        number = dataset.count_batches(progress=progress)
    except ValueError as error:
        if jax.process_count() == 1:
            raise
        failed, number = error, -1
    if jax.process_count() == 1:
        return number
    numbers = np.asarray(multihost_utils.process_allgather(np.int64(number)))
    if failed is not None:
        raise failed
    if (numbers < 0).any():
        raise ValueError(f"Process {int(np.flatnonzero(numbers < 0)[0])} found bad data, and says which.")
    return int(numbers.max())


def told(summary: Summary) -> str:
    """What was left out and cut, in words, and the first of what was said of it; empty where nothing was."""
    found = asdict(summary)
    bad = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in sorted(summary.bad.items()))
    parts = [f"{sum(summary.bad.values())} of {found['records']} records were left out ({bad})"] if bad else []
    parts += [f"{summary.truncated} were cut to size"] if summary.truncated else []
    return "\n".join(["; ".join(parts), *summary.messages]) if parts else ""
