"""The stream of packed batches, whose state is a place in the order of records.

Every shard reads records of its own: of the order (a permutation for each epoch, one epoch after another) shard r of R
takes the positions r, r + R, r + 2R, ... . So what a shard packs depends on no other, and the batches are the same for
any number of processes. What waits to be packed is kept in the state as positions, not as tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grain

from maxlike.train.batch import Batch
from maxlike.train.examples import Encoded
from maxlike.train.packing import Group, choose, pack

State = dict[str, Any]

_WHOLE = -1  # in place of a piece's number: all of the record
_MESSAGES = 10  # of bad records are kept


@dataclass
class Summary:
    """What went into the batches given so far.

    Args:
        records: read in the first epoch, bad ones and those that wait to be packed included.
        sequences: made of them.
        truncated: how many records' sequences (pairs count once) were cut to size.
        bad: the skipped ones, by kind.
        messages: the first few of what was said of them, with file and line.
        batches: given, in all epochs.
        slots: tokens of these, padding included.
        tokens: of these without padding.
        learned: targets among those.
    """

    records: int = 0
    sequences: int = 0
    truncated: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    batches: int = 0
    slots: int = 0
    tokens: int = 0
    learned: int = 0

    @property
    def efficiency(self) -> float:
        """The part of the batches that is not padding; 1 before the first."""
        return self.tokens / self.slots if self.slots else 1.0

    def to_json(self) -> State:
        """Itself as JSON values."""
        return {**dataclasses.asdict(self), "bad": dict(self.bad), "messages": list(self.messages)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Summary:
        """The reverse of `to_json`."""
        return cls(**{**value, "bad": Counter(value["bad"]), "messages": list(value["messages"])})


@dataclass(frozen=True)
class Shape:
    """The batches' shape: `shards` (R) of `tokens_per_shard` tokens, `max_seqs` (S) sequences in each."""

    shards: int
    tokens_per_shard: int
    max_seqs: int


@dataclass(frozen=True)
class Reading:
    """What is read, and how.

    Args:
        order: `order[p]` is what became of the record at position p of the order; grain's, epochs one after another.
        epoch_len: records of one epoch.
        endless: whether epochs follow one another without end.
        identity: what the order and the sequences depend on, as JSON values; a state of another is refused.
        skip_bad: count bad records and go on; otherwise they are errors.
        lookahead: groups that wait in each shard to be packed.
        mixed: further groups that wait in each shard, and are packed in an order of their own.
        seed: of that order.
        threads: that read and tokenise.
        prefetch: batches made ahead.
    """

    order: grain.MapDataset
    epoch_len: int
    endless: bool
    identity: Mapping[str, Any]
    skip_bad: bool
    lookahead: int
    mixed: int
    seed: int
    threads: int
    prefetch: int


