"""How many pages of KV cache the memory has room for."""

from __future__ import annotations

import jax
import psutil
from jax.sharding import Mesh

from maxlike.engine.config import ACCELERATOR_MEMORY_SHARE, CPU_MEMORY_SHARE, EngineConfig
from maxlike.engine.runner import ModelRunner
from maxlike.mesh import mesh_platform


def cache_bytes(runner: ModelRunner, config: EngineConfig) -> int:
    """Bytes on each device that the KV cache may take, the weights being there already.

    On CPU a share of what is free. Elsewhere what is left of a share of the whole when weights, and what the largest
    compiled programs were found to need, are taken off; where a device does not tell its memory, as on CPU.
    """
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory
    stats = [device.memory_stats() for device in runner.mesh.local_devices]
    if mesh_platform(runner.mesh) == "cpu" or not all(stats):
        return room_on_cpu(config, free_host_bytes(), _devices_of_one_host(runner.mesh))
    temporaries = runner.temporary_bytes()
    return min(room_on_accelerator(config, s["bytes_limit"], s["bytes_in_use"] + temporaries) for s in stats if s)


def room_on_accelerator(config: EngineConfig, limit: int, others: int) -> int:
    """Bytes that a cache may take of a device's `limit` where `others` are taken up otherwise; may be negative."""
    return int(limit * (config.memory_share or ACCELERATOR_MEMORY_SHARE)) - others


def room_on_cpu(config: EngineConfig, free: int, n_devices: int) -> int:
    """Bytes that a cache may take on each of `n_devices`, of what the host has free beside the weights."""
    return int(free * (config.memory_share or CPU_MEMORY_SHARE) / n_devices)


def n_pages_for(runner: ModelRunner, config: EngineConfig) -> int:
    """Pages a layer of the cache: those asked for, or as many as there is room for and the sequences can fill.

    Raises:
        ValueError: there is not even room for one page; says what there is.
    """
    if config.num_pages is not None:
        return config.num_pages
    room, page = cache_bytes(runner, config), runner.kv_params.bytes_per_page(runner.mesh)
    n_pages = pages_of_use(runner, room)
    if n_pages < 1:
        raise ValueError(f"There is no room for a KV cache: a page of {runner.kv_params.page_size} tokens takes "
                         f"{page / 2**20:.1f} MiB a device, and {room / 2**20:.1f} MiB are left. Use more devices, "
                         "raise memory_share, or lower max_num_batched_tokens, max_num_seqs or page_size.")
    return n_pages


def pages_of_use(runner: ModelRunner, room: int) -> int:
    """Pages a layer that `room` bytes a device hold, but no more than all sequences can fill."""
    return min(runner.kv_params.pages_within(max(room, 0), runner.mesh), runner.n_slots * runner.pages_per_sequence)


def free_host_bytes() -> int:
    """What the host has free."""
    return psutil.virtual_memory().available


def _devices_of_one_host(mesh: Mesh) -> int:
    """Devices that share the host's memory: on CPU all of them."""
    return len([d for d in mesh.devices.flat if d.process_index == jax.process_index()])
