"""How large an engine is: what a user may say of it, and what follows where nothing is said."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from maxlike.models.config import TransformerConfig

_CPU_SEQS, _ACCELERATOR_SEQS = 64, 256
_CPU_TOKENS, _ACCELERATOR_TOKENS = 512, 2048
_PAGE_SIZE, _LARGEST_PAGE = 64, 256
_TABLE_ON_TPU = 160_000
"""Entries of a page table that leave room for the other things the TPU's kernel keeps in scalar memory."""
CPU_MEMORY_SHARE, ACCELERATOR_MEMORY_SHARE = 0.25, 0.9


@dataclass(frozen=True)
class EngineConfig:
    """An engine's measures. `None` leaves the choice to the platform and the model.

    Args:
        max_num_seqs: sequences that run at once; 64 on CPU, 256 elsewhere.
        max_num_batched_tokens: tokens of a step, prompts and continuations together; 512 on CPU, 2048 elsewhere.
        max_model_len: longest sequence, prompt and output, in tokens; the model's own, or what the cache holds if that
            is less.
        page_size: tokens a page; 64, more on a TPU where the page table would not fit its scalar memory.
        num_pages: pages of the KV cache; as many as the memory has room for and the sequences can fill.
        kv_cache_memory: bytes of it on each device, instead.
        memory_share: of each accelerator's memory, weights and temporaries included, that is used (0.9); on CPU of
            what is free once the weights are there, for the cache alone (0.25).
        enable_prefix_caching: keep pages of finished sequences for prompts that begin the same.
        warm_up: compile all steps at the start rather than each when it is first needed.
        seed: where requests that name none get theirs from.

    Raises:
        ValueError: a value is out of range.
    """

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    kv_cache_memory: int | None = None
    memory_share: float | None = None
    enable_prefix_caching: bool = True
    warm_up: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "page_size", "num_pages", "kv_cache_memory"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")
        if self.max_model_len is not None and (not isinstance(self.max_model_len, int) or self.max_model_len < 2):
            raise ValueError(f"max_model_len must be at least 2 tokens, one read and one written; got "
                             f"{self.max_model_len!r}.")
        if self.memory_share is not None and not (isinstance(self.memory_share, int | float)
                                                  and 0 < self.memory_share <= 1):
            raise ValueError(f"memory_share must be above 0 and at most 1; got {self.memory_share!r}.")
        if self.num_pages is not None and self.kv_cache_memory is not None:
            raise ValueError(f"num_pages={self.num_pages} and kv_cache_memory={self.kv_cache_memory} both size the KV "
                             "cache: give one of them.")

    @classmethod
    def from_options(cls, config: EngineConfig | None, options: dict[str, Any]) -> tuple[EngineConfig, dict[str, Any]]:
        """`config` with those of `options` that are its fields, and the others.

        Raises:
            ValueError: one of them is out of range.
        """
        names = {field.name for field in fields(cls)}
        own = {name: value for name, value in options.items() if name in names}
        return replace(config or cls(), **own), {k: v for k, v in options.items() if k not in names}

    def for_model(self, model: TransformerConfig, platform: str) -> EngineConfig:
        """This configuration with all that depends on nothing but model and platform decided.

        `max_model_len` is at most the model's; `num_pages` and `memory_share` stay open until memory is measured.

        Raises:
            ValueError: `max_model_len` is more than the model takes.
        """
        cpu = platform == "cpu"
        longest = model.max_position_embeddings
        if self.max_model_len is not None and self.max_model_len > longest:
            raise ValueError(f"max_model_len={self.max_model_len} was asked for; the model takes {longest} tokens.")
        seqs = self.max_num_seqs or (_CPU_SEQS if cpu else _ACCELERATOR_SEQS)
        tokens = self.max_num_batched_tokens or max(seqs, _CPU_TOKENS if cpu else _ACCELERATOR_TOKENS)
        if tokens < seqs:
            raise ValueError(f"max_num_batched_tokens={tokens} is less than max_num_seqs={seqs}: a step needs room for "
                             "a token of each sequence.")
        page_size, length = self.page_size or _PAGE_SIZE, self.max_model_len or longest
        if self.page_size is None and platform == "tpu":
            while page_size < _LARGEST_PAGE and seqs * -(-length // page_size) > _TABLE_ON_TPU:
                page_size *= 2
        return replace(self, max_num_seqs=seqs, max_num_batched_tokens=tokens, max_model_len=length,
                       page_size=page_size)

    def token_buckets(self, platform: str) -> list[int]:
        """The numbers of tokens for which a step is compiled, ascending; a step takes the next larger one."""
        assert self.max_num_batched_tokens is not None
        steps = [2**i * part // 4 for i in range(3, 31) for part in ((4,) if i < 7 else (4, 6))]
        return _up_to(self.max_num_batched_tokens, steps, platform)

    def row_buckets(self, platform: str) -> list[int]:
        """The numbers of sequences for which drawing tokens is compiled."""
        assert self.max_num_seqs is not None
        return _up_to(self.max_num_seqs, [2**i for i in range(3, 31)], platform)


def _up_to(largest: int, steps: list[int], platform: str) -> list[int]:
    smallest = [1] if platform == "cpu" else []  # elsewhere registers have eight rows at least
    return [*(n for n in (*smallest, *steps) if n < largest), largest]

