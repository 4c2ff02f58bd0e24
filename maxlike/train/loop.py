"""A training run from its beginning, or from where it was left, to its end."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint
from jax.experimental import multihost_utils

from maxlike.models.hub import resolve
from maxlike.models.registry import parse_config
from maxlike.models.tokenizer import Tokenizer
from maxlike.train.checkpoint import Checkpoints, SavedStep, find_checkpoint
from maxlike.train.config import TrainConfig
from maxlike.train.feed import Fed, Feed, shards_for, told
from maxlike.train.metrics import Meter, MetricsLog, plot_losses
from maxlike.train.objective import Objective, PreferenceBatch, PreferenceObjective, SupervisedObjective
from maxlike.train.optimizer import OptimizerConfig, check_optimizer, make_optimizer
from maxlike.train.settings import as_json, build, write_yaml
from maxlike.train.step import (
    TrainState,
    init_state,
    make_eval_step,
    make_scoring_step,
    make_train_step,
    place_batch,
    reference_state,
)
from maxlike.train.stored_state import parameter_layout
from maxlike.train.trainee import load_trainee, mesh_of

CONFIG = "config.yaml"
_AGREE_EVERY = 10
"""Steps between two moments at which several processes agree on what a clock alone would tell each differently."""


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    Args:
        steps, of_steps: taken in all, those before it was resumed included; and how many there are to be.
        loss: of the last step; `None` where there was none to take.
        validation_loss: the last one measured.
        resumed_at: the step that this call went on from; 0 where it began anew.
        tokens, seconds: of this call.
        best_loss: the lowest validation loss whose checkpoint is kept.
        left_out: what data were, in words, and in further lines the first of what was said of them.
        stopped_by: the signal that ended it early.
        leader: this process is the one that speaks for all.
    """

    steps: int
    of_steps: int
    loss: float | None
    validation_loss: float | None
    tokens: int
    seconds: float
    left_out: str = ""
    stopped_by: str | None = None
    leader: bool = True
    resumed_at: int = 0
    best_loss: float | None = None


def train(config: TrainConfig, *, version: str) -> Summary:
    """Trains as `config` says, going on from the newest checkpoint in its output folder where it asks for that.

    The folder gets `step_...` checkpoints, `metrics.jsonl`, `config.yaml` and `loss.png`. SIGTERM or SIGINT end the
    run after the step that is under way and a checkpoint.

    Args:
        config: all that a run is told; `maxlike.train.settings.build` makes it of nested dicts, such as a YAML file's.
        version: of this program (maxlike.__version__), noted in checkpoints.

    Raises:
        ValueError: something does not fit or cannot be read, a checkpoint could not be written, or the loss is no
            longer a number; then the last checkpoint is from before it was so.
    """
    with _Signals() as signals:
        run = _Run(config, version)
        try:
            return run.to_the_end(signals)
        finally:
            run.close()


