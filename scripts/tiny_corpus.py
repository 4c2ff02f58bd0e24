"""What the embedded model reads: the standard library's source, split by file, as tokens of a tokenizer of its own.

`train_tiny.py` trains on one part of the files, `eval_tiny.py` measures on the other, which neither the model nor
the tokenizer has seen. Both call `Corpus.of_standard_library`, so they agree on the split.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

BEGIN, END = "<|begin|>", "<|end|>"

# Installed packages; tests, a dialect of their own; and data in the shape of code: character tables, help texts.
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data",
            "__pycache__")
HELD_OUT_PERCENT = 13

# How text is cut before merges are learnt. Newlines stand alone and so does the indentation behind them, so that a
# prompt may end before or after either and still be cut as the training text is.
PIECES = "|".join([
    r"[\r\n]+",
    r"(?<=[\r\n])[ \t]+",
    r"[ .]?[\p{L}_]+",
    r" ?\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}_]+",
    r"\s+(?!\S)",
    r"\s+",
])


@dataclass(frozen=True)
class SourceFile:
    """One file: its path below the library's root, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the file is kept from training: a matter of its path alone, the same on every machine."""
        return int.from_bytes(hashlib.sha256(self.path.encode()).digest()[:4]) % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True)
class Function:
    """A function on its own, moved to the left margin.

    Args:
        head: from `def` to the colon, no newline behind it.
        text: all of it, without a newline at the end.
    """

    head: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Files in two parts, each sorted by path."""

    training: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]

    @classmethod
    def of_standard_library(cls) -> Corpus:
        """The running Python's own."""
        return cls.of_folder(Path(sysconfig.get_path("stdlib")))

    @classmethod
    def of_folder(cls, root: Path) -> Corpus:
        """The `*.py` files below `root`, without those of `LEFT_OUT` folders, empty ones and exact copies.

        Raises:
            ValueError: one of the two parts would be empty.
        """
        files: dict[str, SourceFile] = {}
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if any(part in LEFT_OUT for part in relative.parts[:-1]):
                continue
            try:
                text = path.read_bytes().decode()
            except UnicodeDecodeError:  # a few declare another encoding
                continue
            if text.strip():
                files.setdefault(text, SourceFile(relative.as_posix(), text))
        parts = ([f for f in files.values() if not f.held_out], [f for f in files.values() if f.held_out])
        if not all(parts):
            raise ValueError(f"{root} has {len(parts[0])} files to train on and {len(parts[1])} to hold out; both are "
                             "needed. Is the standard library's source installed there?")
        return cls(*map(tuple, parts))

    @cached_property
    def unseen_functions(self) -> list[Function]:
        """Functions of held-out files with a head that no training file has, each head once."""
        seen = {function.head for file in self.training for function in functions_of(file.text)}
        unseen = {function.head: function for file in self.held_out for function in functions_of(file.text)
                  if function.head not in seen}
        return list(unseen.values())


def functions_of(text: str) -> Iterator[Function]:
    """The functions and methods in `text`, without decorators; none if `text` is not Python.

    Left out are those on one line, and those with a comment between the colon and the first statement, whose head
    could not be told by where statements begin.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in old files
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.body[0].lineno == node.lineno:
            continue
        whole = textwrap.dedent("".join(lines[node.lineno - 1:node.end_lineno])).rstrip()
        signature = "".join(lines[node.lineno - 1:node.body[0].lineno - 1])
        head = textwrap.dedent(signature).rstrip()
        if head.endswith(":") and whole.startswith(head) and _is_python(whole):
            yield Function(head, whole)


def _is_python(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except (SyntaxError, ValueError):
            return False
    return True


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, which puts `BEGIN` before a text.

    `BEGIN` is id 0, `END` is id 1; every byte has a token, so nothing is unknown.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BEGIN, END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))])
    return tokenizer


def write_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path, max_length: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, as `transformers` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END,
                "clean_up_tokenization_spaces": False, "model_max_length": max_length}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def encode_documents(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, `BEGIN` before and `END` behind."""
    end = tokenizer.token_to_id(END)
    return [[*encoding.ids, end] for encoding in tokenizer.encode_batch(list(texts))]
