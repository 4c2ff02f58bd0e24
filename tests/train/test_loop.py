"""Whole runs in this process: what they leave behind, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from maxlike.train.checkpoint import find_checkpoint
from maxlike.train.config import TrainConfig
from maxlike.train.loop import Summary, train
from maxlike.train.settings import build, read_yaml
from tests.compilation_cache import compiling_once
from tests.train.runs import losses, write_model, write_texts

FSDP = dict(data=1, fsdp=8, model=1)


@pytest.fixture
def one_device(devices: list[jax.Device], monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one device alone: programs for eight take long on few cores."""
    monkeypatch.setattr(jax, "devices", lambda *_: devices[:1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("runs")
    write_model(folder / "model")
    write_texts(folder / "data.jsonl")
    with compiling_once(folder / "programs"):
        yield folder


def settings(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = dict(
        output=str(output), steps=6, model=dict(path=str(folder / "model")),
        data=dict(train_files=[str(folder / "data.jsonl")], tokens_per_batch=512),
        step=dict(dtype="float32"), optimizer=dict(learning_rate=3e-3), log=dict(plot=False, quiet=True))
    for key, value in changes.items():
        found[key] = found.get(key, {}) | value if isinstance(value, dict) else value
    return found


def run(folder: Path, output: Path, **changes: Any) -> Summary:
    return train(build(TrainConfig, settings(folder, output, **changes)), version="test")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=2, model=2), dict(data=1, fsdp=1, model=8)], ids=str)
def test_goes_on_on_another_mesh_with_layers_unrolled(folder: Path, tmp_path: Path, mesh: dict[str, int]) -> None:
    scanned: dict[str, Any] = dict(model=dict(scan_layers=True), mesh=FSDP)
    run(folder, tmp_path / "unbroken", **scanned)
    run(folder, tmp_path / "broken", steps=3, optimizer=dict(total_steps=6), **scanned)
    summary = run(folder, tmp_path / "broken", mesh=mesh, model=dict(scan_layers=False), optimizer=dict(total_steps=6))
    assert (summary.steps, summary.of_steps, summary.resumed_at) == (6, 6, 3)
    expected = losses(tmp_path / "unbroken")
    assert losses(tmp_path / "broken") == pytest.approx(expected, abs=1e-4)
    assert expected[6] < expected[1] - 0.1


def test_what_a_run_leaves(one_device: None, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text((folder / "data.jsonl").read_text() + "{\n" + json.dumps({"text": 3}) + "\n")
    changes: dict[str, Any] = dict(
        steps=None, validate_every=2, log=dict(plot=True, tensorboard=True), checkpoint=dict(every_steps=1, keep=1),
        data=dict(train_files=[str(tmp_path / "data.jsonl")], on_bad_data="skip", epochs=2,
                  validation_files=[str(write_texts(tmp_path / "held.jsonl", n=8, seed=1))]))
    summary = run(folder, tmp_path / "out", **changes)
    assert summary.steps == summary.of_steps > 2 and summary.stopped_by is None
    total, *each = summary.left_out.splitlines()
    assert total == "2 of 66 records were left out (1 not json, 1 wrong type)"
    assert len(each) == 2
    assert "data.jsonl, line 65: not JSON" in each[0] and "data.jsonl, line 66: text must be a string" in each[1]
    measured = losses(tmp_path / "out", "validation")
    assert list(measured) == [*range(2, summary.steps, 2), summary.steps]
    saved = sorted(path.name for path in (tmp_path / "out").glob("step_*"))
    best = min(measured, key=measured.__getitem__)
    assert saved == sorted({f"step_{summary.steps:08d}", f"step_{best:08d}"})
    assert find_checkpoint(tmp_path / "out", best=True, tell=pytest.fail).value == measured[best] == summary.best_loss
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "out" / "tensorboard").glob("events.*"))
    # The configuration that was used can be used again, and says that there is nothing left to do.
    again = build(TrainConfig, read_yaml((tmp_path / "out" / "config.yaml").read_text(), "config.yaml"))
    assert train(again, version="test").tokens == 0
    assert losses(tmp_path / "out", "validation") == measured


def test_a_loss_that_is_no_number_ends_the_run(one_device: None, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"At step 2 the loss is .*(nan|inf).*checkpoint of step 1 is from before"):
        run(folder, tmp_path, optimizer=dict(learning_rate=1e30, schedule="constant"), checkpoint=dict(every_steps=1))
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000001"]
    assert find_checkpoint(tmp_path, tell=pytest.fail).step == 1


def test_accumulation_takes_the_batches_of_one_step_together(one_device: None, folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, steps=2, step=dict(accumulation=2), data=dict(tokens_per_batch=256))
    assert list(losses(tmp_path)) == [1, 2]


