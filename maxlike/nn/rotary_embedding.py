"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) and its context extensions.

No parameters: a `RotaryEmbedding` is a frozen description, from which angles are computed in float32 for the
positions of a step. Dimension `i` is paired with `i + rotary_dim / 2`, as Hugging Face checkpoints expect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation, every frequency divided by `factor` (Chen et al. 2023, https://arxiv.org/abs/2306.15595)."""

    factor: float

    attention_factor = 1.0

    def scale(self, inv_freq: np.ndarray, theta: float) -> np.ndarray:
        """`inv_freq`, `float32[rotary_dim / 2]` radians a position at base `theta`, scaled."""
        return inv_freq / np.float32(self.factor)


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: long wavelengths divided by `factor`, short ones kept, a ramp between.

    Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783; fields as in the `rope_scaling` of a `config.json`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    attention_factor = 1.0

    def scale(self, inv_freq: np.ndarray, theta: float) -> np.ndarray:
        """`inv_freq`, `float32[rotary_dim / 2]` radians a position at base `theta`, scaled."""
        turns = self.original_max_position_embeddings * inv_freq / (2 * math.pi)  # over the original context
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return (inv_freq * (kept + (1 - kept) / self.factor)).astype(np.float32)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071): interpolation by wavelength, and warmer attention.

    `attention_factor` multiplies cos and sin; `None` takes the paper's `0.1 ln(factor) + 1`, or with `mscale`
    and `mscale_all_dim` DeepSeek's ratio of two such terms. `truncate` rounds the ramp's ends to whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    explicit_attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def attention_factor(self) -> float:
        """What multiplies cos and sin."""
        def term(mscale: float) -> float:
            return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.explicit_attention_factor is not None:
            return self.explicit_attention_factor
        if self.mscale and self.mscale_all_dim:
            return term(self.mscale) / term(self.mscale_all_dim)
        return term(1.0)

    def scale(self, inv_freq: np.ndarray, theta: float) -> np.ndarray:
        """`inv_freq`, `float32[rotary_dim / 2]` radians a position at base `theta`, scaled."""
        dim = 2 * len(inv_freq)

        def dimension_of(rotations: float) -> float:
            """The dimension that turns `rotations` times over the original context."""
            return dim * math.log(self.original_max_position_embeddings / (rotations * 2 * math.pi)) / (
                2 * math.log(theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (np.arange(dim // 2, dtype=np.float32) - low) / (high - low or 0.001)
        kept = 1 - np.clip(ramp, 0, 1)
        return (inv_freq * (kept + (1 - kept) / self.factor)).astype(np.float32)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True)
class RotaryEmbedding:
    """Angles for the first `rotary_dim` of `head_dim` dimensions (`None`: all); the rest pass unrotated.

    Dimension pair i turns by `theta ** (-2 i / rotary_dim)` radians a position, before `scaling`.

    Raises:
        ValueError: `rotary_dim` is odd, or not between 2 and `head_dim`.
    """

    head_dim: int
    theta: float = 10000.0
    rotary_dim: int | None = None
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if dim % 2 or not 0 < dim <= self.head_dim:
            raise ValueError(f"rotary_dim must be even and between 2 and head_dim {self.head_dim}; got {dim}.")

    @property
    def inv_freq(self) -> np.ndarray:
        """`float32[rotary_dim / 2]`: radians a position."""
        dim = self.rotary_dim or self.head_dim
        inv_freq = (1.0 / np.float32(self.theta) ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)
        return inv_freq if self.scaling is None else self.scaling.scale(inv_freq, self.theta)

    def __call__(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`int32[T] -> (cos, sin)`, both `float32[T, rotary_dim / 2]`."""
        angles = positions.astype(jnp.float32)[:, None] * self.inv_freq
        factor = 1.0 if self.scaling is None else self.scaling.attention_factor
        return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates heads by a step's angles, in float32: `[T, heads, head_dim] -> [T, heads, head_dim]` in `x.dtype`.

    Args:
        cos, sin: `float32[T, rotary_dim / 2]`, what `RotaryEmbedding` gives for the tokens' positions.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    h = x.astype(jnp.float32)
    first, second = h[..., :half], h[..., half:2 * half]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    rest = [h[..., 2 * half:]] if 2 * half < h.shape[-1] else []
    return jnp.concatenate(rotated + rest, axis=-1).astype(x.dtype)
