"""What `maxlike train` and `maxlike export` make of their arguments; mistakes are told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

import maxlike.cli
from maxlike.train.command import config_of
from maxlike.train.config import TrainConfig
from tests.train.runs import losses, write_model, write_texts

GIVEN = ["--model", "m", "--data", "d.jsonl", "--output", "o", "--tokens-per-batch", "64"]


def refused(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """The one line that `maxlike ARGV` answers with, its exit code being 2."""
    try:
        code = maxlike.cli.main([str(arg) for arg in argv])
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and err.startswith("maxlike: ") and err.count("\n") == 1, (code, out, err)
    return err


def parsed(*argv: str) -> TrainConfig:
    return config_of(maxlike.cli._parser().parse_args(["train", *argv]))


def test_flags_alone_and_a_file_with_flags(tmp_path: Path) -> None:
    config = parsed(*GIVEN, "--lora-rank", "16", "--learning-rate", "1e-3", "--mesh-fsdp", "4", "--dtype", "float32")
    assert (config.model.path, config.data.train_files, config.output) == ("m", ("d.jsonl",), "o")
    assert config.lora is not None and (config.lora.rank, config.optimizer.learning_rate) == (16, 1e-3)
    assert (config.mesh.fsdp, config.step.dtype) == (4, "float32")
    (tmp_path / "run.yaml").write_text("output: o\nmodel: {path: m}\nsteps: 7\ndata:\n  train_files: [d.jsonl]\n"
                                       "  tokens_per_batch: 64\nlora: {rank: 16}\nmesh: {fsdp: 4}\n"
                                       "optimizer: {learning_rate: 2e-3}\nstep: {dtype: float32}\n")
    assert parsed(str(tmp_path / "run.yaml"), "--steps", "none", "--learning-rate", "1e-3") == config
    assert parsed(*GIVEN).lora is None


@pytest.mark.parametrize(("argv", "says"), [
    ([], "--output is missing"),
    (["--output", "o", "--data", "d"], "--model is missing"),
    ([*GIVEN, "--lerning-rate", "3"], "unrecognized arguments: --lerning-rate; did you mean --learning-rate?"),
    ([*GIVEN, "--learning-rate", "fast"], "optimizer.learning_rate must be a number; got 'fast'"),
    ([*GIVEN, "--steps", "0"], "steps must be above 0"),
    ([*GIVEN, "--checkpoint-keep", "0"], "checkpoint: keep must be 1 or more"),
    (["nowhere.yaml"], "nowhere.yaml cannot be read"),
    ([*GIVEN, "--coordinator", "a:1"], "--num-processes, --process-id is missing"),
    ([*GIVEN, "--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"], "--process-id must be 0 to 1"),
    ([*GIVEN, "--distributed", "--process-id", "2"], "--distributed finds out what --process-id says"),
])  # fmt: skip
def test_mistakes(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert says in refused(capsys, "train", *argv)


def test_unknown_settings_of_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("optimiser: {learning_rate: 3}\n")
    says = refused(capsys, "train", tmp_path / "run.yaml", *GIVEN)
    assert "There is no setting optimiser; did you mean optimizer" in says


@pytest.mark.slow
def test_train_and_export(capsys: pytest.CaptureFixture[str], tmp_path: Path, devices: list[jax.Device],
                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda *_: devices[:1])
    monkeypatch.chdir(tmp_path)
    model, _ = write_model(tmp_path / "model"), write_texts(tmp_path / "data.jsonl")
    assert maxlike.cli.main(["train", "--model", "model", "--data", "data.jsonl", "--output", "run", "--steps", "2",
                             "--tokens-per-batch", "128", "--dtype", "float32", "--from-scratch", "--no-plot"]) == 0
    monkeypatch.chdir("/")
    assert "2 steps" in capsys.readouterr().err and list(losses(tmp_path / "run")) == [1, 2]
    assert "has no adapter" in refused(capsys, "export", tmp_path / "run", tmp_path / "out", "--adapter")
    assert "not empty" in refused(capsys, "export", tmp_path / "run", model)
    assert "There is no folder" in refused(capsys, "export", tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "model").rename(tmp_path / "moved")
    assert "there is no folder" in refused(capsys, "export", tmp_path / "run", tmp_path / "out")
    done = ["export", tmp_path / "run", tmp_path / "out", "--model", tmp_path / "moved", "--dtype", "bfloat16"]
    assert maxlike.cli.main([str(arg) for arg in done]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    capsys.readouterr()
    assert maxlike.cli.main(["generate", "--model", str(tmp_path / "out"), "--prompt", "one", "--max-new-tokens", "3",
                             "--tp", "1"]) == 0
    # Damaged, it is named, and not taken.
    (saved,) = (tmp_path / "run").glob("step_*")
    (saved / "data-0.json").write_text("{}")
    capsys.readouterr()
    says = refused(capsys, "export", saved, tmp_path / "again")
    assert str(saved) in says and "data-0.json" in says
