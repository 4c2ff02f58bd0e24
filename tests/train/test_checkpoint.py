"""What is saved comes back: on other meshes, in other forms of execution; and what is not whole does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maxlike.mesh import make_mesh
from maxlike.models.safetensors import CheckpointError
from maxlike.nn.transformer import DistributedTransformer
from maxlike.nn.transformer.segments import named_parameters
from maxlike.train.checkpoint import Checkpoints, find_checkpoint, open_checkpoint
from maxlike.train.stored_state import parameter_layout
from tests.nn.transformer.tiny import Tiny, abstract, build

# Scanned as two segments, a pattern of two and a run; the vocabulary of 61 is padded on every mesh but one.
TINY = Tiny(windows=(None, 8, None, 8), n_kv_heads=2)
GROUPS = [[0, 2], [1, 3]]
MESHES = [dict(n=1), dict(n=8, fsdp=2), dict(n=8), dict(n=4, data=2)]


def model_on(devices: list[jax.Device], *, n: int = 1, scanned: bool = False, shapes_only: bool = False,
             **axes: int) -> DistributedTransformer:
    mesh = make_mesh(devices[:n], n_heads=TINY.n_heads, n_kv_heads=TINY.n_kv_heads, **axes)
    make = abstract if shapes_only else build
    return make(TINY, mesh, use_subgraphs=scanned, groups=GROUPS)


@jax.jit
def moments(params: Any, scale: float) -> Any:
    """Like the parameters, zero where they are padded, and no multiple of them."""
    return jax.tree.map(lambda x: scale * jnp.sin(3 * x) ** 2, params)


def state_of(model: DistributedTransformer) -> dict[str, Any]:
    """A state as Adam's after some steps."""
    params = nnx.state(model)
    adam, *rest = optax.adamw(1e-3).init(params)
    adam = adam._replace(count=adam.count + 7, mu=moments(params, 1.0), nu=moments(params, 0.1))
    return {"step": jnp.int32(7), "params": params, "opt_state": (adam, *rest)}


def abstract_state_of(model: DistributedTransformer) -> Any:
    with jax.sharding.use_abstract_mesh(model.mesh.abstract_mesh):  # else jax 0.12 forgets how zeros_like is sharded
        return jax.eval_shape(lambda params: {"step": jnp.int32(0), "params": params,
                                              "opt_state": optax.adamw(1e-3).init(params)}, nnx.state(model))


def by_name(model: DistributedTransformer, params: Any) -> dict[str, np.ndarray]:
    found = {}
    for names, stacked, param in named_parameters(nnx.merge(nnx.graphdef(model), params)):
        value = np.asarray(param.get_value())
        for name, part in zip(names, value if stacked else [value], strict=True):
            found[name] = part
    return found


def save_state(folder: Path, model: DistributedTransformer, state: Any, **options: Any) -> None:
    run = Checkpoints(folder, tell=pytest.fail)
    run.about = {"config": {"seed": 3}}
    run.save(7, state, parameter_layout(model), **{"data_state": None, **options})
    run.close()


def save(folder: Path, devices: list[jax.Device], *steps: int, **options: Any) -> None:
    """Small checkpoints of one array: for the tests that are about files."""
    run = Checkpoints(folder, tell=pytest.fail, **options)
    values = iter([5.0, 3.0, 4.0, 6.0, 7.0])
    for step in steps:
        run.save(step, {"x": np.full(1000, step, np.float32)}, {}, data_state={"at": step}, value=next(values))
    run.close()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 2), (2, 3), (3, 0), (1, 3)])
def test_restores_on_another_mesh_and_in_another_form(devices: list[jax.Device], tmp_path: Path, before: int,
                                                      after: int) -> None:
    scanned = (before + after) % 2 == 0, before % 2 == 0
    model = model_on(devices, scanned=scanned[0], **MESHES[before])
    save_state(tmp_path, model, state_of(model), data_state={"epoch": 1, "at": [3, 4]}, value=2.5)

    other = model_on(devices, scanned=scanned[1], shapes_only=True, **MESHES[after])
    saved = find_checkpoint(tmp_path, tell=pytest.fail)
    assert (saved.step, saved.value, saved.data_states) == (7, 2.5, ({"epoch": 1, "at": [3, 4]},))
    assert saved.about["config"] == {"seed": 3}
    wanted = abstract_state_of(other)
    restored = saved.restore(wanted, parameter_layout(other), other.mesh)

    expected = model_on(devices, scanned=scanned[1], **MESHES[after])
    params, adam = restored["params"], restored["opt_state"][0]
    assert int(restored["step"]) == int(adam.count) == 7
    reference = nnx.state(expected)
    for found, meant in ((params, reference), (adam.mu, moments(reference, 1.0)), (adam.nu, moments(reference, 0.1))):
        found, meant = by_name(other, found), by_name(other, meant)
        assert found.keys() == meant.keys()
        for name, value in meant.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    for leaf, like in zip(jax.tree.leaves(restored["opt_state"]), jax.tree.leaves(wanted["opt_state"]), strict=True):
        assert jax.typeof(leaf) == jax.typeof(like)
    for leaf, like in zip(jax.tree.leaves(params), jax.tree.leaves(reference), strict=True):
        assert leaf.sharding == like.sharding


