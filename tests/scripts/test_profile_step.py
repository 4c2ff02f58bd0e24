"""Profiling a step: the table tells true operations and places, the trace can be read, a crash is told as one."""

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "profile_step.py"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import profile_step
        import top_operations

        yield profile_step, top_operations
    finally:
        sys.path.remove(str(SCRIPT.parent))


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | variables
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("phase", "names", "files"), [
    ("decode", {"forward", "greedy"}, {"nn/linear.py", "kernels/paged_attention/xla.py"}),
    pytest.param("train", {"step"}, {"nn/linear.py", "kernels/ragged_attention/xla.py", "train/optimizer.py"},
                 marks=pytest.mark.slow),
])
def test_profile(phase: str, names: set[str], files: set[str], tmp_path: Path) -> None:
    config = json.loads((ROOT / "maxlike" / "embedded" / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    # As users have it: one device, and programs that are optimised, whose products then take their share.
    done = run(phase, "--model", str(tmp_path), "--sequences", "2", "--length", "64", "--steps", "2", "--json",
               "--output", str(tmp_path / "a folder"), XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    rows = figures["operations"]
    assert {row["program"] for row in rows} == names
    assert [row["self_ms"] for row in rows] == sorted((row["self_ms"] for row in rows), reverse=True)
    # What ran is a model: its products are there, and most of the time has a place in the source. Which of the
    # operations comes first hangs on what else the machine does.
    total = sum(row["self_ms"] for row in rows)
    assert sum(row["self_ms"] for row in rows if "dot" in row["kind"]) > 0.05 * total, rows[:5]
    placed = [(row, match) for row in rows if (match := re.search(r"(\S+\.py):(\d+)", row["where"]))]
    assert sum(row["self_ms"] for row, _ in placed) > 0.6 * total
    assert files <= {match[1] for _, match in placed}
    for row, match in placed:
        # Of a custom gradient the place is that of the function's call.
        if row["kind"] == "fusion (dot)" and match[1] == "nn/linear.py" and not row["where"].startswith("near"):
            line = (ROOT / "maxlike" / match[1]).read_text().splitlines()[int(match[2]) - 1]
            assert re.search("einsum|dot_general|matmul", line), (row, line)
    if phase == "decode":  # the head's product ran once in each of the two steps
        (products,) = [row for row in rows if row["program"] == "greedy" and "dot" in row["kind"]]
        assert products["calls"] == 2 and "ColumnParallelLinear" in products["where"]
    # No thread can be busy for longer than the steps took; of threads there may be some more than cores.
    assert 0 < total < figures["step_ms"] * figures["steps"] * 2 * (os.cpu_count() or 1)

    folder = Path(figures["trace"])
    (trace,) = folder.glob("*.xplane.pb")
    steps = {dict(event.stats).get("step_num") for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
             for line in plane.lines for event in line.events if event.name == phase}
    assert {0, 1} <= steps
    events = json.loads(gzip.decompress((folder / "perfetto_trace.json.gz").read_bytes()))["traceEvents"]
    assert phase in {event.get("name") for event in events}


def test_a_profiler_that_crashes_is_told_from_a_program_that_fails(tmp_path: Path) -> None:
    (tmp_path / "jax.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    done = run("decode", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"crashed (SIGSEGV) under jax {jax.__version__}" in done.stderr and "newer jax" in done.stderr
    (tmp_path / "jax.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert "memory runs out" in run("decode", PYTHONPATH=str(tmp_path)).stderr


def test_bad_input_takes_one_line() -> None:
    done = run("decode", "--tp", "3", "--here")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "3" in done.stderr
    assert "'0'" in run("prefill", "--length", "0").stderr
    assert "decode has no --remat" in run("decode", "--remat", "full").stderr
    assert "train has no --attention and no --kv-cache-dtype" in run(
        "train", "--attention", "xla", "--kv-cache-dtype", "float32").stderr
    told = run("--help")
    assert told.returncode == 0 and "{decode,prefill,train}" in told.stdout


def test_the_readme_tells_every_option(scripts: tuple[ModuleType, ModuleType]) -> None:
    profile_step, _ = scripts
    told = (ROOT / "README.md").read_text().split("## What takes the time")[1].split("\n## ")[0]
    options = {option for action in profile_step.parser()._actions for option in action.option_strings}
    assert options - {"-h", "--help"} == {option for option in options if f"`{option}`" in told}


def events(*events: tuple[int, int, int]) -> str:
    """As a text proto: metadata id, start and duration in picoseconds."""
    return " ".join(f"events {{ metadata_id: {i} offset_ps: {start} duration_ps: {duration} }}"
                    for i, start, duration in events)


def names_of(*names: str) -> str:
    """What the ids from 1 stand for."""
    return "\n".join(f"event_metadata {{ key: {i} value {{ id: {i} name: \"{name}\" }} }}"
                     for i, name in enumerate(names, 1))


# A TPU's trace: a loop of 10 ns around two operations of 3 and 4 on each of two chips, then one of the second program.
TPU = "\n".join(f"""
planes {{ name: "/device:TPU:{chip}"
  lines {{ name: "XLA Modules" {events((1, 0, 11000), (2, 20000, 5000))} }}
  lines {{ name: "XLA Ops"
    {events((3, 1000, 10000), (4, 2000, 3000), (5, 6000, 4000), (4, 20000, 2000 + 2000 * chip))} }}
  lines {{ name: "Async XLA Ops" {events((5, 0, 9000))} }}
  {names_of("jit_forward(123)", "jit_greedy(4)", "%while.7 = (s32[], f32[8]) while(%tuple)",
            "%fusion.1 = f32[8]{0} fusion(%p), kind=kOutput", "%copy.2 = f32[8]{0} copy(%p)")} }}
planes {{ name: "/host:CPU" }}""" for chip in (0, 1))
# As a TPU's compiler writes programs: tiled layouts, frames whose parents are numbered one too high.
HLO = """HloModule jit_forward, is_scheduled=true

FileNames
1 "PACKAGE/nn/mlp.py"
2 "PACKAGE/nn/linear.py"
3 "elsewhere.py"

FunctionNames
1 "MLP.__call__"
2 "matmul"
3 "main"

FileLocations
1 {file_name_id=3 function_name_id=3 line=9 end_line=9 column=0 end_column=0}
2 {file_name_id=1 function_name_id=1 line=48 end_line=48 column=0 end_column=0}
3 {file_name_id=2 function_name_id=2 line=64 end_line=64 column=0 end_column=0}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

%fused_computation (param: bf16[8,128]) -> f32[8] {
  %param = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %convolution.3 = f32[8]{0:T(128)} convolution(%param, %param), metadata={BACKWARD stack_frame_id=3}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  %fusion.1 = f32[8]{0:T(128)} fusion(%p), calls=%fused_computation, metadata={op_name="add" stack_frame_id=2}
  %copy.2 = f32[8]{0:T(128)} copy(%fusion.1)
  ROOT %while.7 = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%copy.2), body=%b, metadata={op_name="jit(forward)/while"}
}
""".replace("BACKWARD", 'op_name="jit(forward)/transpose(jvp())/dot_general"')


def test_a_tpu_trace(scripts: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    _, top = scripts
    ran = top.device_events(jax.profiler.ProfileData.from_text_proto(TPU))
    rows = top.top_operations(ran, {"forward": HLO.replace("PACKAGE", str(tmp_path))}, tmp_path)
    found = {(row.program, row.kind, row.where): (round(row.self_ms * 1e6), row.calls) for row in rows}
    assert found == {  # nanoseconds, the mean of two chips
        ("forward", "fusion (convolution)", "MLP > matmul  nn/linear.py:64, backward"): (3, 1),
        ("forward", "copy", "near MLP > matmul  nn/linear.py:64, backward"): (4, 1),
        ("forward", "while", "while"): (3, 1),
        ("greedy", "fusion", ""): (3, 1),
    }
    text = top.as_table(rows, 1, 1)
    assert "30.8%" in text and text.splitlines()[-1].split()[3:] == ["3", "others"]


def test_a_gpu_trace(scripts: tuple[ModuleType, ModuleType]) -> None:
    _, top = scripts
    profile = jax.profiler.ProfileData.from_text_proto(f"""
planes {{ name: "/device:GPU:0"
  lines {{ name: "Stream #13(Compute)"
    events {{ metadata_id: 1 offset_ps: 0 duration_ps: 3000
              stats {{ metadata_id: 1 str_value: "gemm.5" }} stats {{ metadata_id: 2 str_value: "jit_forward" }} }}
    {events((2, 5000, 1000))} }}
  lines {{ name: "XLA Ops" {events((1, 0, 3000))} }}
  {names_of("nvjet_tst", "MemcpyD2D")}
  stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }}
  stat_metadata {{ key: 2 value {{ id: 2 name: "hlo_module" }} }} }}
planes {{ name: "/host:CPU" }}""")
    rows = top.top_operations(top.device_events(profile), {}, ROOT)
    assert [(row.program, row.kind, round(row.self_ms * 1e6)) for row in rows] == [
        ("forward", "gemm", 3), ("", "MemcpyD2D", 1)]


def test_a_loop_is_not_charged_with_what_other_threads_did_in_it(scripts: tuple[ModuleType, ModuleType]) -> None:
    _, top = scripts
    event = top.Event
    times = top.self_times([
        event("cpu 0", "step", "while.1", 0.0, 100.0), event("cpu 0", "step", "dot.1", 10.0, 40.0),
        event("cpu 0", "step", "dot.2", 20.0, 60.0),  # on another thread, beside the first
        event("cpu 1", "step", "dot.1", 60.0, 90.0),  # another device's
    ])
    assert {(e.device, e.instruction): own for e, own in times} == {
        ("cpu 0", "while.1"): 50.0, ("cpu 0", "dot.1"): 30.0, ("cpu 0", "dot.2"): 40.0, ("cpu 1", "dot.1"): 30.0}
