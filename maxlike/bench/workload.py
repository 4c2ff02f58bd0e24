"""What is asked of an engine or server: prompts and how long their outputs are to be, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from maxlike.bench.lengths import Lengths
from maxlike.bench.prompt_file import Content, Entry, read_prompts
from maxlike.models.tokenizer import Tokenizer

# Frequent and short: each is one token of most vocabularies, its space included.
_ENGLISH = ("the and you that was for are with his they this have from one had word but not what all were when your "
            "can said there use each which she how their will other about out many then them these some her would "
            "make like him into time has look two more write see number way could people than first water been call "
            "who its now find long down day did get come made may part")
_PREFIX, _FILE = 1, 2  # streams of random numbers beside those of the prompts


@dataclass(frozen=True)
class WorkloadConfig:
    """What prompts are like; lengths are in tokens.

    Args:
        num_prompts: requests at each load, or in each round.
        input_len: of the prompts, without the shared prefix.
        output_len: of the outputs; `None`: what the file says of each prompt, else the length of its reply, else 128.
        prefix_len: tokens that prompts have in common at their beginning.
        num_prefixes: so many different beginnings, of which each prompt takes one.
        prompts: a file of prompts instead of random ones (`read_prompts`).
        max_total_len: longest prompt and output together: random prompts are cut, and then outputs; longer prompts of
            a file are left out.
        seed: of everything random.

    Raises:
        ValueError: a value is out of range, or two exclude each other.
    """

    num_prompts: int = 100
    input_len: Lengths | None = None
    output_len: Lengths | None = None
    prefix_len: int = 0
    num_prefixes: int = 1
    prompts: Path | None = None
    max_total_len: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_prompts", 1), ("prefix_len", 0), ("num_prefixes", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}.")
        if self.max_total_len is not None and self.max_total_len < self.prefix_len + 2:
            raise ValueError("max_total_len must leave a token for the prompt, behind its prefix if any, and one for "
                             f"the output: at least {self.prefix_len + 2}; got {self.max_total_len}.")
        if self.num_prefixes > 1 and not self.prefix_len:
            raise ValueError(f"num_prefixes is {self.num_prefixes}, of prefixes without a token: give prefix_len too.")
        if self.prompts is not None and (self.input_len is not None or self.prefix_len):
            raise ValueError("Prompts from a file are as long as they are: leave out the input length and the prefix "
                             "length.")


DEFAULT_INPUT_LEN = Lengths("fixed", 256)
DEFAULT_OUTPUT_LEN = 128


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: the prompt, its length in tokens (`None`: not known here), and the output's length in tokens."""

    content: Content
    n_tokens: int | None
    output_len: int


