"""Lines of JSONL files by number: found by an index of byte offsets, so that no file is held in memory."""

from __future__ import annotations

import glob
import gzip
import os
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

_SUFFIXES = (".jsonl", ".jsonl.gz")
_CHUNK = 16 << 20
_MAYBE_BLANK = 11  # no JSON object of a record is shorter: such lines are looked at for being blank


class DataError(ValueError):
    """A record that cannot be learned from: `kind` is a short name to count by, the message says what is wrong."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a file, undecoded. `where` names file and line, counted from 1."""

    where: str
    line: bytes


def find_files(names: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files that `names` mean, each once: files, folders (all .jsonl and .jsonl.gz in them, by name) and globs.

    Raises:
        ValueError: a name means no file.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.name.endswith(_SUFFIXES) and file.is_file())
            missing = f"{path} is a folder without a file named *.jsonl or *.jsonl.gz"
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if os.path.isfile(file))
            missing = f"{path}: there is no such file or folder, and no file that this matches as a pattern"
        if not files:
            raise ValueError(missing)
        found.update(dict.fromkeys(files))
    return list(found)


class _IndexedFile:
    """The lines of one file that are not blank."""

    def __init__(self, path: Path, bar: tqdm):
        self.path = path
        self._descriptor: int | None = None
        try:
            if path.name.endswith(".gz"):
                # Lines cannot be found inside gzip: the text is laid down once, in a file that has no name.
                with tempfile.TemporaryFile() as text, gzip.open(path, "rb") as packed:
                    for chunk in iter(lambda: packed.read(_CHUNK), b""):
                        text.write(chunk)
                    text.flush()
                    text.seek(0)
                    self._index(text, bar)
                    self._descriptor = os.dup(text.fileno())
                weakref.finalize(self, os.close, self._descriptor)
            else:
                with path.open("rb") as text:
                    self._index(text, bar)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    def _index(self, text: IO[bytes], bar: tqdm) -> None:
        ends, size = [], 0
        for chunk in iter(lambda: text.read(_CHUNK), b""):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + (size + 1))
            size += len(chunk)
            bar.update(len(chunk))
        found = np.concatenate([np.zeros(1, np.int64), *ends])
        unfinished = found[-1] < size  # the last line ends without a newline
        found = np.append(found, size) if unfinished else found
        lengths = np.diff(found)
        keep = lengths > 1
        if unfinished:
            keep[-1] = True
        for i in np.flatnonzero(keep & (lengths < _MAYBE_BLANK)):
            text.seek(int(found[i]))
            keep[i] = bool(text.read(int(lengths[i])).strip())
        self.bytes = size
        self._starts, self._ends = found[:-1], found[1:]
        self._lines: np.ndarray | None = None  # from 1; None: the record's own number
        if not keep.all():
            self._lines = np.flatnonzero(keep) + 1
            self._starts, self._ends = self._starts[keep], self._ends[keep]

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, i: int) -> Record:
        where = f"{self.path}, line {i + 1 if self._lines is None else self._lines[i]}"
        start, length = int(self._starts[i]), int(self._ends[i] - self._starts[i])
        if self._descriptor is not None:
            line = os.pread(self._descriptor, length, start)
        else:
            # Opened for each line: there may be more files than a process may hold open.
            try:
                with self.path.open("rb", buffering=0) as file:
                    line = os.pread(file.fileno(), length, start)
            except OSError as error:
                raise ValueError(f"{where} cannot be read any more: {error}") from error
        if len(line) != length:
            raise ValueError(f"{where} cannot be read any more: the file has become shorter since it was indexed; "
                             "start again")
        return Record(where, line)


class Records:
    """The lines of JSONL files, in the files' order: `records[i]` is a `Record`. Blank lines are left out.

    A file is read once to find its lines (16 bytes of memory for each), and afterwards line by line, from any thread.
    A .gz file is unpacked into a temporary file that is gone with this object.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str]], *, progress: bool = False):
        """`files` are as `find_files` takes them; `progress` shows a bar where indexing takes longer than a second.

        Raises:
            ValueError: a file is not there, cannot be read or unpacked, or there is no record in any.
        """
        paths = find_files(files)
        total = sum(path.stat().st_size for path in paths if not path.name.endswith(".gz"))
        with tqdm(total=total or None, desc="indexing", unit="B", unit_scale=True, delay=1,
                  disable=not progress) as bar:
            self._files = [_IndexedFile(path, bar) for path in paths]
        self._ends = np.cumsum([len(file) for file in self._files])
        self.bytes = sum(file.bytes for file in self._files)
        if not len(self):
            raise ValueError(f"there is no record in {', '.join(map(str, paths[:5]))}"
                             f"{' and others' if len(paths) > 5 else ''}: expected one JSON object a line")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        file = int(np.searchsorted(self._ends, i, side="right"))
        return self._files[file].read(int(i) - (int(self._ends[file - 1]) if file else 0))

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))


class Selection:
    """Some of the records, by number.

    Args:
        records: all of them.
        numbers: `int64[n]`, those meant, in this order.
    """

    def __init__(self, records: Records, numbers: np.ndarray):
        self._records = records
        self._numbers = numbers

    @property
    def bytes(self) -> int:
        """The size of all files, of which these records are a part."""
        return self._records.bytes

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> Record:
        return self._records[int(self._numbers[i])]

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))


def hold_out(records: Records, fraction: float) -> tuple[Selection, Selection]:
    """(records to learn from, about `fraction` of them held out), chosen by a hash of a record's number.

    The choice depends on nothing else: the same records are held out in every run, whatever its seed, and records that
    are added behind do not change it. The hash is SplitMix64's (Steele, Lea, Flood 2014).

    Raises:
        ValueError: `fraction` is not in (0, 1), or leaves no record on one side.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1; got {fraction}")
    z = (np.arange(len(records), dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    held = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53 < fraction
    if held.all() or not held.any():
        raise ValueError(f"holding out {fraction} of {len(records)} records leaves none to "
                         f"{'learn from' if held.all() else 'validate on'}: give files of their own for validation")
    return Selection(records, np.flatnonzero(~held)), Selection(records, np.flatnonzero(held))