class _Signals:
    """The first SIGTERM or SIGINT is noted, the second does what it would have done."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            # With several processes JAX looks out for SIGTERM itself, so that they can agree on a step.
            for number in (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        # Not by print, which a signal may find in the middle of its work.
        os.write(2, b"\nmaxlike: the step under way is finished and saved; a second signal ends the run at once\n")
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def stop_after(self, step: int) -> bool:
        """Whether the run is to end with this step; all processes say the same."""
        if jax.process_count() == 1:
            return self.received is not None
        if multihost_utils.reached_preemption_sync_point(step):
            self.received = "SIGTERM"
        elif step % _AGREE_EVERY == 0 and np.any(multihost_utils.process_allgather(self.received is not None)):
            self.received = "SIGINT"
        else:
            return False
        return True


class _Run:
    """All parts of a run, and where it is."""

    def __init__(self, config: TrainConfig, version: str):
        self.folder, self._active = Path(config.output).expanduser().resolve(), jax.process_index() == 0
        _make_folder(self.folder)
        self._warnings: list[str] = []  # those from before there is a log to tell them
        self._log: MetricsLog | None = None
        described, _ = parse_config(resolve(config.model.path))
        self.mesh = mesh_of(config.mesh, described)
        self.checkpoints = Checkpoints(self.folder, keep=config.checkpoint.keep, keep_best=config.checkpoint.keep_best,
                                       tell=self.tell)
        saved = self._to_resume(config.checkpoint.resume)
        shards = shards_for(config.data, self.mesh, None if saved is None else saved.about["config"]["data"]["shards"])
        path = Path(config.model.path).expanduser()  # whole, so that `export` finds it from anywhere
        config = replace(config, data=replace(config.data, shards=shards, seed=config.data.seed or config.seed),
                         model=replace(config.model, path=str(path.resolve()) if path.is_dir() else config.model.path))
        self.config = config
        self.checkpoints.about = {"config": as_json(config), "versions": dict(
            maxlike=version, jax=jax.__version__, flax=flax.__version__, orbax=orbax.checkpoint.__version__)}

        # First what is quick to find wrong, then the weights, which take a while.
        self.data = Feed(config.data, Tokenizer.from_folder(resolve(config.model.path)), self.mesh, steps=config.steps,
                         accumulation=config.step.accumulation, vocab_size=described.vocab_size,
                         progress=self._active and not config.log.quiet)
        self.steps = self.data.steps
        if saved is not None and config.steps is None:
            _check_count(config, saved)
        check_optimizer(_with_total(config.optimizer, self.steps))
        longest = config.data.max_seq_len or config.data.tokens_per_shard
        if longest > described.max_position_embeddings:
            self.tell(f"sequences may have {longest} tokens, and the model's config.json speaks of "
                      f"{described.max_position_embeddings} positions: data.max_seq_len bounds them")
        # The reference of preference training is what the run began with.
        pairs = self.data.preference
        trainee = load_trainee(config, self.mesh, restored=saved is not None and not pairs)
        optimizer = make_optimizer(_with_total(config.optimizer, self.steps), trainee.model)
        objective: Objective = SupervisedObjective(config.loss.z_loss, config.loss.chunk)
        if pairs:
            objective = PreferenceObjective(chunk=config.loss.chunk, **asdict(config.preference))
        self.layout = parameter_layout(trainee.model)
        self.take_step = make_train_step(trainee.model, optimizer, config.step, objective)
        self.evaluate = make_eval_step(trainee.model, config.step, objective)
        self.state = init_state(trainee.model, optimizer, trainee.trains)
        self.reference = reference_state(self.state, config.step.dtype) if pairs else None
        self.score = {n: make_scoring_step(trainee.model, replace(config.step, accumulation=n), config.loss.chunk)
                      for n in (1, config.step.accumulation)}
        self.step = 0
        if saved is not None:
            self.state = replace(self.state, **saved.restore(_stored(self.state), self.layout, self.mesh))
            self.step = saved.step
            self.data.set_state(saved.data_states)
        self.best = self.checkpoints.best_value()
        self._saved_at = time.perf_counter()
        self._in_flight: tuple[int, dict[str, jax.Array], Fed] | None = None
        self._not_finite = 0
        self.loss: float | None = None
        self.validation_loss: float | None = None
        self.tokens = 0
        self.meter = Meter(described, base_is_trained=config.lora is None)
        if self._active:
            (self.folder / CONFIG).write_text(write_yaml(config), encoding="utf-8")
        self._log = MetricsLog(self.folder, first_step=self.step, steps=self.steps,
                               tensorboard=config.log.tensorboard, quiet=config.log.quiet)
        for line in self._warnings:
            self._log.tell(line)
        if saved is not None:
            self._log.tell(f"going on from {saved.folder}, after step {saved.step} of {self.steps}")

    def tell(self, line: str) -> None:
        """A line for the user, once there is somebody to tell it."""
        if self._log is None:
            self._warnings.append(line)
        else:
            self._log.tell(line)

    def _to_resume(self, resume: str) -> SavedStep | None:
        newest = self.checkpoints.newest()
        if resume == "auto" or newest is None:
            return newest if resume in ("auto", "never") else find_checkpoint(resume, tell=self.tell)
        if resume != "never" and (saved := find_checkpoint(resume, tell=self.tell)).folder == newest.folder:
            return saved
        wanted = "begin anew" if resume == "never" else f"go on from {resume}"
        raise ValueError(f"The run is to {wanted}, but {self.folder} has a checkpoint already, {newest.folder.name}, "
                         "which it would come to overwrite. Give another output folder, or move that one away.")

    def to_the_end(self, signals: _Signals) -> Summary:
        """Takes all steps that are left, or as many as there are until a signal."""
        begun, resumed_at = time.perf_counter(), self.step
        self.meter.take()
        stopped = False
        validated = None
        while self.step < self.steps and not stopped:
            batch = self.data.next()
            self._take(batch)
            stopped = signals.stop_after(self.step)
            last = self.step == self.steps or stopped
            every = self.config.validate_every
            due = self.step == self.steps or (every is not None and self.step % every == 0)
            validated = self._validate() if due and not stopped else None
            if last or self._save_is_due(validated):
                self._save(validated)
        self._look_at_last()
        if self.step != self.checkpoints.last_step:  # a run that had no step left, and was resumed elsewhere
            self._save(validated)
        self._finished_saving()
        summary = Summary(self.step, self.steps, self.loss, self.validation_loss, self.tokens,
                          time.perf_counter() - begun, told(self.data.summary()),
                          signals.received if stopped and self.step < self.steps else None, self._active, resumed_at,
                          self.best if self.config.checkpoint.keep_best else None)
        if self.config.log.plot and self._active:
            plot_losses(self.folder)
        return summary

    def _take(self, batch: Fed) -> None:
        self.state, metrics = self.take_step(self.state, self._placed(batch, self.config.step.accumulation))
        self.step += 1
        self.tokens += batch.tokens
        self._look_at_last()  # while the device works at this one
        self._in_flight = self.step, metrics, batch

    def _placed(self, batch: Fed, accumulation: int) -> Any:
        placed = place_batch(batch.arrays, self.mesh)
        if self.reference is None:
            return placed
        return PreferenceBatch(placed, self.score[accumulation](self.reference, placed))

    def _look_at_last(self) -> None:
        """Fetches the numbers of the step before, waiting for it.

        Raises:
            ValueError: they are none.
        """
        if self._in_flight is None:
            return
        (step, metrics, batch), self._in_flight = self._in_flight, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.meter.add(batch.tokens, batch.sequences)
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        self._not_finite = 0 if finite else self._not_finite + 1
        assert self._log is not None
        if step % self.config.log.every_steps == 0 or step == self.steps or not finite:
            values |= self.meter.take()
            self._log.write(step, "train", values)
        shown = {name: values[name] for name in ("loss", "tokens_per_s", "mfu") if name in values}
        self._log.show(step, shown)
        self.loss = values["loss"]
        if self._not_finite > self.config.optimizer.skip_nonfinite:
            last = self.checkpoints.last_step
            saved = f"The checkpoint of step {last} is from before" if last is not None else "Nothing was saved"
            raise ValueError(f"At step {step} the loss is {values['loss']:g} and the gradients' norm "
                             f"{values['grad_norm']:g}. {saved}. A lower learning rate, more warm-up or "
                             "optimizer.max_grad_norm may help; metrics.jsonl tells how it came.")

    def _validate(self) -> float | None:
        """The mean loss a token on what is held out, to which nothing but the likelihood counts."""
        self._look_at_last()
        totals: dict[str, Any] = {}
        for batch in self.data.validation():
            sums = self.evaluate(self.state, self._placed(batch, 1))
            totals = sums if not totals else {name: totals[name] + value for name, value in sums.items()}
        if not totals:
            return None
        found = {name: float(value) for name, value in jax.device_get(totals).items()}
        weight = found.pop("weight")
        values = {name: value / weight for name, value in found.items()}
        values["loss"] = values.pop("nll", values["loss"])
        assert self._log is not None
        self._log.write(self.step, "validation", values)
        self._log.tell(f"step {self.step}: validation loss {values['loss']:.4f}")
        self.validation_loss = values["loss"]
        self.meter.take()  # of training alone
        return values["loss"]

    def _save_is_due(self, validated: float | None) -> bool:
        options = self.config.checkpoint
        if options.every_steps is not None and self.step % options.every_steps == 0:
            return True
        if options.keep_best and validated is not None and (self.best is None or validated < self.best):
            return True
        if options.every_minutes is None:
            return False
        late = time.perf_counter() - self._saved_at > 60 * options.every_minutes
        if jax.process_count() == 1:
            return late
        return self.step % _AGREE_EVERY == 0 and bool(multihost_utils.broadcast_one_to_all(np.bool_(late)))

    def _save(self, value: float | None) -> None:
        self._look_at_last()  # which raises before what is no number takes the place of what was good
        if value is not None and math.isfinite(value):
            self.best = value if self.best is None else min(self.best, value)
        else:
            value = None
        with _saying_which():
            self.checkpoints.save(self.step, _stored(self.state), self.layout, value=value,
                                  data_state=self.data.get_state())
        self._saved_at = time.perf_counter()

    def _finished_saving(self) -> None:
        with _saying_which():
            self.checkpoints.wait()

    def close(self) -> None:
        """Ends threads and files."""
        if self._log is not None:
            self._log.close()
        self.data.close()
        self.checkpoints.close()


@contextlib.contextmanager
def _saying_which() -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ValueError(f"A checkpoint could not be written: {error}") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The output folder {folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"The output folder {folder} cannot be written to.")


def _stored(state: TrainState) -> dict[str, Any]:
    """What of a state is in checkpoints: what is frozen is where it came from."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _check_count(config: TrainConfig, saved: SavedStep) -> None:
    """Sees to it that steps counted from the data are the ones that the run has counted so far.

    Raises:
        ValueError: they are not: a step has become another part of the data.
    """
    before = build(TrainConfig, saved.about["config"])
    for name, then, now in (("data.tokens_per_batch", before.data.tokens_per_batch, config.data.tokens_per_batch),
                            ("data.shards", before.data.shards, config.data.shards),
                            ("data.epochs", before.data.epochs, config.data.epochs),
                            ("step.accumulation", before.step.accumulation, config.step.accumulation)):
        if then != now and before.steps is None:
            raise ValueError(f"The run counts its steps by its data, and {name} was {then} and is now {now}: say with "
                             f"steps how many it is to have in all; {saved.step} are taken.")


def _with_total(config: OptimizerConfig, steps: int) -> OptimizerConfig:
    return config if config.total_steps is not None else replace(config, total_steps=steps)
