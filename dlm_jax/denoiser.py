# SPDX-License-Identifier: Apache-2.0
"""The denoiser f(x_t, t): a transformer over noisy embeddings; the one flax file.

Two trunks. `post_ln`: BERT's post-LN encoder between tanh projections, as published
(arXiv:2205.14217, REFERENCE 1.4). `adaln`: pre-LN blocks whose scale, shift and gate
come from the time, zero at the start (AdaLN-Zero, arXiv:2212.09748), for small models.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from dlm_jax.types import Array, Latent, PRNGKey, PyTree, Time


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """The network; the defaults are the published E2E model (87M parameters).

    predicts: what the output means: "x0", "eps", "mu" (the mean of x_{t-1}), or
    "logits" over the vocabulary, whose softmax averages the embeddings.
    """

    dim: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    ff: int = 3072
    positions: int = 512
    time_dim: int = 128
    trunk: str = "post_ln"
    predicts: str = "x0"
    self_cond: bool = False
    output_prior: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    dtype: str = "float32"


def time_features(t: Time, dim: int) -> Float[Array, "*t {dim}"]:
    """Sinusoids of 1000 t, cosines first (REFERENCE 1.4); t = index / steps."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half) / half)
    angle = 1000.0 * jnp.asarray(t)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def _uniform(fan_in: int) -> Callable:
    """U(-1/sqrt(fan_in), +): PyTorch's default for a linear layer and its bias."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _dense(features: int, fan_in: int, name: str, dtype: Any, zero: bool = False):
    init = nn.initializers.zeros if zero else _uniform(fan_in)
    return nn.Dense(features, kernel_init=init, bias_init=init, name=name, dtype=dtype)


class Attention(nn.Module):
    """Full self-attention, no mask: PADs attend and are attended, as published."""

    cfg: DenoiserConfig

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        cfg, (b, l, h) = self.cfg, x.shape
        qkv = _dense(3 * h, h, "qkv", cfg.dtype)(x)
        q, k, v = jnp.moveaxis(qkv.reshape(b, l, 3, cfg.heads, h // cfg.heads), 2, 0)
        scores = jnp.einsum("bqnk,bsnk->bnqs", q, k) / math.sqrt(h // cfg.heads)
        weights = jax.nn.softmax(scores.astype(jnp.float32), -1).astype(q.dtype)
        weights = nn.Dropout(cfg.attention_dropout)(weights, deterministic)
        mixed = jnp.einsum("bnqs,bsnk->bqnk", weights, v).reshape(b, l, h)
        return _dense(h, h, "out", cfg.dtype)(mixed)


class PostBlock(nn.Module):
    """BERT's layer: residual, then LayerNorm (eps 1e-12); exact GELU."""

    cfg: DenoiserConfig

    @nn.compact
    def __call__(self, x: Array, time: Array, deterministic: bool) -> Array:
        cfg, h = self.cfg, x.shape[-1]

        def add(name: str, x: Array, update: Array) -> Array:
            update = nn.Dropout(cfg.dropout)(update, deterministic)
            return _layer_norm(name, cfg.dtype)(x + update)

        x = add("attention_norm", x, Attention(cfg, name="attention")(x, deterministic))
        hidden = _dense(cfg.ff, h, "up", cfg.dtype)(x)
        hidden = jax.nn.gelu(hidden, approximate=False)
        return add("norm", x, _dense(h, cfg.ff, "down", cfg.dtype)(hidden))


class AdaBlock(nn.Module):
    """Pre-LN layer with AdaLN-Zero time conditioning; tanh GELU."""

    cfg: DenoiserConfig

    @nn.compact
    def __call__(self, x: Array, time: Array, deterministic: bool) -> Array:
        cfg, h = self.cfg, x.shape[-1]
        six = _dense(6 * h, h, "modulation", cfg.dtype, zero=True)(time)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = jnp.split(six, 6, -1)
        y = _bare_norm(cfg.dtype)(x) * (1 + scale) + shift
        y = Attention(cfg, name="attention")(y, deterministic)
        x = x + gate * nn.Dropout(cfg.dropout)(y, deterministic)
        y = _bare_norm(cfg.dtype)(x) * (1 + scale_ff) + shift_ff
        y = jax.nn.gelu(_dense(cfg.ff, h, "up", cfg.dtype)(y))
        y = _dense(h, cfg.ff, "down", cfg.dtype)(y)
        return x + gate_ff * nn.Dropout(cfg.dropout)(y, deterministic)


