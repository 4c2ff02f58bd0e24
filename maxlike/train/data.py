"""JSONL files to a stream of packed batches: shuffled by seed and epoch, cut over processes, exactly resumable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

import grain
import numpy as np
from tqdm import tqdm

from maxlike.models.tokenizer import Tokenizer
from maxlike.train.examples import Encoder, EncodingConfig, Format, format_of, parse
from maxlike.train.records import DataError, Records, Selection, hold_out
from maxlike.train.stream import BatchStream, Reading, Shape, Summary

_PEEKED = 1000  # records from the beginning, until one says whether the data are pairs


@dataclass(frozen=True)
class DataConfig:
    """What to learn from, and how it is cut into batches.

    Args:
        train_files: JSONL files (.jsonl, .jsonl.gz), folders of them, and glob patterns.
        tokens_per_batch: T, tokens of a batch over all devices, padding included.
        validation_files: as `train_files`; read in order, once.
        validation_fraction: of the training records held out where there are no such files; 0 holds out none.
        format: of the records: "text" (`text`), "chat" (`messages`), "completion" (`prompt`, `completion`),
            "preference" (`prompt`, `chosen`, `rejected`), or "auto", which goes by the keys of each. Prompts and
            answers are strings, or lists of messages.
        max_seq_len: tokens of the longest sequence; None allows what a shard holds (a pair shares it).
        shards: R, into how many parts of equal size a batch is cut; a sequence lies in one of them.
        max_seqs: S, sequences of a shard at most; None is one for every 16 tokens.
        seed: of the order.
        epochs: how often every record comes; None repeats them without end.
        shuffle: another order in every epoch; without it that of the files.
        shuffle_buffer: sequences of a shard that wait to be drawn from at random; without it the windows of a long text
            follow one another.
        on_bad_data: "refuse" raises an error that names file and line, "skip" counts the record and goes on.
        too_long: what becomes of sequences beyond `max_seq_len`: "bad" data, or "truncate" to their beginning.
        long_text: the same for `text`, which may also be "cut" into windows.
        window_lengths: each text that is cut draws one of these in each epoch, and how much shorter its first window
            is, so that it is not cut at the same places again; by default windows are of `max_seq_len` in all epochs.
        train_on: learn from the "assistant" (of completions: what follows the prompt), or from "all" tokens.
        turns: "together" learns all the assistant's turns of a conversation in one sequence; "apart" makes a sequence
            for each, with what comes before it: for templates that drop earlier thinking.
        template_variables: for the chat template.
        lookahead: groups of sequences that wait in each shard: more pack tighter.
        threads: that read and tokenise.
        prefetch: batches made ahead of the step.

    Raises:
        ValueError: a value is out of its range.
    """

    train_files: Sequence[str]
    tokens_per_batch: int
    validation_files: Sequence[str] = ()
    validation_fraction: float = 0.0
    format: Format = "auto"
    max_seq_len: int | None = None
    shards: int = 1
    max_seqs: int | None = None
    seed: int = 0
    epochs: int | None = 1
    shuffle: bool = True
    shuffle_buffer: int = 0
    on_bad_data: Literal["refuse", "skip"] = "refuse"
    too_long: Literal["bad", "truncate"] = "bad"
    long_text: Literal["cut", "truncate", "bad"] = "cut"
    window_lengths: Sequence[int] = ()
    train_on: Literal["assistant", "all"] = "assistant"
    turns: Literal["together", "apart"] = "together"
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    lookahead: int = 128
    threads: int = 4
    prefetch: int = 2

    def __post_init__(self) -> None:
        for name in ("train_files", "validation_files"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if not self.train_files:
            raise ValueError("train_files is empty: name files, folders or patterns of JSONL")
        hints = get_type_hints(type(self))
        for name in ("format", "on_bad_data", "too_long", "long_text", "train_on", "turns"):
            if getattr(self, name) not in get_args(hints[name]):
                raise ValueError(f"{name} must be one of {', '.join(get_args(hints[name]))}; "
                                 f"got {getattr(self, name)!r}")
        for name, least in (("tokens_per_batch", 2), ("shards", 1), ("max_seqs", 1), ("epochs", 1), ("seed", 0),
                            ("max_seq_len", 2), ("shuffle_buffer", 0), ("lookahead", 1), ("threads", 1),
                            ("prefetch", 1)):
            value = getattr(self, name)
            optional = value is None and name in ("max_seqs", "epochs", "max_seq_len")
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
        if self.tokens_per_batch % self.shards or self.tokens_per_batch // self.shards < 2:
            raise ValueError(f"tokens_per_batch {self.tokens_per_batch} cannot be cut into {self.shards} shards of "
                             f"equal size (of at least 2 tokens): make it a multiple of shards")
        if self.max_seq_len is not None and self.max_seq_len > self.tokens_per_shard:
            raise ValueError(f"max_seq_len {self.max_seq_len} is more than the {self.tokens_per_shard} tokens of a "
                             "shard, and a sequence lies in one: make tokens_per_batch larger or max_seq_len smaller")
        for name in ("shuffle_buffer", "window_lengths"):
            if getattr(self, name) and not self.shuffle:
                raise ValueError(f"{name} is {getattr(self, name)}, but without shuffle nothing is left to chance: "
                                 "give one or the other")
        object.__setattr__(self, "window_lengths", tuple(self.window_lengths))
        longest = self.max_seq_len or self.tokens_per_shard
        if self.window_lengths and (self.long_text != "cut" or min(self.window_lengths) < 2
                                    or max(self.window_lengths) > longest):
            raise ValueError(f"window_lengths must be from 2 to max_seq_len, here {longest}, and long_text 'cut'; got "
                             f"{self.window_lengths} and {self.long_text!r}")
        if self.validation_fraction and self.validation_files:
            raise ValueError("there are validation_files and a validation_fraction: give one of them")

    @property
    def tokens_per_shard(self) -> int:
        """Tokens of one of the R shards of a batch."""
        return self.tokens_per_batch // self.shards


class PackedDataset:
    """Records as a stream of `Batch`es: iterate over it, as often as you like.

    `preference` says whether the records are pairs: then sequences 2i and 2i + 1 of each shard are what was chosen and
    what was rejected, and S is even. `records` counts the records, `shape` is that of the batches.
    """

    def __init__(self, records: Records | Selection, tokenizer: Tokenizer, config: DataConfig, *, shuffle: bool,
                 epochs: int | None, own_shards: Sequence[int] | None = None, length: int | None = None):
        """`own_shards` are those that this process reads (None: all), `length` as `with_length` explains it.

        Raises:
            ValueError: no record can be read of which to tell whether the data are pairs, or a shard is not there.
        """
        self.records = len(records)
        self._arguments = records, tokenizer, config, shuffle, epochs, own_shards
        self._own = list(range(config.shards) if own_shards is None else own_shards)
        if not self._own or not set(self._own) <= set(range(config.shards)) or len(set(self._own)) < len(self._own):
            raise ValueError(f"own_shards must be some of 0 to {config.shards - 1}, each once; got {own_shards}")
        self._length = length
        self.preference = _holds_pairs(records, config)

        room = config.tokens_per_shard
        max_seqs = config.max_seqs or max(2, room // 16)
        if self.preference:
            if room < 4:
                raise ValueError(f"a shard of {room} tokens holds no pair: make tokens_per_batch larger")
            max_seqs += max_seqs % 2
        self.shape = Shape(config.shards, room, max_seqs)
        encoding = EncodingConfig(
            max_seq_len=config.max_seq_len or room, max_group_len=room, format=config.format,
            train_on=config.train_on, turns=config.turns, too_long=config.too_long,
            long_text=config.long_text, window_lengths=tuple(config.window_lengths) if shuffle else (),
            template_variables=config.template_variables)
        order = grain.MapDataset.source(records)
        # The seed is hashed: epoch e is shuffled by seed + e, and seeds side by side would share epochs.
        order_seed, windows_seed = map(int, np.random.SeedSequence(config.seed).generate_state(2))
        if shuffle:
            order = order.shuffle(seed=order_seed)
        order = order.repeat(epochs)
        encoder = Encoder(tokenizer, encoding, self.preference)
        # Drawn anew for each position of the order, which the state's places are.
        order = order.random_map(encoder, seed=windows_seed) if encoding.window_lengths else order.map(encoder)
        identity = {
            "records": len(records), "bytes": records.bytes, "seed": config.seed, "shuffle": shuffle,
            **{key: value for key, value in dataclasses.asdict(encoding).items() if key != "max_group_len"},
            "window_lengths": list(encoding.window_lengths),  # as JSON has it
        }
        self._reading = Reading(order, len(records), epochs is None, identity, config.on_bad_data == "skip",
                                config.lookahead, config.shuffle_buffer if shuffle else 0, config.seed, config.threads,
                                config.prefetch)

    def __iter__(self) -> BatchStream:
        """A stream from the beginning.

        Raises:
            ValueError: this process reads some of the shards, and the number of batches is not agreed on.
        """
        if not self._reading.endless and self._length is None and len(self._own) < self.shape.shards:
            raise ValueError("the shards of several processes end at different batches: take the largest "
                             "count_batches() of all processes and iterate over with_length(it)")
        return BatchStream(self._reading, self.shape, self._own, self._length)

    def count_batches(self, *, progress: bool = False) -> int:
        """How many batches there are until this process has read its shards: it reads and tokenises all to know.

        Raises:
            ValueError: they never end; or a bad record that is not to be skipped.
        """
        return self.measure(progress=progress).batches

    def measure(self, *, progress: bool = False) -> Summary:
        """The summary of the whole stream, as `count_batches` goes through it.

        Raises:
            ValueError: `epochs` is `None`, so that there is no end.
        """
        if self._reading.endless:
            raise ValueError("epochs is None: the batches never end, and cannot be counted")
        stream = BatchStream(self._reading, self.shape, self._own, None)
        try:
            for _ in tqdm(stream, desc="counting batches", unit="batch", disable=not progress, delay=1):
                pass
            return stream.summary()
        finally:
            stream.close()

    def with_length(self, batches: int) -> PackedDataset:
        """This with so many batches: those behind its end are empty (padding alone), and further ones left out.

        Processes that read shards of their own so make equally many.
        """
        records, tokenizer, config, shuffle, epochs, own = self._arguments
        return PackedDataset(records, tokenizer, config, shuffle=shuffle, epochs=epochs, own_shards=own,
                             length=batches)


def load_dataset(config: DataConfig, tokenizer: Tokenizer, *, own_shards: Sequence[int] | None = None,
                 progress: bool = False) -> tuple[PackedDataset, PackedDataset | None]:
    """(what to train on, what to validate on or None), the latter in the files' order and without repeating.

    Args:
        config: which files, and how they become batches.
        tokenizer: of the model that is trained.
        own_shards: the shards of each batch whose tokens lie on devices of this process; None for all. Batches have
            those alone, in this order.
        progress: show bars for what takes long.

    Raises:
        ValueError: files are missing, unreadable, or hold no record.
    """
    train: Records | Selection = Records(config.train_files, progress=progress)
    held: Records | Selection | None = None
    if config.validation_files:
        held = Records(config.validation_files, progress=progress)
    elif config.validation_fraction:
        assert isinstance(train, Records)
        train, held = hold_out(train, config.validation_fraction)
    training = PackedDataset(train, tokenizer, config, shuffle=config.shuffle, epochs=config.epochs,
                             own_shards=own_shards)
    if held is None:
        return training, None
    return training, PackedDataset(held, tokenizer, config, shuffle=False, epochs=1, own_shards=own_shards)


def _holds_pairs(records: Records | Selection, config: DataConfig) -> bool:
    if config.format != "auto":
        return config.format == "preference"
    problem = ""
    for i in range(min(len(records), _PEEKED)):
        record = records[i]
        try:
            return format_of(parse(record)) == "preference"
        except DataError as error:
            problem = problem or f"{record.where}: {error}"
            if config.on_bad_data == "refuse":
                break
    raise ValueError(problem)
