"""Checkpoints of a training run: asynchronous, sharded, and whole or not there at all.

A run's folder holds `step_00000120/` and such. In each lie `arrays/`, written by orbax, all processes their own parts;
`about.json`; one `data-<process>.json`, where the stream of data goes on; and `manifest.json`, written last, without
which nothing of it counts. Older checkpoints are removed only when that is written.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from maxlike.models.safetensors import CheckpointError
from maxlike.train.integrity import is_complete, problems_of, write_manifest
from maxlike.train.stored_state import (
    Path,
    StoredParameter,
    check_stored,
    restored_state,
    stored_arrays,
    stored_shapes,
)

_NAME = re.compile(r"step_(\d+)")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class SavedStep:
    """One checkpoint, complete and found intact.

    Args:
        step: optimizer steps taken.
        value: validation loss at that step; `None` where none was measured there.
        about: further words of its `about.json`: the run's `config`, `versions`.
        data_states: where each process's stream of data goes on, by process.
    """

    folder: epath.Path
    step: int
    value: float | None
    about: dict[str, Any]
    data_states: tuple[Any, ...]

    def restore(self, state: Any, layout: Mapping[Path, StoredParameter], mesh: Mesh, *, prefix: str = "") -> Any:
        """A state like `state` (abstract or not, and not read) on `mesh`, with this checkpoint's numbers.

        Args:
            layout: `parameter_layout` of the model that the state is of.
            prefix: the state is this part of the stored one alone, e.g. `"params"`.

        Raises:
            CheckpointError: the checkpoint is of another model or optimizer.
        """
        stored = self.about["arrays"]
        part = {prefix: state} if prefix else state
        if prefix:
            stored = {name: kind for name, kind in stored.items() if name.startswith(f"{prefix}.")}
        check_stored(stored_shapes(part, layout), stored, f"The checkpoint {self.folder}")

        def read(wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
            # Not strict: what is padded here gets zeros there.
            how = {name: ocp.ArrayRestoreArgs(sharding=like.sharding, global_shape=like.shape, dtype=like.dtype,
                                              strict=False) for name, like in wanted.items()}
            handler = ocp.PyTreeCheckpointHandler()
            return ocp.Checkpointer(handler).restore(self.folder / "arrays", args=ocp.args.PyTreeRestore(
                item=wanted, restore_args=how, partial_restore=True))

        restored = restored_state(part, layout, mesh, read)
        return restored[prefix] if prefix else restored


def open_checkpoint(folder: epath.PathLike) -> SavedStep:
    """The checkpoint in one `step_...` folder.

    Raises:
        CheckpointError: it is unfinished or damaged; names it, and what is wrong.
    """
    folder = _absolute(folder)
    problems = _problems(folder)
    if problems:
        raise CheckpointError(problems, summary=f"The checkpoint {folder} cannot be used:")
    try:
        about = json.loads((folder / "about.json").read_text())
        states = tuple(json.loads((folder / f"data-{i}.json").read_text()) for i in range(about.pop("processes")))
        return SavedStep(folder, about.pop("step"), about.pop("value"), about, states)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError([repr(error)], summary=f"The checkpoint {folder} is not one of this program:") from error


def find_checkpoint(where: epath.PathLike, *, best: bool = False, tell: Tell) -> SavedStep:
    """The checkpoint `where`: that very one, or of a run's folder the newest that is whole, or the best of those.

    Args:
        tell: is given a warning for each that is passed over.

    Raises:
        CheckpointError: the one that was named cannot be used, a run has none that can, or the best is wanted and none
            has a validation loss.
    """
    where = _absolute(where)
    if not where.is_dir():
        raise CheckpointError([f"There is no folder {where}: give a run's folder, or one of its checkpoints."])
    if _NAME.fullmatch(where.name) or (where / "arrays").exists():
        return open_checkpoint(where)
    found = _usable(where, tell)
    if best:
        measured = [(value, folder) for folder in found if (value := _value(folder)) is not None]
        if found and not measured:
            raise CheckpointError([f"No checkpoint in {where} has a validation loss, so none is the best: take the "
                                   "newest, or name one."])
        found = [folder for _, folder in sorted(measured, reverse=True)]
    while found:
        try:
            return open_checkpoint(found.pop())
        except CheckpointError as error:
            tell(f"passed over: {_line(error)}")
    raise CheckpointError([f"There is no checkpoint in {where} that can be used."])


class Checkpoints:
    """Those of one run, in `folder`.

    Args:
        keep: so many of the newest stay.
        keep_best: so does the one with the lowest validation loss.
        tell: is given a warning for each that is passed over.

    Raises:
        ValueError: `keep` is below 1.
    """

    def __init__(self, folder: epath.PathLike, *, keep: int = 3, keep_best: bool = True, tell: Tell):
        if keep < 1:
            raise ValueError(f"At least the newest checkpoint is kept: keep must be 1 or more; got {keep}.")
        self.folder = _absolute(folder)
        self.keep, self.keep_best, self.tell = keep, keep_best, tell
        self.about: dict[str, Any] = {}
        """JSON for each `about.json` that is written."""
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._finishing: threading.Thread | None = None
        self._error: Exception | None = None
        self.last_step: int | None = None
        """Of the newest checkpoint that this object has saved, or that `newest` gave."""

    def newest(self) -> SavedStep | None:
        """The newest that is whole; `None` where there is none. Newer ones that are not are told of and taken out of
        the way: unfinished ones are removed, damaged ones get another name."""
        for folder in reversed(_folders(self.folder)):
            try:
                saved = open_checkpoint(folder)
            except CheckpointError as error:
                self._take_away(folder, error)
                continue
            self.last_step = saved.step
            return saved
        return None

    def _take_away(self, folder: epath.Path, error: CheckpointError) -> None:
        complete = is_complete(folder)
        _meet("checkpoint seen")  # before it is changed
        aside = folder.parent / f"damaged_{folder.name}"
        self.tell(f"passed over: {_line(error)}; " + (f"it is now {aside}" if complete else "removed"))
        if jax.process_index() == 0:
            if complete and not aside.exists():
                folder.rename(aside)
            else:
                folder.rmtree()
        _meet("checkpoint taken away")

    def save(self, step: int, state: Any, layout: Mapping[Path, StoredParameter], *, data_state: Any,
             value: float | None = None) -> None:
        """Begins to save `state`, which may be donated as soon as this returns. Waits for the save before this one.

        Args:
            layout: `parameter_layout` of the model that the state is of.
            data_state: JSON, where this process's stream of data goes on.
            value: validation loss at this very step.

        Raises:
            OSError, ValueError: the save before this one failed.
        """
        self.wait()
        folder = self.folder / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"data-{jax.process_index()}.json").write_text(json.dumps(data_state))
        if jax.process_index() == 0:
            (folder / "about.json").write_text(json.dumps({
                **self.about, "step": step, "value": value, "processes": jax.process_count(),
                "arrays": stored_shapes(state, layout)}))
        # Orbax lets no process go on before all have come here, and finishes when all have written.
        self._checkpointer.save(folder / "arrays", args=ocp.args.PyTreeSave(stored_arrays(state, layout)),
                                force=True)
        self._finishing = threading.Thread(target=self._finish, args=(folder,), name="checkpoint")
        self._finishing.start()
        self.last_step = step

    def _finish(self, folder: epath.Path) -> None:
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(folder)
                self._remove_old(folder)
        except (OSError, ValueError, RuntimeError) as error:  # raised where it is waited for
            self._error = error

    def _remove_old(self, newest: epath.Path) -> None:
        kept = [folder for folder in _folders(self.folder) if is_complete(folder)][-self.keep:]
        if self.keep_best:
            measured = [(value, folder) for folder in _folders(self.folder)
                        if is_complete(folder) and (value := _value(folder)) is not None]
            kept += [min(measured)[1]] if measured else []
        for folder in _folders(self.folder):
            if folder not in kept and folder.name < newest.name:
                (folder / "manifest.json").unlink(missing_ok=True)  # first: half of it is no checkpoint
                folder.rmtree()

    def best_value(self) -> float | None:
        """The lowest validation loss of the checkpoints that there are."""
        values = [value for folder in _folders(self.folder)
                  if is_complete(folder) and (value := _value(folder)) is not None]
        return min(values, default=None)

    def wait(self) -> None:
        """Until the last save is complete.

        Raises:
            OSError, ValueError, RuntimeError: it failed.
        """
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Waits, and ends what threads there are."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()


def _absolute(folder: epath.PathLike) -> epath.Path:
    """As orbax wants it."""
    return epath.Path(folder).expanduser().resolve()


def _folders(run: epath.Path) -> list[epath.Path]:
    """The checkpoints of a run, complete or not, oldest first."""
    if not run.is_dir():
        return []
    found = [entry for entry in run.iterdir() if _NAME.fullmatch(entry.name)]
    return sorted(found, key=lambda entry: int(entry.name.removeprefix("step_")))


def _usable(run: epath.Path, tell: Tell) -> list[epath.Path]:
    for folder in (folders := _folders(run)):
        if not is_complete(folder):
            tell(f"passed over: {folder} is unfinished")
    return [folder for folder in folders if is_complete(folder)]


def _value(folder: epath.Path) -> float | None:
    try:
        return json.loads((folder / "about.json").read_text())["value"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged: whoever opens it hears of it
        return None


def _problems(folder: epath.Path) -> list[str]:
    """Of all processes together: each reads a share of the files, and each comes to the same end."""
    processes = jax.process_count()
    problems = problems_of(folder, (jax.process_index(), processes))
    if processes > 1:
        counts = np.asarray(multihost_utils.process_allgather(np.int32(len(problems))))
        if counts.any() and not problems:
            problems = [f"process {int(np.flatnonzero(counts)[0])} found files of it damaged, and says which"]
    return problems


def _meet(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _line(error: CheckpointError) -> str:
    return " ".join(str(error).split())
