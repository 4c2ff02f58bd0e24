"""Hugging Face safetensors: read slice by slice into the caller's arrays, written tensor by tensor.

The format (https://huggingface.co/docs/safetensors): 8 bytes, the little-endian length of the header; the
header, JSON, `{name: {"dtype", "shape", "data_offsets": [begin, end]}}`; then the data, row-major, without
holes. Files are read with `preadv` rather than mapped: mapped pages would count as resident memory.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FLOATS = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_DTYPES = {
    **_FLOATS,
    "BOOL": np.dtype(np.bool_),
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
}
_SUPPORTED = ", ".join(_DTYPES)
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# What `write_checkpoint` takes for one tensor: name, shape, dtype, fetch.
TensorSource = tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_SCRATCH_BYTES = 2 << 20  # one block of rows on its way from the file to the caller's array
_MAX_READ_BYTES = 1 << 30  # some systems refuse to read 2 GB or more in one call


class CheckpointError(ValueError):
    """A checkpoint that cannot be used.

    `problems` lists everything that is wrong with it; the message is `summary`, if there is one, and the same
    list, one problem a line.
    """

    def __init__(self, problems: Iterable[str], *, summary: str | None = None):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems if summary is None else [summary, *self.problems]))


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes from byte `offset` of `file`, row-major, little-endian."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """The tensors of a folder of safetensors files, read on demand.

    `tensors` maps each name to its `TensorInfo`. `problems` says what is wrong with the files, one line each;
    it is for the caller to raise, together with what else it finds. `lost` holds the names of tensors that
    should be there but cannot be had for one of these problems.

    Reading is safe from several threads. The files stay open until `close()`, or the end of a `with` block.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        problems: Sequence[str],
        lost: Iterable[str],
        files: Mapping[Path, FileIO],
    ):
        self.tensors = dict(tensors)
        self.problems = list(problems)
        self.lost = frozenset(lost)
        self._files = dict(files)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], file: str | None = None) -> "Checkpoint":
        """Open `model.safetensors`, else the shards of `model.safetensors.index.json`, else every
        `*.safetensors` file in `folder` (the order of `transformers`), and read their headers; with `file`
        that one alone.

        Raises `CheckpointError` when there is nothing to read. Files that are missing or broken do not raise:
        see `problems`.
        """
        folder = Path(folder)
        problems: list[str] = []
        weight_map: dict[str, str] = {}
        if file is not None or (folder / SINGLE_FILE).is_file():
            paths = [folder / (file or SINGLE_FILE)]
        else:
            if (folder / INDEX_FILE).is_file():
                weight_map = _read_index(folder / INDEX_FILE, problems)
            paths = [folder / file for file in sorted(set(weight_map.values()))] or _loose_files(folder)
        if not paths:
            raise CheckpointError([*problems, _nothing_found(folder)])

        tensors: dict[str, TensorInfo] = {}
        files: dict[Path, FileIO] = {}
        lost = set(weight_map)
        for path in paths:
            promised = [name for name, file in weight_map.items() if file == path.name]
            there = f"; the index places {_some(promised)} there" if promised else ""
            try:
                files[path] = FileIO(path)
                infos, spoilt, found = _read_header(path, files[path].fileno())
            except FileNotFoundError:
                problems.append(f"{path}: the file is missing{there}")
                continue
            except OSError as error:
                problems.append(f"{path}: cannot be read ({error.strerror}){there}")
                continue
            problems += found
            lost |= spoilt
            names = {info.name for info in infos}
            if absent := [name for name in promised if name not in names and not found]:
                problems.append(f"{path}: lacks {_some(absent)}, placed there by {INDEX_FILE}")
            for info in infos:
                if info.name in tensors and info.name not in weight_map:
                    problems.append(f"tensor {info.name!r} is in {tensors[info.name].file} and in {path}")
                if weight_map.get(info.name, path.name) == path.name or info.name not in tensors:
                    tensors[info.name] = info
        return cls(tensors, problems, lost - tensors.keys(), files)

    def read_into(self, name: str, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """Read the slice `index` of tensor `name` into `out`.

        `index` has at most one slice per dimension, of step 1; missing ones mean the whole dimension. `out`
        has the slice's shape, any strides, and the tensor's dtype; between floating dtypes the values are
        cast on the way (as numpy does it: to nearest, ties to even). Beyond `out`, memory stays under 3 MB.

        Raises `KeyError` for an unknown name, `ValueError` for an `out` that does not fit, `CheckpointError`
        when the file ends too early or cannot be read.
        """
        info = self.tensors[name]
        starts, counts = _box(info, index)
        if out.shape != counts:
            raise ValueError(f"tensor {name!r}: the slice has shape {counts}, the array to fill {out.shape}")
        if out.dtype != info.dtype and not {out.dtype, info.dtype} <= set(_FLOATS.values()):
            raise ValueError(f"tensor {name!r} is {info.dtype}: it cannot be read into {out.dtype}")
        if out.size == 0:
            return
        file = self._files[info.file]

        def read(offset: int, buffer: np.ndarray) -> None:
            try:
                got = _pread(file.fileno(), info.offset + offset, buffer)
            except OSError as error:
                problem = f"{info.file}: tensor {name!r} cannot be read ({error.strerror})"
                raise CheckpointError([problem]) from error
            if got < buffer.nbytes:
                place = f"tensor {name!r} (bytes {info.offset} to {info.offset + info.nbytes})"
                problem = f"{info.file}: the file ends at byte {info.offset + offset + got}, inside {place}"
                raise CheckpointError([problem])

        scratch = np.empty(min(_SCRATCH_BYTES, info.nbytes), np.uint8)
        if info.shape:
            _read_box(read, 0, info.dtype, info.shape, starts, counts, out, scratch)
        else:
            _read_box(read, 0, info.dtype, (1,), (0,), (1,), out.reshape(1), scratch)

    def close(self) -> None:
        """Close the files; nothing can be read afterwards."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def write_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Iterable[TensorSource],
    *,
    max_shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"}),
) -> None:
    """Write `tensors`, each `(name, shape, dtype, fetch)`, as `model.safetensors` in `folder`.

    More than `max_shard_bytes` bytes of data become shards, `model-00001-of-0000n.safetensors`, and an index;
    only a single tensor can make a shard larger. `fetch()` is called when the tensor's turn comes and its
    result dropped once written, so memory holds one tensor at a time. The folder is made if absent. Every
    file is complete before the first takes its final name; then the files of an earlier checkpoint in the
    folder are removed. `transformers` wants to find a "format" in `metadata`.

    Raises `ValueError` for a name given twice, a dtype that the format lacks, and a `fetch()` that returns
    another shape or dtype than announced; the folder is then as it was.
    """
    folder = Path(folder)
    shards: list[list[TensorSource]] = [[]]
    seen: set[str] = set()
    total = filled = 0
    for name, shape, dtype, fetch in tensors:
        dtype = np.dtype(dtype)
        if dtype not in _DTYPE_NAMES:
            raise ValueError(f"tensor {name!r}: no safetensors dtype for {dtype}; there are {_SUPPORTED}")
        if name in seen:
            raise ValueError(f"tensor {name!r} is given twice")
        if name == "__metadata__":
            raise ValueError("'__metadata__' is no name for a tensor: the format reserves it")
        seen.add(name)
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, tuple(shape), dtype, fetch))
        filled += nbytes
        total += nbytes

    if len(shards) == 1:
        names = [SINGLE_FILE]
    else:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    folder.mkdir(parents=True, exist_ok=True)
    pending: list[tuple[Path, Path]] = []
    try:
        for file, shard in zip(names, shards, strict=True):
            pending.append((folder / f".{file}.{os.getpid()}.tmp", folder / file))
            write_file(pending[-1][0], shard, metadata)
        if len(shards) > 1:
            pending.append((folder / f".{INDEX_FILE}.{os.getpid()}.tmp", folder / INDEX_FILE))
            weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name, *_ in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            pending[-1][0].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for temporary, final in pending:
            os.replace(temporary, final)
    finally:
        for temporary, _ in pending:
            temporary.unlink(missing_ok=True)
    written = {final.name for _, final in pending}
    for path in folder.iterdir():
        ours = re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name)
        if ours and path.name not in written:
            path.unlink()


def write_file(path: Path, tensors: Iterable[TensorSource], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, a tensor at a time; `write_checkpoint` also replaces files safely.

    Raises `ValueError` when an array is not of the shape or dtype that was announced.
    """
    # Wide dtypes first, so that every tensor is aligned for readers that map the file.
    tensors = sorted(tensors, key=lambda tensor: -tensor[2].itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape, dtype, _ in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape, dtype, fetch in tensors:
            array = np.asarray(fetch())
            if array.shape != shape or array.dtype != dtype:
                given = f"{array.dtype}{list(array.shape)}"
                raise ValueError(f"tensor {name!r} was announced as {dtype}{list(shape)} but is {given}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _read_index(path: Path, problems: list[str]) -> dict[str, str]:
    """The `weight_map` of an index file: tensor name -> file name; empty when it is no good."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: not readable as JSON ({error})")
        return {}
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in weight_map.values()
    ):
        problems.append(f"{path}: expected a 'weight_map' of tensor names to the names of files beside it")
        return {}
    return weight_map


def _loose_files(folder: Path) -> list[Path]:
    # "consolidated" files hold the weights once more, under their maker's own names.
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))


def _nothing_found(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: there is no such folder"
    text = f"{folder}: no weights found; looked for {SINGLE_FILE}, {INDEX_FILE} and *.safetensors"
    others = {
        path.name for kind in ("*.bin", "*.gguf", "*.pth", "consolidated*") for path in folder.glob(kind)
    }
    if others:
        text += f". There is only {_some(sorted(others), 'file')}: convert to Hugging Face safetensors first"
    return text


def _some(names: Sequence[str], noun: str = "tensor") -> str:
    """'3 tensors (a, b, c)', with at most three names."""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} {noun}{'s' if len(names) != 1 else ''} ({', '.join(names[:3])}{more})"


def _read_header(path: Path, fd: int) -> tuple[list[TensorInfo], set[str], list[str]]:
    """The tensors that the file's header describes, the names of those described badly, and all problems."""
    size = os.fstat(fd).st_size
    start = os.pread(fd, 8, 0)
    if start == b"version ":
        return [], set(), [f"{path}: a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"]
    length = int.from_bytes(start, "little")
    if len(start) < 8:
        return [], set(), [f"{path}: no safetensors file, or cut short: it has only {size} bytes"]
    if length > min(size - 8, _MAX_HEADER_BYTES):
        claim = f"its first 8 bytes announce a header of {length} bytes, but it has {size}"
        return [], set(), [f"{path}: no safetensors file, or cut short: {claim}"]
    text = np.empty(length, np.uint8)
    _pread(fd, 8, text)
    try:
        header = json.loads(text.tobytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return [], set(), [f"{path}: no safetensors file, or damaged: its header is not JSON ({error})"]
    if not isinstance(header, dict):
        return [], set(), [f"{path}: no safetensors file: its header is a JSON {type(header).__name__}, no object"]
    header.pop("__metadata__", None)

    base = 8 + length
    tensors: list[TensorInfo] = []
    problems: list[str] = []
    spans: list[tuple[int, int, str]] = []
    unknown: dict[str, list[str]] = {}
    for name, entry in header.items():
        fields = _entry(entry)
        if fields is None:
            wanted = "expected dtype, shape and data_offsets"
            problems.append(f"{path}: tensor {name!r}: {wanted}, found {entry!s:.200}")
            continue
        dtype_name, shape, begin, end = fields
        spans.append((begin, end, name))
        if dtype_name not in _DTYPES:
            unknown.setdefault(dtype_name, []).append(name)
            continue
        dtype = _DTYPES[dtype_name]
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes != end - begin:
            span = f"its data_offsets [{begin}, {end}] span {end - begin}"
            problems.append(f"{path}: tensor {name!r}: {dtype_name}{list(shape)} takes {nbytes} bytes, {span}")
            continue
        tensors.append(TensorInfo(name, path, dtype, shape, base + begin, nbytes))
    for dtype_name, names in unknown.items():
        problems.append(f"{path}: {_some(names)} of dtype {dtype_name}; supported are {_SUPPORTED}")

    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps" if begin < position else "leaves a gap after"
            where = f"data offset {begin} {what} the tensor before it, which ends at {position}"
            problems.append(f"{path}: tensor {name!r} at {where}")
        position = max(position, end)
    if base + position > size:
        cut = [f"{name}: bytes {base + b} to {base + e}" for b, e, name in sorted(spans) if base + e > size]
        problems.append(f"{path}: cut short: it ends at byte {size} of {base + position}, inside {_some(cut)}")
    elif base + position < size and len(spans) == len(header):
        problems.append(f"{path}: the last tensor ends at byte {base + position}, the file at byte {size}")
    return tensors, header.keys() - {info.name for info in tensors}, problems


def _entry(entry: object) -> tuple[str, tuple[int, ...], int, int] | None:
    """`(dtype name, shape, begin, end)` of one header entry, or None when it is malformed."""

    def counts(value: object) -> bool:
        return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)

    match entry:
        case {"dtype": str(dtype), "shape": shape, "data_offsets": [begin, end]}:
            if counts(shape) and counts([begin, end]) and begin <= end:
                return dtype, tuple(shape), begin, end
    return None


def _box(info: TensorInfo, index: tuple[slice, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First index and count in every dimension."""
    if len(index) > len(info.shape) or any(part.step not in (None, 1) for part in index):
        raise ValueError(f"tensor {info.name!r}, shape {info.shape}: {index} must be slices of step 1")
    parts = [*index, *[slice(None)] * (len(info.shape) - len(index))]
    bounds = [part.indices(size)[:2] for part, size in zip(parts, info.shape, strict=True)]
    return tuple(start for start, _ in bounds), tuple(max(stop - start, 0) for start, stop in bounds)


def _read_box(
    read: Callable[[int, np.ndarray], None],
    offset: int,
    dtype: np.dtype,
    dims: tuple[int, ...],
    starts: tuple[int, ...],
    counts: tuple[int, ...],
    out: np.ndarray,
    scratch: np.ndarray,
) -> None:
    """Fill `out` with the box `starts`, `counts` of a row-major array `dims` that begins at byte `offset`.

    `read(offset, buffer)` fills a byte buffer from the file.
    """
    row = math.prod(dims[1:]) * dtype.itemsize
    whole_rows = counts[1:] == dims[1:]
    first = offset + starts[0] * row
    if whole_rows and out.dtype == dtype and out.flags.c_contiguous:
        read(first, out.reshape(-1).view(np.uint8))
        return
    # Whole rows are read even where only some columns are wanted: from the page cache, one large read costs
    # less than a call for every row's part of it.
    rows = len(scratch) // row
    if rows == 0:
        for i in range(counts[0]):
            _read_box(read, first + i * row, dtype, dims[1:], starts[1:], counts[1:], out[i], scratch)
        return
    inner = tuple(slice(start, start + count) for start, count in zip(starts[1:], counts[1:], strict=True))
    for i in range(0, counts[0], rows):
        n = min(rows, counts[0] - i)
        block = scratch[: n * row]
        read(first + i * row, block)
        out[i : i + n] = block.view(dtype).reshape(n, *dims[1:])[(slice(None), *inner)]


def _pread(fd: int, offset: int, buffer: np.ndarray) -> int:
    """Fill a byte buffer from the file, in as many calls as it takes; returns the bytes got."""
    view = buffer.data
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done : done + _MAX_READ_BYTES]], offset + done)
        if got == 0:
            break
        done += got
    return done