class Workload:
    """Draws prompts.

    Each `stage` (a load, a round, the warm-up) has prompts of its own, so that none finds another's in a prefix cache;
    the shared prefixes are the same in all. Prompts of a file are taken in a random order, from one stage to the next,
    and begin again when all were used (`repeated` says how many were taken a second time).

    Args:
        config: what prompts are like.
        form: `ids`: token ids; `text`. Prompts of a file are as they are.
        vocabulary: the ids that random prompts are made of, int[n]; needed for `ids`.
        tokenizer: makes random text as long as asked (what a chat template adds comes on top), and measures the texts
            of a file. Without one a random text has as many frequent English words as it should have tokens.

    Raises:
        ValueError: the file is not understood or none of its prompts will do, or something needs a tokenizer.
    """

    def __init__(self, config: WorkloadConfig, form: Literal["ids", "text"], *,
                 vocabulary: np.ndarray | None = None, tokenizer: Tokenizer | None = None):
        assert form == "text" or vocabulary is not None
        self.config = config
        self.form = form
        self.repeated = 0
        self.left_out = 0
        self._vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._words = _ENGLISH.split()
        # Tokens that come with every text, such as one for its beginning.
        self._added = len(tokenizer.encode("")) if tokenizer is not None and form == "text" else 0
        rng = np.random.default_rng([config.seed, _PREFIX])
        self._prefixes = [self._draw(config.prefix_len, rng) for _ in range(config.num_prefixes)]
        self._file: list[Prompt] = []
        self._taken = 0
        if config.prompts is not None:
            self._file = self._measured(read_prompts(config.prompts))

    def prompts(self, stage: int, n: int | None = None) -> list[Prompt]:
        """The prompts of a stage; `n` of them rather than `config.num_prompts`."""
        n = self.config.num_prompts if n is None else n
        rng = np.random.default_rng([self.config.seed, 0, stage])
        if self._file:
            return [self._next_of_file() for _ in range(n)]
        lengths = (self.config.input_len or DEFAULT_INPUT_LEN).draw(n, rng)
        outputs = self._output_lengths(n, rng)
        if self.config.max_total_len is not None:
            lengths = np.minimum(lengths, self.config.max_total_len - self.config.prefix_len - 1)
            outputs = np.minimum(outputs, self.config.max_total_len - self.config.prefix_len - lengths)
        prefixes = rng.integers(self.config.num_prefixes, size=n)
        return [self._prompt(int(prefix), int(length), int(output), rng)
                for prefix, length, output in zip(prefixes, lengths, outputs, strict=True)]

    def __str__(self) -> str:
        config = self.config
        if config.prompts is not None:
            return f"{config.num_prompts} prompts of {config.prompts}"
        kind = {"ids": "token ids", "text": "text"}[self.form]
        prefix = f" behind {'one' if config.num_prefixes == 1 else f'one of {config.num_prefixes}'} shared prefix" \
                 f"{'es' * (config.num_prefixes > 1)} of {config.prefix_len}" * bool(config.prefix_len)
        unit = "tokens" if self.form == "ids" or self._tokenizer is not None else "words"
        return (f"{config.num_prompts} prompts of random {kind}, {config.input_len or DEFAULT_INPUT_LEN} {unit}"
                f"{prefix}, outputs of {config.output_len or DEFAULT_OUTPUT_LEN} tokens")

    def _output_lengths(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return (self.config.output_len or Lengths("fixed", DEFAULT_OUTPUT_LEN)).draw(n, rng)

    def _prompt(self, prefix: int, length: int, output: int, rng: np.random.Generator) -> Prompt:
        head, tail = self._prefixes[prefix], self._draw(max(length - self._added, 1), rng, bool(self.config.prefix_len))
        if isinstance(head, str) and isinstance(tail, str):
            measured = self._tokenizer is not None
            return Prompt(head + tail, self.config.prefix_len + length if measured else None, output)
        return Prompt((*head, *tail), self.config.prefix_len + length, output)  # type: ignore[arg-type]

    def _draw(self, n: int, rng: np.random.Generator, goes_on: bool = False) -> tuple[int, ...] | str:
        """`n` random ids, or a text of so many tokens (`goes_on`: with something before it)."""
        if self.form == "ids":
            assert self._vocabulary is not None
            return tuple(self._vocabulary[rng.integers(len(self._vocabulary), size=n)].tolist())
        text = " " * goes_on + " ".join(self._words[i] for i in rng.integers(len(self._words), size=n))
        if self._tokenizer is None or n == 0:
            return text
        # Each word has a token at least, so this is long enough. Its beginning, read again, gives the same tokens but
        # where the last one stands for something else at the end of a text.
        return self._tokenizer.decode(self._tokenizer.encode(text, add_special_tokens=False)[:n])

    def _measured(self, entries: Sequence[Entry]) -> list[Prompt]:
        """The file's prompts that will do, in the order in which they are taken."""
        rng = np.random.default_rng([self.config.seed, _FILE])
        drawn = self._output_lengths(len(entries), rng)
        prompts = []
        for i in rng.permutation(len(entries)):
            entry = entries[i]
            length = self._length(entry.content)
            output = int(drawn[i])
            if self.config.output_len is None:
                output = entry.output_len or self._length(entry.reply) or output
            if self.config.max_total_len is not None:
                if length is None:
                    raise ValueError("A longest total length needs to know how many tokens the file's prompts have: "
                                     "give a tokenizer, and prompts that are no messages.")
                if length + output > self.config.max_total_len:
                    self.left_out += 1
                    continue
            prompts.append(Prompt(entry.content, length, output))
        if not prompts:
            raise ValueError(f"None of the {len(entries)} prompts of {self.config.prompts} is, with its output, at "
                             f"most {self.config.max_total_len} tokens long.")
        return prompts

    def _length(self, content: Content | None) -> int | None:
        if isinstance(content, tuple) and isinstance(content[0], int):
            return len(content)
        if isinstance(content, str) and self._tokenizer is not None:
            return len(self._tokenizer.encode(content))
        return None

    def _next_of_file(self) -> Prompt:
        prompt = self._file[self._taken % len(self._file)]
        self.repeated += self._taken >= len(self._file)
        self._taken += 1
        return prompt


def random_ids(tokenizer: Tokenizer | None, vocab_size: int | None) -> np.ndarray:
    """The ids that a random prompt may hold, int64[n]: those of a vocabulary that are not special."""
    if tokenizer is None:
        assert vocab_size is not None
        return np.arange(vocab_size)
    n = tokenizer.vocab_size if vocab_size is None else min(vocab_size, tokenizer.vocab_size)
    return np.setdiff1d(np.arange(n), sorted(tokenizer.special_ids))