class _Shard:
    """The records of one shard, waiting to be packed."""

    def __init__(self, number: int, step: int, reading: Reading, pool: ThreadPoolExecutor, summary: Summary):
        self._number, self._step, self._reading, self._pool, self._summary = number, step, reading, pool, summary
        self._issue = number  # the next position to be asked for
        self._pending: deque[tuple[int, int]] = deque()  # (position, piece) that come before it
        self._asked: deque[tuple[int, int, Future[Encoded]]] = deque()
        self._waiting: list[tuple[int, int, Group]] = []
        self._fruitless = 0

    def row(self, room: int, places: int) -> list[Group]:
        """What is packed next; nothing when all is read and packed."""
        reading = self._reading
        while len(self._waiting) < reading.lookahead + reading.mixed and self._read():
            pass
        per_group = len(self._waiting[0][2]) if self._waiting else 1
        next_ones = self._waiting[: reading.lookahead]
        taken = choose([sum(map(len, group)) for _, _, group in next_ones], room, places // per_group)
        row = [self._waiting[i][2] for i in taken]
        for i in reversed(taken):
            del self._waiting[i]
        return row

    def _read(self) -> bool:
        """One record more to the waiting; False where there is none."""
        self._ask()
        if not self._asked:
            return False
        position, piece, future = self._asked.popleft()
        encoded = future.result()
        first_epoch = position < self._reading.epoch_len and piece == _WHOLE
        if encoded.bad is not None:
            self._bad(encoded, first_epoch)
        groups = [(position, i, group) for i, group in enumerate(encoded.groups) if piece in (_WHOLE, i)]
        for group in groups:
            self._waiting.insert(self._place(position, group[1]), group)
        self._fruitless = 0 if groups else self._fruitless + 1
        if self._reading.endless and self._fruitless > self._reading.epoch_len:
            raise ValueError(f"shard {self._number} found none to learn from in {self._fruitless} records; the last "
                             f"one: {encoded.message}")
        if first_epoch:
            self._summary.records += 1
            self._summary.sequences += sum(len(group) for _, _, group in groups)
            self._summary.truncated += encoded.truncated
        return True

    def _place(self, position: int, piece: int) -> int:
        """Where a group takes its place: at the end, or anywhere behind those that are packed next.

        That is as if those were drawn at random from all the others, but what is drawn depends on nothing that a state
        would have to keep.
        """
        end, reading = len(self._waiting), self._reading
        if not reading.mixed or end <= reading.lookahead:
            return end
        drawn = hashlib.blake2b(f"{reading.seed} {position} {piece}".encode(), digest_size=8).digest()
        return reading.lookahead + int.from_bytes(drawn) % (end + 1 - reading.lookahead)

    def _bad(self, encoded: Encoded, first_epoch: bool) -> None:
        if not self._reading.skip_bad:
            raise ValueError(f"{encoded.message} ({encoded.bad}; on_bad_data 'skip' leaves such records out)")
        if first_epoch:
            self._summary.bad[str(encoded.bad)] += 1
            if len(self._summary.messages) < _MESSAGES:
                self._summary.messages.append(encoded.message)

    def _ask(self) -> None:
        while len(self._asked) < max(2, self._reading.threads):
            if self._pending:
                position, piece = self._pending.popleft()
            elif self._issue < len(self._reading.order):
                position, piece = self._issue, _WHOLE
                self._issue += self._step
            else:
                return
            self._asked.append((position, piece, self._pool.submit(self._reading.order.__getitem__, position)))

    def get_state(self) -> State:
        # The asked-for ones are not read yet: those from `_issue`'s run first of all.
        pending = [*((p, piece) for p, piece, _ in self._asked), *self._pending]
        # Flat lists: the state is copied for every batch.
        return {
            "next": self._issue,
            "pending": [p for p, _ in pending], "pending_pieces": [piece for _, piece in pending],
            "waiting": [p for p, _, _ in self._waiting], "waiting_pieces": [piece for _, piece, _ in self._waiting],
        }

    def set_state(self, state: State) -> None:
        for _, _, future in self._asked:
            future.cancel()
        self._asked.clear()
        self._fruitless = 0
        self._issue = state["next"]
        self._pending = deque(zip(state["pending"], state["pending_pieces"], strict=True))
        positions, pieces = state["waiting"], state["waiting_pieces"]
        distinct = list(dict.fromkeys(positions))
        encoded = dict(zip(distinct, self._pool.map(self._reading.order.__getitem__, distinct), strict=True))
        try:
            self._waiting = [(p, i, encoded[p].groups[i]) for p, i in zip(positions, pieces, strict=True)]
        except IndexError:
            raise ValueError("the data stream's state does not fit the data: a record that was read when it was saved "
                             "now makes fewer sequences, or is bad. Have the files or the tokenizer changed?") from None


class _Batches(grain.DatasetIterator):
    """Batches one after another, in the calling thread."""

    def __init__(self, reading: Reading, shape: Shape, own: Sequence[int], length: int | None):
        super().__init__()
        self._reading, self._shape, self._length = reading, shape, length
        self._pool = ThreadPoolExecutor(reading.threads, thread_name_prefix="tokenise")
        self._summary = Summary()
        self._shards = {r: _Shard(r, shape.shards, reading, self._pool, self._summary) for r in own}

    def __next__(self) -> Batch:
        if self._summary.batches == self._length:
            raise StopIteration
        shape, summary = self._shape, self._summary
        rows = [shard.row(shape.tokens_per_shard, shape.max_seqs) for shard in self._shards.values()]
        if self._length is None and not any(rows):
            if not summary.batches and len(self._shards) == shape.shards:
                raise ValueError(f"none of {summary.records} records can be learned from; the first: "
                                 f"{summary.messages[0]}")
            raise StopIteration
        batch = pack(rows, shape.tokens_per_shard, shape.max_seqs)
        summary.batches += 1
        summary.slots += len(batch.tokens)
        summary.tokens += int(batch.row_offsets[:, -1].sum())
        summary.learned += int((batch.weights > 0).sum())
        return batch

    def get_state(self) -> State:
        return {
            "identity": dict(self._reading.identity),
            "shards": self._shape.shards,
            "places": {str(r): shard.get_state() for r, shard in self._shards.items()},
            "summary": self._summary.to_json(),
        }

    def set_state(self, state: State) -> None:
        _check_identity(state["identity"], self._reading.identity)
        places = state["places"]
        if state["shards"] != self._shape.shards:
            places = _dealt_anew(state, self._shape.shards)
        missing = [r for r in self._shards if str(r) not in places]
        if missing:
            raise ValueError(f"the data stream's state says nothing of shards {missing}: it is that of one of several "
                             "processes. Give all of them to merge_states first")
        vars(self._summary).update(vars(Summary.from_json(state["summary"])))
        for r, shard in self._shards.items():
            shard.set_state(places[str(r)])

    def close(self) -> None:
        super().close()
        self._pool.shutdown(wait=False, cancel_futures=True)


class _BatchDataset(grain.IterDataset):
    def __init__(self, make: Callable[[], _Batches]):
        super().__init__()
        self._make = make

    def __iter__(self) -> _Batches:
        return self._make()


class BatchStream(Iterator[Batch]):
    """An iterator of `Batch`es, made ahead in a thread of grain's, with a state to go on from.

    A stream that goes on from a state gives exactly the batches that the other would have given from there on, if both
    have the same shards, limits and lookahead. With another number of shards, or another size, every record still
    comes once in an epoch, in other batches.
    """

    def __init__(self, reading: Reading, shape: Shape, own: Sequence[int], length: int | None):
        """`own` are the shards of this process; `length` the number of batches, if it is agreed on."""
        dataset = _BatchDataset(lambda: _Batches(reading, shape, own, length))
        prefetching = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=reading.prefetch)
        self._open: list[grain.DatasetIterator] = [iter(prefetching)]
        # At the interpreter's end at the latest: grain's own finalizer fails when modules are gone already.
        weakref.finalize(self, _close, self._open)

    @property
    def _iterator(self) -> grain.DatasetIterator:
        if not self._open:
            raise ValueError("this stream of batches is closed: iterate over its dataset for another")
        return self._open[0]

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            ValueError: a bad record (named by file and line) that is not to be skipped.
        """
        return next(self._iterator)

    def get_state(self) -> State:
        """The place in the stream behind the batch that was given last, as JSON values."""
        return self._iterator.get_state()

    def set_state(self, state: State) -> None:
        """Goes on from there.

        Raises:
            ValueError: the state is of other data, or settings that change the order or the sequences; or it lacks
                shards of this process (`merge_states`).
        """
        self._iterator.set_state(state)

    def summary(self) -> Summary:
        """What went into the batches given so far, from the shards of this process."""
        return Summary.from_json(self.get_state()["summary"])

    def close(self) -> None:
        """Ends the threads; the stream is of no further use."""
        _close(self._open)


def _close(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


def merge_states(states: Sequence[State]) -> State:
    """One state of those that the processes of a run had at the same step, good for any number of processes.

    Raises:
        ValueError: they are not of one run and step.
    """
    first = states[0]
    summaries = [Summary.from_json(state["summary"]) for state in states]
    if any(state["shards"] != first["shards"] for state in states) or len({s.batches for s in summaries}) != 1:
        raise ValueError("these states of a data stream are not of one step of one run: expected one of each process, "
                         "saved together")
    places: State = {}
    total = Summary()
    for state, summary in zip(states, summaries, strict=True):
        _check_identity(state["identity"], first["identity"])
        new = set(state["places"]) - set(places)
        places.update(state["places"])
        if not new:
            continue  # processes that share shards count them once
        for name in ("records", "sequences", "truncated", "slots", "tokens", "learned"):
            setattr(total, name, getattr(total, name) + getattr(summary, name))
        total.bad += summary.bad
        total.messages = [*total.messages, *summary.messages][:_MESSAGES]
    total.batches = summaries[0].batches
    return {**first, "places": places, "summary": total.to_json()}


def _check_identity(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    other = [f"{key} was {saved.get(key)!r} and is {ours.get(key)!r}" for key in ours if saved.get(key) != ours[key]]
    if other:
        raise ValueError(f"the data stream's state is of other data or settings ({'; '.join(other)}): go on with the "
                         "same, or start anew")


def _dealt_anew(state: State, shards: int) -> State:
    """The places of another number of shards: what the old ones left is dealt out before they go on together."""
    old, step = state["places"], state["shards"]
    if len(old) < step:
        raise ValueError(f"the data stream's state is of {len(old)} of {step} shards, and there are {shards} now: give "
                         "the states of all processes to merge_states first")
    start = max(place["next"] for place in old.values())
    left: list[tuple[int, int]] = []
    for place in old.values():
        left += zip(place["waiting"], place["waiting_pieces"], strict=True)
        left += zip(place["pending"], place["pending_pieces"], strict=True)
        left += ((p, _WHOLE) for p in range(place["next"], start, step))
    left.sort()
    places = {}
    for r in range(shards):
        dealt = left[r::shards]
        places[str(r)] = {
            "next": start + (r - start) % shards,
            "pending": [p for p, _ in dealt], "pending_pieces": [piece for _, piece in dealt],
            "waiting": [], "waiting_pieces": [],
        }
    return places