def _layer_norm(name: str, dtype: Any) -> nn.LayerNorm:
    return nn.LayerNorm(1e-12, name=name, dtype=dtype, use_fast_variance=False)


def _bare_norm(dtype: Any) -> nn.LayerNorm:
    return nn.LayerNorm(1e-6, use_bias=False, use_scale=False, dtype=dtype)


BLOCKS: dict[str, type[nn.Module]] = {"post_ln": PostBlock, "adaln": AdaBlock}


class Trunk(nn.Module):
    """The layers, between tanh projections (post_ln) or under one norm (adaln)."""

    cfg: DenoiserConfig

    @nn.compact
    def __call__(self, x: Array, time: Array, deterministic: bool) -> Array:
        cfg, h, post = self.cfg, self.cfg.width, self.cfg.trunk == "post_ln"
        x = _dense(h, x.shape[-1], "in", cfg.dtype)(x)
        if post:
            x = _dense(h, h, "in_2", cfg.dtype)(jnp.tanh(x))
        table = self.param("positions", _positions(post), (cfg.positions, h))
        x = x + table[: x.shape[1]].astype(x.dtype)
        if post:
            x = _layer_norm("norm", cfg.dtype)(x + time)
        x = nn.Dropout(cfg.dropout)(x, deterministic)
        for i in range(cfg.layers):
            x = BLOCKS[cfg.trunk](cfg, name=f"layer_{i}")(x, time, deterministic)
        if post:
            return jnp.tanh(_dense(h, h, "out", cfg.dtype)(x))
        two = _dense(2 * h, h, "modulation", cfg.dtype, zero=True)(time)
        shift, scale = jnp.split(two, 2, -1)
        return _bare_norm(cfg.dtype)(x) * (1 + scale) + shift


def _positions(post: bool) -> Callable:
    """N(0, 1) under a LayerNorm as published (Q11); small where nothing follows."""
    return nn.initializers.normal(1.0 if post else 0.02)


class Denoiser(nn.Module):
    """(x_t, t, x0_prev) -> raw output [b l out], float32 outside the trunk."""

    cfg: DenoiserConfig
    out: int

    @nn.compact
    def __call__(
        self, x_t: Latent, t: Time, x0_prev: Latent, deterministic: bool = True
    ) -> Array:
        cfg, h = self.cfg, self.cfg.width
        features = time_features(t, cfg.time_dim)
        time = _dense(4 * cfg.time_dim, cfg.time_dim, "time", "float32")(features)
        time = _dense(h, 4 * cfg.time_dim, "time_2", "float32")(jax.nn.silu(time))
        time = (time if time.ndim == 3 else time[:, None]).astype(cfg.dtype)
        if cfg.trunk == "adaln":
            time = jax.nn.silu(time)
        x = jnp.concatenate([x_t, x0_prev], -1) if cfg.self_cond else x_t
        y = Trunk(cfg, name="trunk")(x, time, deterministic)
        return _dense(self.out, h, "head", "float32")(y.astype(jnp.float32))


def output_width(cfg: DenoiserConfig, vocab: int) -> int:
    """d, or v when the denoiser emits logits."""
    return vocab if cfg.predicts == "logits" else cfg.dim


def init(key: PRNGKey, cfg: DenoiserConfig, vocab: int) -> PyTree:
    """Parameters of the denoiser; the positions set the longest text."""
    x = jnp.zeros((1, 1, cfg.dim))
    module = Denoiser(cfg, output_width(cfg, vocab))
    return module.init(key, x, jnp.zeros(1), x)["params"]


def apply(
    params: PyTree,
    cfg: DenoiserConfig,
    vocab: int,
    x_t: Latent,
    t: Time,
    x0_prev: Latent,
    *,
    key: PRNGKey | None = None,
) -> Float[Array, "b l out"]:
    """The raw output; a key turns dropout on."""
    module = Denoiser(cfg, output_width(cfg, vocab))
    rngs = None if key is None else {"dropout": key}
    return module.apply({"params": params}, x_t, t, x0_prev, key is None, rngs=rngs)
