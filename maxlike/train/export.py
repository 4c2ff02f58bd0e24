"""From a run's checkpoint to a folder that `transformers`, and every reader of its format, loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import optax
from flax import nnx

from maxlike.models.build import compute_dtype, mesh_for
from maxlike.models.checkpoint import save_model
from maxlike.models.hub import resolve
from maxlike.models.peft import save_adapter
from maxlike.models.registry import parse_config
from maxlike.nn.lora import merge_lora
from maxlike.train.checkpoint import find_checkpoint
from maxlike.train.config import TrainConfig
from maxlike.train.optimizer import Optimizer
from maxlike.train.settings import build
from maxlike.train.step import init_state, model_of
from maxlike.train.stored_state import parameter_layout
from maxlike.train.trainee import load_trainee

_BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
           "additional_chat_templates", "generation_config.json")
"""What lies beside a checkpoint's weights and config and goes with a model that is trained from it."""


def export(where: str, out: Path, *, adapter: bool = False, best: bool = False, dtype: str | None = None,
           model: str | None = None, tell: Callable[[str], None]) -> int:
    """Writes a checkpoint as a Hugging Face folder, adapters merged into the weights in float32.

    Args:
        where: a run's folder, of which the newest checkpoint is taken, or one checkpoint.
        adapter: rather the adapter alone, as PEFT has it.
        best: of a run's folder rather the one with the lowest validation loss.
        dtype: of the weights, float32 or bfloat16; `None`: as the model that was trained has them.
        model: the folder or hub id that was trained, should it no longer be where it was.
        tell: is given a warning for each checkpoint that is passed over.

    Returns:
        The step of the checkpoint.

    Raises:
        ValueError: there is no such checkpoint, it cannot be used, it has no adapter, or `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already, and not empty: give a folder that is not.")
    saved = find_checkpoint(where, best=best, tell=tell)
    config = build(TrainConfig, saved.about["config"])
    if model is not None:
        config = replace(config, model=replace(config.model, path=model))
    if adapter and config.lora is None:
        raise ValueError(f"{saved.folder} was trained whole and has no adapter: leave out --adapter.")
    described, _ = parse_config(resolve(config.model.path))
    mesh = mesh_for(described)
    trainee = load_trainee(replace(config, step=replace(config.step, dtype="float32")), mesh, restored=True)
    no_optimizer = Optimizer(optax.identity(), lambda step: step)
    state = init_state(trainee.model, no_optimizer, trainee.trains)
    params = saved.restore(state.params, parameter_layout(trainee.model), mesh, prefix="params")
    trained = model_of(trainee.model, replace(state, params=params))
    if adapter:
        save_adapter(trained, described, out, base_model_name=config.model.path)
        return saved.step
    if trainee.lora:
        merge_lora(trained)
    chosen = compute_dtype(described, dtype)
    graphdef, weights = nnx.split(trained)
    trained = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(chosen), weights))
    save_model(trained, described, out)
    for pattern in _BESIDE:
        for file in sorted(trainee.folder.glob(pattern)):
            if file.is_dir():
                shutil.copytree(file, out / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, out / file.name)
    return saved.step
