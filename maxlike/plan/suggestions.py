"""What to change where a model does not fit: options of `maxlike plan`, each of which alone is enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from maxlike.models.config import TransformerConfig
from maxlike.plan.arithmetic import KnownShapes
from maxlike.plan.chips import Topology
from maxlike.plan.options import Options, Serving, Training, changed, legal_sizes
from maxlike.plan.result import Plan
from maxlike.plan.serving import Asked, reckon_serving
from maxlike.plan.training import AskedTraining, reckon_training

_MOST = 4
_MARGIN = 1.15
"""What was measured of temporaries is taken to be so much more elsewhere."""


def suggestions(model: str, config: TransformerConfig, topology: Topology, options: Options, found: Plan) -> list[str]:
    """Flags, or pairs of them, each of which alone makes the plan `found` fit, by arithmetic that errs on the careful
    side.

    Of each kind there is one: the smallest change of it that is enough.
    """
    if topology.chip is None:
        return []
    judge: Any = _Serving(model, config, found) if isinstance(options, Serving) else _Training(model, config, topology,
                                                                                              options, found)
    kinds: dict[str, str] = {}
    for flag, value, where, changes in _candidates(config, topology, options, found):
        if flag in kinds or len(kinds) == _MOST:
            continue
        try:
            if judge.fits(where, changed(options, **changes)):
                kinds[flag] = f"{flag} {value}"
        except ValueError:  # a combination that there is not
            continue
    return list(kinds.values())


Candidate = tuple[str, Any, Topology, dict[str, Any]]


def _candidates(config: TransformerConfig, topology: Topology, options: Options, found: Plan) -> Iterator[Candidate]:
    """Flag, its value (or that and what goes with it), and what they mean; of each flag the smallest change first."""
    if isinstance(options, Serving):
        yield from _for_serving(config, topology, options, found)
    else:
        yield from _for_training(topology, options)
    for larger in topology.larger():
        yield "--topology", larger.name, larger, {}


def _for_serving(config: TransformerConfig, topology: Topology, options: Serving, found: Plan) -> Iterator[Candidate]:
    devices = topology.n_devices // options.data
    if options.tp is not None:
        for tp in legal_sizes(config, devices):
            if tp > options.tp:
                yield "--tp", tp, topology, {"tp": tp}
    for data in range(options.data - 1, 0, -1):
        if options.data % data == 0:
            yield "--data", data, topology, {"data": data}
    if found.dtype == "float32":
        yield "--dtype", "bfloat16", topology, {"dtype": "bfloat16"}
    if found.cache is not None and jnp.dtype(found.cache.dtype).itemsize > 1:
        yield "--cache-dtype", "float8_e4m3fn", topology, {"cache_dtype": "float8_e4m3fn"}
    engine = options.engine
    if engine.max_model_len is not None and found.cache is not None and found.cache.pages > 1:
        # Temporaries and page tables only become less.
        room = found.cache.tokens
        for longest in (room // 1024 * 1024, room):
            if 2 <= longest < engine.max_model_len:
                yield "--max-len", longest, topology, {"max_model_len": longest}
    seqs = engine.max_num_seqs or 256
    while (seqs := seqs // 2) >= 8:
        yield "--max-seqs", seqs, topology, {"max_num_seqs": seqs}


def _for_training(topology: Topology, options: Training) -> Iterator[Candidate]:
    if options.remat != "full":
        yield "--remat", "full", topology, {"remat": "full"}
    for data in range(options.data - 1, 0, -1):
        if options.data % data == 0:
            yield "--data", data, topology, {"data": data}
    batch = options.tokens_per_batch
    for n in (2, 4, 8):
        if batch is not None and batch % n == 0:  # a step has as many tokens then
            more = {"accumulation": n * options.accumulation, "tokens_per_batch": batch // n}
            yield "--accumulation", f"{n * options.accumulation} --tokens-per-batch {batch // n}", topology, more
    if options.lora_rank is None:
        yield "--lora-rank", 16, topology, {"lora_rank": 16}


class _Serving:
    """Judges by arithmetic, with temporaries no less than those that were measured."""

    def __init__(self, model: str, config: TransformerConfig, found: Plan):
        self._model, self._config = model, config
        self._measured = int(found.memory.temporaries * _MARGIN)
        self._shapes = KnownShapes(config)

    def fits(self, topology: Topology, options: Options) -> bool:
        assert isinstance(options, Serving)
        return reckon_serving(Asked(self._model, self._config, topology, options), self._shapes, self._measured).fits


class _Training:
    """Judges by arithmetic, scaled so that it would have found at least what was found."""

    def __init__(self, model: str, config: TransformerConfig, topology: Topology, options: Training, found: Plan):
        self._model, self._config = model, config
        self._shapes = KnownShapes(config)
        reckoned = reckon_training(AskedTraining(model, config, topology, options), self._shapes)
        self._scale = _MARGIN * max(1.0, found.memory.temporaries / reckoned.memory.temporaries)

    def fits(self, topology: Topology, options: Options) -> bool:
        assert isinstance(options, Training)
        asked = AskedTraining(self._model, self._config, topology, options)
        return reckon_training(asked, self._shapes, self._scale).fits
