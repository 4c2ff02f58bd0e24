"""Whether a folder is whole: a manifest of its files' sizes and SHA-256 sums, written when all the others are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

MANIFEST = "manifest.json"
_PIECE = 8 << 20  # bytes read at a time
_THREADS = 4  # hashing lets go of the interpreter's lock


def write_manifest(folder: epath.Path) -> None:
    """Writes down what is in `folder`; from then on it counts as complete."""
    files = sorted(_files(folder))
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(lambda name: _measure(folder / name), files))
    text = json.dumps({"files": dict(zip(files, sums, strict=True))}, indent=1)
    unfinished = folder / f"{MANIFEST}.unfinished"  # the file appears whole or not at all
    unfinished.write_text(text)
    unfinished.rename(folder / MANIFEST)


def is_complete(folder: epath.Path) -> bool:
    """Whether the writing of `folder` came to its end. What happened to it since is for `problems_of`."""
    return (folder / MANIFEST).exists()


def problems_of(folder: epath.Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Everything that is wrong with `folder`, file by file; empty where nothing is.

    Args:
        share: `(i, n)`: of the files' contents look at every n-th from the i-th on alone; others do the rest.
    """
    if not is_complete(folder):
        return [f"{MANIFEST} is missing: its saving did not come to an end"]
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {str(name): (int(size), str(digest)) for name, (size, digest) in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]

    def problem(name: str) -> str | None:
        size, digest = expected[name]
        try:
            found_size, found_digest = _measure(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found_size != size:
            return f"{name} has {found_size} bytes instead of {size}"
        return None if found_digest == digest else f"{name} has other bytes in it than were written"

    with ThreadPoolExecutor(_THREADS) as pool:
        return [found for found in pool.map(problem, sorted(expected)[share[0]::share[1]]) if found]


def _files(folder: epath.Path, before: str = "") -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry, f"{before}{entry.name}/")
        else:
            yield before + entry.name


def _measure(file: epath.Path) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            size += len(piece)
            digest.update(piece)
    return size, digest.hexdigest()
