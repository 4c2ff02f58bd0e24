"""Runs that are killed, stopped, or spread over processes come to what an unbroken one comes to."""

from __future__ import annotations

import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.train.runs import finished, losses, start, write_model, write_texts

pytestmark = pytest.mark.slow
STEPS = 40


def command(folder: Path, output: Path, *more: Any) -> list[Any]:
    return ["train", "--model", folder / "model", "--data", folder / "data.jsonl", "--output", output,
            "--steps", STEPS, "--tokens-per-batch", 128, "--dtype", "float32", "--learning-rate", "3e-3",
            "--warmup-steps", 3, "--checkpoint-every-steps", 2, "--validate-every", 10, "--validation-fraction", 0.2,
            "--no-plot", *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model, data, and an unbroken run."""
    folder = tmp_path_factory.mktemp("runs")
    write_model(folder / "model")
    write_texts(folder / "data.jsonl")
    finished(start(command(folder, folder / "unbroken")))
    found = losses(folder / "unbroken")
    assert list(found) == list(range(1, STEPS + 1)) and found[STEPS] < found[1] - 1
    return folder


def unfinished_saves(output: Path) -> list[Path]:
    return [step for step in output.glob("step_*") if not (step / "manifest.json").exists()]


def test_killed_three_times(folder: Path, tmp_path: Path) -> None:
    """At a random moment, and twice in the middle of a save: bit for bit what an unbroken run gives."""
    draw = random.Random(time.time_ns())
    reached, in_a_save = 0, 0
    for attempt in range(3):
        process = start(command(folder, tmp_path))
        wanted = reached + draw.randint(4, 9)
        while max(losses(tmp_path), default=0) < wanted or (attempt and not unfinished_saves(tmp_path)):
            assert process.poll() is None, finished(process)
            time.sleep(0.001)
        if not attempt:
            time.sleep(draw.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        in_a_save += bool(unfinished_saves(tmp_path))
        reached = max(losses(tmp_path))
    assert in_a_save, "no kill fell into a save"
    told = finished(start(command(folder, tmp_path)))
    assert "going on from" in told
    assert losses(tmp_path) == losses(folder / "unbroken")
    assert losses(tmp_path, "validation") == losses(folder / "unbroken", "validation")


def test_stopped_by_a_signal(folder: Path, tmp_path: Path) -> None:
    process = start(command(folder, tmp_path, "--checkpoint-every-steps", STEPS))
    while max(losses(tmp_path), default=0) < 5:
        assert process.poll() is None, finished(process)
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    told = finished(process)
    (saved,) = tmp_path.glob("step_*")
    assert (saved / "manifest.json").exists()
    assert "stopped by SIGTERM after step" in told and "the same command goes on from there" in told
    finished(start(command(folder, tmp_path)))
    assert losses(tmp_path) == losses(folder / "unbroken")


def as_one_of_two(i: int, port: int) -> list[Any]:
    return ["--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id", i]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_signal_to_one_of_two_processes_stops_both(folder: Path, tmp_path: Path) -> None:
    port = free_port()
    two = [start(command(folder, tmp_path, "--steps", 5000, "--checkpoint-every-steps", 5000, "--validate-every", 5000,
                         *as_one_of_two(i, port))) for i in range(2)]
    while max(losses(tmp_path), default=0) < 5:
        assert all(process.poll() is None for process in two), [finished(process) for process in two]
        time.sleep(0.01)
    two[1].send_signal(signal.SIGTERM)
    told = [finished(process) for process in two]
    assert "stopped by SIGTERM after step" in told[0]
    (saved,) = tmp_path.glob("step_*")
    assert (saved / "manifest.json").exists() and f"step_{max(losses(tmp_path)):08d}" == saved.name


def test_two_processes_train_as_one(folder: Path, tmp_path: Path) -> None:
    port = free_port()
    more = "--mesh-data", 2, "--mesh-model", 2, "--steps", 6, "--tokens-per-batch", 256, "--checkpoint-every-steps", 6
    one = start(command(folder, tmp_path / "one", *more), devices=8)
    finished(one)
    two = [start(command(folder, tmp_path / "two", *more, *as_one_of_two(i, port)), devices=4) for i in range(2)]
    told = [finished(process) for process in two]
    assert "6 steps" in told[0] and "6 steps" not in told[1]
    for kind in ("train", "validation"):
        expected, found = losses(tmp_path / "one", kind), losses(tmp_path / "two", kind)
        assert found == pytest.approx(expected, abs=1e-4)
    # One process, of fewer devices, goes on with what two have saved, and is fed the same batches.
    told_one = finished(start(command(folder, tmp_path / "two", *more, "--steps", 7, "--mesh-data", 1), devices=2))
    assert "after step 6 of 7" in told_one
    assert list(losses(tmp_path / "two")) == list(range(1, 8))