def test_padding_is_not_stored(devices: list[jax.Device], tmp_path: Path) -> None:
    model = model_on(devices, n=8, fsdp=2, scanned=True)
    assert model.embedding.weight.get_value().shape == (64, 36)
    save_state(tmp_path, model, state_of(model))
    arrays = open_checkpoint(tmp_path / "step_00000007").about["arrays"]
    assert arrays["params.embedding.weight"] == arrays["opt_state.0.mu.embedding.weight"] == [[61, 36], "float32"]
    assert arrays["params.layers.3.mlp.up_proj.weight"] == [[48, 36], "float32"]
    assert len(arrays) == 3 * len(TINY.shapes()) + 2  # and two counters


def test_parameters_alone(devices: list[jax.Device], tmp_path: Path) -> None:
    model = model_on(devices, n=4, data=2)
    save_state(tmp_path, model, state_of(model))
    other = model_on(devices, shapes_only=True)
    params = find_checkpoint(tmp_path, tell=pytest.fail).restore(
        nnx.state(other), parameter_layout(other), other.mesh, prefix="params")
    found = by_name(other, params)
    for name, value in TINY.weights().items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_state_may_be_donated_at_once(devices: list[jax.Device], tmp_path: Path) -> None:
    model = model_on(devices, n=4, fsdp=2)
    state = state_of(model)
    run = Checkpoints(tmp_path, tell=pytest.fail)
    run.save(1, state, parameter_layout(model), data_state=None)
    zeros = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)(state)
    jax.block_until_ready(zeros)
    run.close()
    other = model_on(devices, shapes_only=True)
    restored = find_checkpoint(tmp_path, tell=pytest.fail).restore(
        nnx.state(other), parameter_layout(other), other.mesh, prefix="params")
    found = by_name(other, restored)
    for name, value in TINY.weights().items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_leaves_that_are_no_stack(devices: list[jax.Device], tmp_path: Path) -> None:
    """Adafactor's moments are rows and columns of a large parameter, and of a small one a placeholder."""
    @jax.jit
    def factored(params: Any) -> Any:
        optimizer = optax.scale_by_factored_rms(min_dim_size_to_factor=32)
        return optimizer.update(moments(params, 1.0), optimizer.init(params), params)[1]

    models = [model_on(devices, scanned=scanned) for scanned in (True, False)]
    states = [factored(nnx.state(model)) for model in models]
    for one, other in ((0, 1), (1, 0)):
        save_state(tmp_path / str(one), models[one], states[one])
        restored = find_checkpoint(tmp_path / str(one), tell=pytest.fail).restore(
            states[other], parameter_layout(models[other]), models[other].mesh)
        for leaf, like in zip(jax.tree.leaves(restored), jax.tree.leaves(states[other]), strict=True):
            np.testing.assert_allclose(leaf, like, rtol=1e-5, atol=1e-9)


def test_of_another_model_or_optimizer(devices: list[jax.Device], tmp_path: Path) -> None:
    model = model_on(devices)
    save_state(tmp_path, model, state_of(model))
    saved = find_checkpoint(tmp_path, tell=pytest.fail)
    state = {**state_of(model), "opt_state": optax.sgd(1e-3, momentum=0.9).init(nnx.state(model))}
    with pytest.raises(CheckpointError, match=r"step_00000007 is of another model or optimizer(?s:.*)trace.*missing"):
        saved.restore(state, parameter_layout(model), model.mesh)
    wide = build(Tiny(windows=TINY.windows, mlp_dim=56), devices[:1])
    with pytest.raises(CheckpointError, match=r"mlp.down_proj.weight is float32\[36, 48\]; this state's is "
                                              r"float32\[36, 56\]"):
        saved.restore(state_of(wide), parameter_layout(wide), wide.mesh)


