"""The safetensors reader and writer against the `safetensors` library, and against broken files."""

import json
import os
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from maxlike.models import safetensors as st
from maxlike.models.safetensors import Checkpoint, CheckpointError, write_checkpoint

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
F8A, F8B = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)


def random(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0, 100, shape).astype(dtype)
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def zoo():
    """Every dtype, and every rank from 0 to 4, empty ones included."""
    tensors = {f"rank{n}": random((2, 3, 4, 5)[:n], BF16, n) for n in range(5)}
    tensors |= {
        "empty": random((0,), F32),
        "empty_rows": random((0, 7), BF16),
        "empty_columns": random((7, 0), F16),
    }
    tensors |= {str(dtype): random((3, 5), dtype) for dtype in st._DTYPES.values()}
    tensors['näme, "quoted"\n'] = random((1,), F32)
    return tensors


def save(folder, tensors, **options):
    write_checkpoint(folder, [(k, v.shape, v.dtype, lambda v=v: v) for k, v in tensors.items()], **options)


def read(checkpoint, name, index=(), dtype=None):
    info = checkpoint.tensors[name]
    shape = np.broadcast_to(np.empty((), bool), info.shape)[index].shape
    out = np.empty(shape, dtype or info.dtype)
    checkpoint.read_into(name, out, index)
    return out


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def raw(path, header, data=b"", length=None):
    """A safetensors file with any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def f32(begin, end, shape=None):
    return {"dtype": "F32", "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


# -- the library writes, we read


def test_reads_what_the_library_writes(tmp_path):
    tensors = zoo()
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.problems == [] and checkpoint.lost == frozenset()
        assert checkpoint.tensors.keys() == tensors.keys()
        for name, value in tensors.items():
            info = checkpoint.tensors[name]
            assert (info.name, info.dtype, info.shape, info.nbytes) == (
                name,
                value.dtype,
                value.shape,
                value.nbytes,
            )
            same(read(checkpoint, name), value)


def test_reads_bfloat16_that_torch_writes(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    value = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4).to(torch.bfloat16)
    save_file({"x": value}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        same(read(checkpoint, "x"), np.arange(24, dtype=np.float32).reshape(2, 3, 4).astype(BF16))


def slices(size):
    return [slice(None), slice(0, 1), slice(1, size), slice(size // 2, size), slice(1, 1), slice(-1, None)]


@pytest.mark.parametrize("scratch", [8, 64, 2 << 20])  # smaller than a row, some rows, everything
@pytest.mark.parametrize("dtype", [None, F32, F8B])
def test_slices_in_every_dimension(tmp_path, monkeypatch, scratch, dtype):
    monkeypatch.setattr(st, "_SCRATCH_BYTES", scratch)
    tensors = {f"rank{n}": random((3, 4, 5, 6)[:n], BF16, n) for n in range(1, 5)}
    save(tmp_path, tensors)
    with Checkpoint.open(tmp_path) as checkpoint:
        for value in tensors.values():
            name = f"rank{value.ndim}"
            for index in product(*(slices(size) for size in value.shape)):
                same(read(checkpoint, name, index, dtype), value[index].astype(dtype or BF16))
            for n in range(value.ndim):  # fewer slices than dimensions
                index = (slice(1, 3),) * n
                same(read(checkpoint, name, index), value[index])


@pytest.mark.parametrize("source", [F32, F16, BF16, F8A, F8B, np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize("target", [F32, F16, BF16, F8A, F8B, np.dtype(np.float64)], ids=str)
def test_casts_while_reading(tmp_path, monkeypatch, source, target):
    monkeypatch.setattr(st, "_SCRATCH_BYTES", 256)  # several blocks
    value = random((17, 33), source)
    value[0, :4] = [0.0, -0.0, np.nan, 1.0]
    save(tmp_path, {"x": value, "scalar": value[3, 3]})
    with Checkpoint.open(tmp_path) as checkpoint:
        same(read(checkpoint, "x", (), target), value.astype(target))
        same(read(checkpoint, "x", (slice(2, 9), slice(3, 30)), target), value[2:9, 3:30].astype(target))
        same(read(checkpoint, "scalar", (), target), value[3, 3].astype(target))


@pytest.mark.parametrize("scratch", [16, 2 << 20])
def test_fills_arrays_that_are_not_contiguous(tmp_path, monkeypatch, scratch):
    monkeypatch.setattr(st, "_SCRATCH_BYTES", scratch)
    value = random((6, 10), F32)
    save(tmp_path, {"x": value})
    with Checkpoint.open(tmp_path) as checkpoint:
        wide = np.full((6, 30), 7, np.float32)
        checkpoint.read_into("x", wide[:, 10:20])
        assert (wide[:, 10:20] == value).all() and (wide[:, :10] == 7).all() and (wide[:, 20:] == 7).all()
        transposed = np.empty((10, 6), BF16)
        checkpoint.read_into("x", transposed.T)
        same(np.ascontiguousarray(transposed.T), value.astype(BF16))
        strided = np.zeros((12, 20), np.float32)
        checkpoint.read_into("x", strided[::2, ::-2], (slice(0, 6),))
        assert (strided[::2, ::-2] == value).all() and (strided[1::2] == 0).all()


def test_short_reads_are_continued(tmp_path, monkeypatch):
    value = random((50, 20), F32)
    save(tmp_path, {"x": value})
    preadv = os.preadv
    with Checkpoint.open(tmp_path) as checkpoint:
        monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:7]], offset))
        same(read(checkpoint, "x"), value)
        same(read(checkpoint, "x", (slice(None), slice(3, 8)), BF16), value[:, 3:8].astype(BF16))


def test_memory_beyond_the_result_is_a_few_megabytes(tmp_path):
    rows, columns = 4096, 4096  # 64 MB
    block = random((64, columns), F32)
    save(tmp_path, {"x": np.tile(block, (rows // 64, 1))})
    out = np.empty((rows, columns), BF16)
    part = np.empty((rows, columns // 8), np.float32)
    with Checkpoint.open(tmp_path) as checkpoint:
        tracemalloc.start()
        try:
            checkpoint.read_into("x", out)
            checkpoint.read_into("x", part, (slice(None), slice(512, 1024)))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 3 << 20
    same(out[-64:], block.astype(BF16))
    same(part[-64:], block[:, 512:1024])


@pytest.mark.parametrize(
    ("name", "out", "index", "says"),
    [
        ("x", np.empty((2, 4), np.float32), (), r"shape \(2, 3\), the array to fill \(2, 4\)"),
        ("x", np.empty((2, 3), np.int32), (), "float32: it cannot be read into int32"),
        ("i", np.empty(4, np.float32), (), "int64: it cannot be read into float32"),
        ("x", np.empty((1, 3), np.float32), (slice(0, 2, 2),), "slices of step 1"),
        ("x", np.empty((2, 3, 1), np.float32), (slice(None),) * 3, "slices of step 1"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, name, out, index, says):
    save(tmp_path, {"x": random((2, 3), F32), "i": random((4,), np.dtype(np.int64))})
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(ValueError, match=f"{name!r}.*{says}"):
        checkpoint.read_into(name, out, index)


# -- we write, the library reads


def test_library_reads_what_we_write(tmp_path):
    tensors = zoo()
    save(tmp_path, tensors)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    read_back = dict(safetensors.deserialize((tmp_path / "model.safetensors").read_bytes()))
    assert read_back.keys() == tensors.keys()
    for name, value in tensors.items():
        entry = read_back[name]
        assert tuple(entry["shape"]) == value.shape and bytes(entry["data"]) == value.tobytes()
        assert st._DTYPES[entry["dtype"]] == value.dtype
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_are_aligned(tmp_path):
    save(tmp_path, {"a": random((3,), F8A), "b": random((1,), np.dtype(np.float64)), "c": random((5,), BF16)})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert all(info.offset % info.dtype.itemsize == 0 for info in checkpoint.tensors.values())


def test_shards(tmp_path):
    tensors = {f"t{i:02}": random((10, 10), F32, i) for i in range(10)}  # 400 bytes each
    tensors["large"] = random((50, 10), F32)  # larger than a shard may be
    save(tmp_path, tensors, max_shard_bytes=1000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert sorted(os.listdir(tmp_path)) == [
        *sorted(set(index["weight_map"].values())),
        "model.safetensors.index.json",
    ]
    assert index["weight_map"]["t00"] == "model-00001-of-00006.safetensors"
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / file, "np") as shard:
            same(shard.get_tensor(name), tensors[name])
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.problems == []
        for name, value in tensors.items():
            assert checkpoint.tensors[name].file.name == index["weight_map"][name]
            same(read(checkpoint, name), value)


def test_transformers_loads_what_we_write(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    config.save_pretrained(tmp_path)
    for limit in (10**9, 4000):
        save(tmp_path, state, max_shard_bytes=limit)
        loaded, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[name])


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    size = 1 << 20
    sources = [
        (f"t{i}", (size,), np.dtype(np.uint8), lambda i=i: np.full(size, i, np.uint8)) for i in range(20)
    ]
    tracemalloc.start()
    try:
        write_checkpoint(tmp_path, sources, max_shard_bytes=5 * size)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * size
    with Checkpoint.open(tmp_path) as checkpoint:
        assert all((read(checkpoint, f"t{i}") == i).all() for i in range(20))


def test_rewriting_replaces_the_earlier_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"kept")
    tensors = {f"t{i}": random((10,), F32, i) for i in range(6)}
    save(tmp_path, tensors, max_shard_bytes=80)
    save(tmp_path, tensors, max_shard_bytes=120)
    kept = ["adapter_model.safetensors", "config.json"]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, *shards, "model.safetensors.index.json"])
    with Checkpoint.open(tmp_path) as old:  # read from the files being replaced
        write_checkpoint(
            tmp_path,
            [(i.name, i.shape, i.dtype, lambda i=i: read(old, i.name)) for i in old.tensors.values()],
        )
    assert sorted(os.listdir(tmp_path)) == [*kept, "model.safetensors"]
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, value in tensors.items():
            same(read(checkpoint, name), value)


def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path):
    save(tmp_path, {"x": random((4,), F32)})
    before = (tmp_path / "model.safetensors").read_bytes()

    def broken():
        raise RuntimeError("device lost")

    good = ("a", (4,), F32, lambda: np.zeros(4, np.float32))
    for source, error, says in [
        (("b", (4,), F32, broken), RuntimeError, "device lost"),
        (
            ("b", (4,), F32, lambda: np.zeros(5, np.float32)),
            ValueError,
            r"'b'.*float32\[4\] but is float32\[5\]",
        ),
        (("b", (4,), F32, lambda: np.zeros(4)), ValueError, r"'b'.*float32\[4\] but is float64\[4\]"),
        (("a", (4,), F32, broken), ValueError, "'a' is given twice"),
        (("b", (4,), np.dtype(np.complex64), broken), ValueError, "'b'.*complex64"),
        (("__metadata__", (4,), F32, broken), ValueError, "__metadata__"),
    ]:
        with pytest.raises(error, match=says):
            write_checkpoint(tmp_path, [good, source], max_shard_bytes=16)
        assert os.listdir(tmp_path) == ["model.safetensors"]
        assert (tmp_path / "model.safetensors").read_bytes() == before


# -- which files


def test_any_safetensors_files_will_do_without_an_index(tmp_path):
    a, b = random((3,), F32, 1), random((4,), F32, 2)
    safetensors.numpy.save_file({"a": a}, tmp_path / "one.safetensors")
    safetensors.numpy.save_file({"b": b}, tmp_path / "two.safetensors")
    safetensors.numpy.save_file(
        {"z": b}, tmp_path / "consolidated.safetensors"
    )  # not under Hugging Face names
    with Checkpoint.open(str(tmp_path)) as checkpoint:
        assert checkpoint.problems == [] and checkpoint.tensors.keys() == {"a", "b"}
        same(read(checkpoint, "b"), b)
    safetensors.numpy.save_file({"a": a}, tmp_path / "three.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        [problem] = checkpoint.problems
    assert "'a' is in" in problem and "one.safetensors" in problem and "three.safetensors" in problem


def test_nothing_to_read(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: there is no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"looked for model\.safetensors, model\.safetensors\.index\.json"
    ):
        Checkpoint.open(tmp_path)
    for name in ("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "consolidated.00.pth"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"4 files \(consolidated\.00\.pth, .*convert") as raised:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in str(raised.value) and len(raised.value.problems) == 1


# -- broken files: every problem is found in one go, by name


def problems_of(folder, *, count=1):
    with Checkpoint.open(folder) as checkpoint:
        assert len(checkpoint.problems) == count, checkpoint.problems
        assert all("\n" not in problem for problem in checkpoint.problems)
        return "\n".join(checkpoint.problems)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "only 0 bytes"),
        (b"abc", "only 3 bytes"),
        (struct.pack("<Q", 1000) + b"{}", "announce a header of 1000 bytes, but it has 10"),
        (b"PK\x03\x04" + b"\xff" * 60, "announce a header of"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (struct.pack("<Q", 8) + b"{\"a\": 1,", "header is not JSON"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "header is not JSON"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "header is not JSON"),
        (struct.pack("<Q", 4) + b"[{}]", "header is a JSON list"),
    ],
)  # fmt: skip
def test_garbage_instead_of_a_header(tmp_path, content, says):
    (tmp_path / "model.safetensors").write_bytes(content)
    text = problems_of(tmp_path)
    assert says in text and str(tmp_path / "model.safetensors") in text


@pytest.mark.parametrize(
    ("header", "nbytes", "says"),
    [
        ({"a": f32(0, 8), "b": {"dtype": "F32", "shape": [2]}}, 8, "'b': expected dtype, shape and"),
        ({"a": f32(0, 8), "b": 3}, 8, "'b': expected dtype, shape"),
        ({"a": f32(0, 8), "b": f32(8, 16, [-2])}, 16, "'b': expected"),
        ({"a": f32(0, 8), "b": f32(8, 16, [2.0])}, 16, "'b': expected"),
        ({"a": f32(0, 8), "b": f32(8, 16, [True, 2])}, 16, "'b': expected"),
        ({"a": f32(0, 8), "b": {**f32(8, 16), "data_offsets": [16, 8]}}, 16, "'b': expected"),
        ({"a": f32(0, 8), "b": {**f32(8, 16), "data_offsets": [8, 16, 24]}}, 16, "'b': expected"),
        ({"a": f32(0, 8), "b": f32(8, 16, [3])}, 16, "'b': F32[3] takes 12 bytes, its data_offsets"),
        ({"a": f32(0, 8), "b": f32(4, 12)}, 12, "'b' at data offset 4 overlaps the tensor before it"),
        ({"a": f32(0, 8), "b": f32(12, 20)}, 20, "'b' at data offset 12 leaves a gap"),
        ({"a": f32(0, 8)}, 12, "ends at byte"),
        (
            {"a": f32(0, 8), "b": {**f32(8, 16), "dtype": "F4"}, "c": {**f32(16, 24), "dtype": "F4"}},
            24,
            "2 tensors (b, c) of dtype F4; supported are F8_E4M3",
        ),
    ],
)  # fmt: skip
def test_headers_that_contradict_themselves(tmp_path, header, nbytes, says):
    raw(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}, **header}, bytes(nbytes))
    assert says in problems_of(tmp_path)
    with Checkpoint.open(
        tmp_path
    ) as checkpoint:  # what is sound is there still, what is not is known as lost
        assert "a" in checkpoint.tensors
        assert checkpoint.lost | checkpoint.tensors.keys() == header.keys()
        assert not checkpoint.lost & checkpoint.tensors.keys()


def test_truncated_file(tmp_path):
    tensors = {f"t{i}": random((100,), F32, i) for i in range(8)}
    save(tmp_path, tensors)
    path = tmp_path / "model.safetensors"
    whole = path.stat().st_size
    os.truncate(path, whole - 4 * 400 - 100)  # t3 in part, t4 to t7 wholly
    cut = whole - 1700
    text = problems_of(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        begin = checkpoint.tensors["t3"].offset
        assert (
            f"ends at byte {cut} of {whole}, inside 5 tensors (t3: bytes {begin} to {begin + 400}, t4:"
            in text
        )
        same(read(checkpoint, "t2"), tensors["t2"])
        for name in ("t3", "t7"):
            with pytest.raises(
                CheckpointError, match=rf"model\.safetensors: the file ends at byte \d+, inside.*'{name}'"
            ):
                read(checkpoint, name)
        with pytest.raises(CheckpointError, match="'t3'"):
            read(checkpoint, "t3", (slice(50, 100),), BF16)


def test_all_problems_of_a_sharded_checkpoint_at_once(tmp_path):
    tensors = {f"t{i}": random((100,), F32, i) for i in range(12)}
    save(tmp_path, tensors, max_shard_bytes=800)  # six shards of two
    shards = sorted(tmp_path.glob("model-*"))
    shards[0].unlink()
    os.truncate(shards[1], shards[1].stat().st_size - 1)
    shards[2].write_bytes(b"garbage!" * 10)
    safetensors.numpy.save_file({"t6": tensors["t6"], "extra": tensors["t6"]}, shards[3])
    text = problems_of(tmp_path, count=4)
    assert f"{shards[0]}: the file is missing; the index places 2 tensors (t0, t1) there" in text
    assert f"{shards[1]}: cut short" in text and "1 tensor (t3: bytes" in text
    assert f"{shards[2]}: no safetensors file" in text
    assert f"{shards[3]}: lacks 1 tensor (t7), placed there by model.safetensors.index.json" in text
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.lost == {"t0", "t1", "t4", "t5", "t7"}
        assert checkpoint.tensors.keys() == {"t2", "t3", "t6", "t8", "t9", "t10", "t11", "extra"}
        same(read(checkpoint, "t11"), tensors["t11"])
    error = CheckpointError(text.splitlines())
    assert isinstance(error, ValueError) and len(error.problems) == 4 and str(error) == text


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[1]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 3}}',
        b'{"weight_map": {"a": "../a"}}',
        b"\xff",
    ],
)
def test_index_that_is_no_index(tmp_path, index):
    save(tmp_path, {"t0": random((4,), F32), "t1": random((4,), F32)}, max_shard_bytes=16)
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    assert "model.safetensors.index.json" in problems_of(tmp_path)
    with Checkpoint.open(
        tmp_path
    ) as checkpoint:  # the shards are found nevertheless: no second list of missing ones
        assert checkpoint.tensors.keys() == {"t0", "t1"}


def test_every_truncation_is_noticed(tmp_path):
    save(tmp_path, {"a": random((2, 3), BF16), "b": random((3,), F32)})
    path: Path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with Checkpoint.open(tmp_path) as checkpoint:
            assert checkpoint.problems, size


def test_threads_may_read_at_once(tmp_path):
    tensors = {f"t{i}": random((64, 64), BF16, i) for i in range(8)}
    save(tmp_path, tensors)
    with Checkpoint.open(tmp_path) as checkpoint, ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            jobs = {
                name: pool.submit(read, checkpoint, name, (slice(None), slice(8, 40)), F32)
                for name in tensors
            }
            for name, job in jobs.items():
                same(job.result(), tensors[name][:, 8:40].astype(F32))