@pytest.mark.slow
def test_preferences(one_device: None, folder: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{i} or", "chosen": f" {i} yes", "rejected": f" no {i}"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    changes: dict[str, Any] = dict(data=dict(train_files=[str(tmp_path / "pairs.jsonl")], validation_fraction=0.2),
                                   lora=dict(rank=2), optimizer=dict(learning_rate=1e-2, total_steps=6))
    run(folder, tmp_path / "unbroken", **changes)
    run(folder, tmp_path / "out", steps=4, **changes)
    run(folder, tmp_path / "out", **changes)
    found = losses(tmp_path / "out")
    assert found[1] == pytest.approx(0.6931, abs=1e-3)  # log 2, policy and reference being the same
    assert found == losses(tmp_path / "unbroken")  # the reference is the model from before the first step
    assert found[6] < found[1] - 0.01


@pytest.mark.slow
def test_folders_with_a_run_in_them(one_device: None, folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "a", steps=1)
    run(folder, tmp_path / "b", steps=2, checkpoint=dict(resume=str(tmp_path / "a")))
    assert list(losses(tmp_path / "b")) == [2]  # goes on, and leaves the other folder alone
    for resume, says in (("never", "is to begin anew, but"), (str(tmp_path / "a"), "go on from .*a, but")):
        with pytest.raises(ValueError, match=f"(?s){says}.*step_00000002"):
            run(folder, tmp_path / "b", checkpoint=dict(resume=resume))
    damaged = tmp_path / "a" / "step_00000001"
    (damaged / "about.json").write_text("{}")
    with pytest.raises(ValueError, match=r"(?s)step_00000001 cannot be used.*about.json has 2 bytes instead of"):
        run(folder, tmp_path / "c", checkpoint=dict(resume=str(damaged)))


@pytest.mark.parametrize(("changes", "says"), [
    (dict(mesh=dict(fsdp=4)), "does not use the 8 devices"),
    (dict(mesh=dict(fsdp=1, model=3, data=1)), "does not use the 8 devices"),
    (dict(data=dict(shards=3, tokens_per_batch=513), mesh=FSDP), "data.shards must be a multiple of the 8"),
    (dict(data=dict(epochs=None), steps=None), "data.epochs is none, without end"),
    (dict(data=dict(train_files=["nowhere.jsonl"])), "nowhere.jsonl"),
    (dict(model=dict(path="nowhere/to/be/found")), "there is no folder"),
    (dict(validate_every=2), "validate_every measures on what is held out, and nothing is: give data.validation_files"),
    (dict(steps=float("inf")), "steps must be a whole number"),
    (dict(optimizer=dict(name="adamx")), "adamx"),
    (dict(lora=dict(target_modules=["nothing"])), "nothing"),
    (dict(mesh=dict(data=0)), "does not use the 8 devices"),
    (dict(lora=dict(rank=2), model=dict(from_scratch=True)), "leave one of them out"),
    (dict(optimizer=dict(warmup_steps=6)), "needs more than the 6 of warm-up"),
])  # fmt: skip
def test_refused(folder: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as error:
        run(folder, tmp_path, **changes)
    assert says in str(error.value)
    assert not list(tmp_path.glob("step_*"))


def test_bad_validation_data_are_refused_before_the_first_step(one_device: None, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"text": "one"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r"held\.jsonl, line 2: text must be a string; got 3"):
        run(folder, tmp_path / "out", data=dict(validation_files=[str(tmp_path / "held.jsonl")]))
    assert not losses(tmp_path / "out")


def test_a_vocabulary_that_is_too_small(one_device: None, folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model", vocab_size=64)
    with pytest.raises(ValueError, match=r"a token of id \d+, and the model's vocabulary has 64"):
        run(folder, tmp_path / "out", steps=1, model=dict(path=str(tmp_path / "model"), from_scratch=True))


@pytest.mark.slow
def test_a_step_that_is_counted_by_the_data_stays_what_it_was(one_device: None, folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(steps=None, data=dict(tokens_per_batch=256))
    whole = run(folder, tmp_path, **changes)
    for other, says in ((dict(step=dict(accumulation=2)), "step.accumulation was 1 and is now 2"),
                        (dict(data=dict(tokens_per_batch=512)), "data.tokens_per_batch was 256 and is now 512")):
        with pytest.raises(ValueError, match=f"{says}.*say with steps"):
            run(folder, tmp_path, **(changes | other))
    more = run(folder, tmp_path, steps=whole.steps + 2, step=dict(accumulation=2), data=changes["data"])
    assert more.steps == whole.steps + 2


@pytest.mark.slow
def test_what_a_skipped_last_step_leaves_is_saved(one_device: None, folder: Path, tmp_path: Path) -> None:
    summary = run(folder, tmp_path, steps=2, optimizer=dict(learning_rate=1e18, schedule="constant", skip_nonfinite=5))
    assert summary.steps == 2
    assert find_checkpoint(tmp_path, tell=pytest.fail).step == 2
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert last["step"] == 2 and last["loss"] is None
