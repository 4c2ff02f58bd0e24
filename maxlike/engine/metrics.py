"""What an engine counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class EngineMetrics:
    """Counts since the start, and how things stand now; written by the engine's thread alone.

    Args:
        steps: run so far.
        prompt_tokens, generation_tokens: read (those found in the cache left out) and drawn.
        queried_tokens, cached_tokens: of prompts, looked for in the cache, and found there.
        finished: requests by the reason of their end.
        preemptions: times that a request gave up its pages to others.
        running, waiting: requests now.
        pages_used, pages_total: of the cache, now.
    """

    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    queried_tokens: int = 0
    cached_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    preemptions: int = 0
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
