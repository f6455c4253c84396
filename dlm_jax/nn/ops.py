# SPDX-License-Identifier: Apache-2.0
"""Matrix products and GELU with custom gradients, dropout, fused attention, RoPE."""

import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Float, UInt32

from dlm_jax.types import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(
    a: Float[Array, "*s m k"],
    b: Float[Array, "*s k n"],
    dtype: str,
    out: str,
) -> Float[Array, "*s m n"]:
    """Computes a b: multiplies in dtype, accumulates in float32, returns dtype out."""
    return _dot(a.astype(dtype), b.astype(dtype), 1, 0, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul_nt(
    a: Float[Array, "*s m k"],
    b: Float[Array, "*s n k"],
    dtype: str,
    out: str,
) -> Float[Array, "*s m n"]:
    """Computes a b^T, with the dtypes of `matmul`."""
    return _dot(a.astype(dtype), b.astype(dtype), 1, 1, out)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int, out: str = "float32") -> Array:
    """Contracts one of the last two axes of a with one of b; the others are batch axes."""
    rest = tuple(range(a.ndim - 2))
    over = ((len(rest) + axis_a,), (len(rest) + axis_b,))
    return jax.lax.dot_general(
        a,
        b,
        (over, (rest, rest)),
        precision="highest",
        preferred_element_type=jnp.dtype(out),
    )


def _by_rows(x: Array) -> Array:
    """Returns x, on CPU with its memory in row-major order."""

    def constrained(x: Array) -> Array:
        rows = Layout(major_to_minor=tuple(range(x.ndim)))
        return with_layout_constraint(jnp.asarray(x), rows)

    return jax.lax.platform_dependent(x, cpu=constrained, default=lambda x: x)


def _forward(axis_b: int, a: Array, b: Array, dtype: str, out: str) -> tuple:
    low = a.astype(dtype), b.astype(dtype)
    return _dot(*low, 1, axis_b, out), (low, a[:0], b[:0])


def _backward(
    axis_b: int, dtype: str, out: str, saved: tuple, g: Array
) -> tuple[Array, Array]:
    (a, b), like_a, like_b = saved
    g = _by_rows(g.astype(dtype))
    d_a = _dot(g, b, 1, 1 - axis_b, out)
    d_b = _outer(g, a) if axis_b else _outer(a, g)
    return d_a.astype(like_a.dtype), d_b.astype(like_b.dtype)


def _outer(a: Array, b: Array) -> Array:
    """Computes a^T b, transposing the narrower of the two."""
    if a.shape[-1] <= b.shape[-1]:
        return _dot(_by_rows(jnp.matrix_transpose(a)), b, 1, 0)
    return jnp.matrix_transpose(_by_rows(_outer(b, a)))


matmul.defvjp(functools.partial(_forward, 0), functools.partial(_backward, 0))
matmul_nt.defvjp(functools.partial(_forward, 1), functools.partial(_backward, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dropout(x: Float[Array, "*s"], seed: UInt32[Array, "2"], rate: float) -> Array:
    """Applies dropout: x / (1 - rate) where `dropout_mask` is True, else 0.

    Only the seed is kept for the gradient.
    """
    return jnp.where(dropout_mask(seed, x.shape, rate), x / (1 - rate), 0)


def dropout_mask(
    seed: UInt32[Array, "2"], shape: tuple[int, ...], rate: float
) -> Array:
    """Returns a mask that is True with probability 1 - rate.

    A hash of each element's index and the seed (murmur3's finaliser) replaces threefry,
    which took up to a sixth of a training step. The mask is recomputed in the backward
    pass.
    """
    place = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    v = place * jnp.uint32(0x9E3779B1) + seed[0]
    v = (v ^ (v >> 16)) * jnp.uint32(0x85EBCA6B) ^ seed[1]
    v = (v ^ (v >> 13)) * jnp.uint32(0xC2B2AE35)
    return v ^ (v >> 16) >= jnp.uint32(round(rate * 2**32))


dropout.defvjp(
    lambda x, seed, rate: (dropout(x, seed, rate), seed),
    lambda rate, seed, g: (dropout(g, seed, rate), np.zeros(2, jax.dtypes.float0)),
)
# backend: the implementation that never stores the attention scores
FUSED_ATTENTION: dict[str, Literal["xla", "cudnn"]] = {"gpu": "cudnn"}


def fused_attention(
    q: Array, k: Array, v: Array, causal: bool, inside: Array | None = None
) -> Float[Array, "b n l k"]:
    """Computes softmax(q k^T / sqrt k) v for arrays [b heads l k].

    inside [b l]: the keys that are read, by default all.
    """
    by_place = (x.swapaxes(1, 2) for x in (q, k, v))
    mixed = jax.nn.dot_product_attention(
        *by_place,
        is_causal=causal,
        mask=None if inside is None else inside[:, None, None],
        implementation=FUSED_ATTENTION[jax.default_backend()],
    )
    return mixed.swapaxes(1, 2)


def apply_rope(x: Float[Array, "b n l k"]) -> Float[Array, "b n l k"]:
    """Applies rotary positions (RoPE, arXiv:2104.09864) to queries or keys."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[2])[:, None] * 100.0 ** (-np.arange(half) / half)
    cos, sin = (f(angle).astype(x.dtype) for f in (np.cos, np.sin))  # constants
    u, w = x[..., :half], x[..., half:]
    return jnp.concatenate([u * cos - w * sin, u * sin + w * cos], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x: Float[Array, "*s"], phi: Callable) -> Float[Array, "*s"]:
    """Computes x Phi(x) in float32; only x is kept for the gradient.

    phi(x) returns Phi(x) and its derivative.
    """
    wide = x.astype(jnp.float32)
    return (wide * phi(wide)[0]).astype(x.dtype)


def _gelu_backward(phi: Callable, x: Array, g: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    value, slope = phi(wide)
    return ((g * (value + wide * slope)).astype(x.dtype),)


gelu.defvjp(lambda x, phi: (gelu(x, phi), x), _gelu_backward)


def normal_cdf(x: Array) -> tuple[Array, Array]:
    """Returns the normal CDF and density, by erf: erfc, as in jax.nn, takes twice as long."""
    density = jnp.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + jax.lax.erf(x / math.sqrt(2))), density


def normal_cdf_tanh(x: Array) -> tuple[Array, Array]:
    """Returns the tanh approximation of the normal CDF, and its derivative.

    Source: arXiv:1606.08415.
    """
    c, a = math.sqrt(2 / math.pi), 0.044715
    t = jnp.tanh(c * (x + a * x**3))
    return 0.5 * (1 + t), 0.5 * c * (1 - t**2) * (1 + 3 * a * x**2)