def test_keeps_the_newest_and_the_best(devices: list[jax.Device], tmp_path: Path) -> None:
    save(tmp_path / "a", devices, 10, 20, 30, 40, 50, keep=2)  # 20 has the lowest loss
    assert names_in(tmp_path / "a") == ["step_00000020", "step_00000040", "step_00000050"]
    assert find_checkpoint(tmp_path / "a", tell=pytest.fail).step == 50
    assert find_checkpoint(tmp_path / "a", best=True, tell=pytest.fail).step == 20
    model = model_on(devices)
    save_state(tmp_path / "d", model, state_of(model))
    with pytest.raises(CheckpointError, match="d has a validation loss, so none is the best"):
        find_checkpoint(tmp_path / "d", best=True, tell=pytest.fail)
    save(tmp_path / "b", devices, 10, 20, 30, keep=1, keep_best=False)
    assert names_in(tmp_path / "b") == ["step_00000030"]
    with pytest.raises(ValueError, match="keep must be 1 or more"):
        save(tmp_path / "c", devices, 1, keep=0)


def largest(folder: Path) -> Path:
    """The file of a checkpoint that holds most of the numbers."""
    files = [path for path in (folder / "arrays").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip_a_byte(folder: Path) -> Path:
    file = largest(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file


def cut_short(folder: Path) -> Path:
    file = largest(folder)
    file.write_bytes(file.read_bytes()[:-1])
    return file


def lose_a_file(folder: Path) -> Path:
    (folder / "data-0.json").unlink()
    return folder / "data-0.json"


def spoil_the_manifest(folder: Path) -> Path:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:40])
    return folder / "manifest.json"


@pytest.mark.parametrize("harm", [flip_a_byte, cut_short, lose_a_file, spoil_the_manifest])
def test_damaged_checkpoints_are_not_picked_up(devices: list[jax.Device], tmp_path: Path, harm: Any) -> None:
    save(tmp_path, devices, 10, 20)
    bad = tmp_path / "step_00000020"
    file = harm(bad)
    with pytest.raises(CheckpointError) as named:
        find_checkpoint(bad, tell=pytest.fail)
    assert str(bad) in str(named.value) and str(file.relative_to(bad)) in str(named.value)

    told: list[str] = []
    assert find_checkpoint(tmp_path, tell=told.append).step == 10
    assert len(told) == 1 and str(bad) in told[0] and file.name in told[0]
    told.clear()
    run = Checkpoints(tmp_path, tell=told.append)
    saved = run.newest()
    assert saved is not None and saved.step == 10 and saved.data_states == ({"at": 10},)
    assert len(told) == 1 and str(bad) in told[0] and file.name in told[0]
    run.save(20, {"x": np.zeros(3, np.float32)}, {}, data_state=None)  # the name is free again
    run.close()
    assert names_in(tmp_path) == ["damaged_step_00000020", "step_00000010", "step_00000020"]
    assert find_checkpoint(tmp_path, tell=pytest.fail).step == 20


def test_unfinished_checkpoints_are_removed(devices: list[jax.Device], tmp_path: Path) -> None:
    save(tmp_path, devices, 10, 20, 30)
    (tmp_path / "step_00000030" / "manifest.json").unlink()
    (tmp_path / "step_00000040" / "arrays.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"step_00000040 cannot be used:\nmanifest.json is missing: its saving"):
        open_checkpoint(tmp_path / "step_00000040")
    told: list[str] = []
    run = Checkpoints(tmp_path, tell=told.append)
    saved = run.newest()
    run.close()
    assert saved is not None and saved.step == 20
    assert [("step_00000040" in line, "step_00000030" in line) for line in told] == [(True, False), (False, True)]
    assert names_in(tmp_path) == ["step_00000010", "step_00000020"]


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no folder"):
        find_checkpoint(tmp_path / "none", tell=pytest.fail)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* that can be used"):
        find_checkpoint(tmp_path, tell=pytest.fail)
    run = Checkpoints(tmp_path / "none", tell=pytest.fail)
    assert run.newest() is None
    run.close()


def test_a_save_that_fails_is_told(devices: list[jax.Device], tmp_path: Path) -> None:
    save(tmp_path, devices, 10)
    run = Checkpoints(tmp_path, tell=pytest.fail)
    (tmp_path / "step_00000020").write_text("in the way")
    with pytest.raises(OSError, match="step_00000020"):
        run.save(20, {"x": np.zeros(3, np.float32)}, {}, data_state=None)
    run.close()
    (tmp_path / "step_00000020").unlink()
    assert find_checkpoint(tmp_path, tell=pytest.fail).step == 10
    json.loads((tmp_path / "step_00000010" / "manifest.json").read_text())
