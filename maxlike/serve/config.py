"""What a user may say of the server."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

MAX_PROMPTS = 2048
"""Most prompts or inputs in a request, as OpenAI has it."""


@dataclass(frozen=True)
class ServeConfig:
    """Where the server listens, whom it lets in, and how much it takes on.

    Args:
        host: address to listen on; `0.0.0.0` for all of the machine's.
        port: 0 takes a free one, and the server says which.
        api_keys: whoever has one of them is let in; without any, everybody is.
        served_model_name: what clients call the model.
        base_model_name: of the model under an adapter; `None`: there is no adapter.
        max_body_bytes: longest body of a request.
        body_timeout: seconds in which a request's body must have come.
        max_concurrent_requests: more are turned away (429).
        drain_timeout: seconds that running requests have to finish once the server is told to stop.
        cors_origins: origins whose pages may call the server from a browser; `*` for all.

    Raises:
        ValueError: a value is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    served_model_name: str = "maxlike"
    base_model_name: str | None = None
    max_body_bytes: int = 4 * 2**20
    body_timeout: float = 30.0
    max_concurrent_requests: int = 1024
    drain_timeout: float = 30.0
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be between 0 (any that is free) and {2**16 - 1}; got {self.port}.")
        if not self.served_model_name:
            raise ValueError("served_model_name is empty: give the model a name.")
        for name in ("max_body_bytes", "max_concurrent_requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not (math.isfinite(self.body_timeout) and self.body_timeout > 0):
            raise ValueError(f"body_timeout must be above 0 seconds; got {self.body_timeout}.")
        if not (math.isfinite(self.drain_timeout) and self.drain_timeout >= 0):
            raise ValueError(f"drain_timeout must be 0 seconds or more; got {self.drain_timeout}.")
        for number, key in enumerate(self.api_keys, 1):
            # A header's value: others could never be sent.
            if not key or not all("!" <= character <= "~" for character in key):
                raise ValueError(f"API key {number} of {len(self.api_keys)} must be printable ASCII without spaces, "
                                 "and not empty.")
