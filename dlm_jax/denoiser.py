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
    "logits" over the vocabulary, whose softmax averages the embeddings. self_cond: the
    last estimate is an input. output_prior: each position's own posterior is an input
    too, and the logits start from it (`model.prior_logits`). causal: a position sees
    none after it (`teacher`). noise_time: the time input is log-SNR, so that it keeps its
    meaning while the schedule adapts. remat: the backward pass computes each layer anew
    instead of keeping what is inside it.
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
    causal: bool = False
    noise_time: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    dtype: str = "float32"
    remat: bool = False


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


@jax.custom_vjp
def product(x: Float[Array, "m k"], w: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """x w, accumulated in float32, in x's precision.

    Its gradient is written out, since XLA's own for CPU transposes the wider operand of
    x^T g inside the fusion that makes it: 3.5 times the time of a whole layer.
    """
    return _dot(x, w, 1, 0)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    axes = (((axis_a,), (axis_b,)), ((), ()))
    out = jax.lax.dot_general(
        a, b, axes, precision="highest", preferred_element_type=jnp.float32
    )
    return out.astype(a.dtype)


def _product_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = saved
    g = jax.lax.optimization_barrier(g)  # made once, not inside each transpose
    narrow = g.shape[1] < x.shape[1]
    d_w = _dot(g, x, 0, 0).T if narrow else _dot(x, g, 0, 0)
    return _dot(g, w, 1, 1), d_w


product.defvjp(lambda x, w: (product(x, w), (x, w)), _product_backward)


def _last_axis(x: Array, w: Array, axes: Any, precision: Any = None) -> Array:
    """`product` as flax's dot_general: x [... k], w [k n]."""
    flat = product(x.reshape(-1, x.shape[-1]), w)
    return flat.reshape(*x.shape[:-1], w.shape[-1])


def _dense(features: int, fan_in: int, name: str, dtype: Any, zero: bool = False):
    init = nn.initializers.zeros if zero else _uniform(fan_in)
    return nn.Dense(
        features,
        kernel_init=init,
        bias_init=init,
        name=name,
        dtype=dtype,
        dot_general=_last_axis,
    )


class Attention(nn.Module):
    """Self-attention over all positions: PADs attend and are attended, as published.

    rotary: queries and keys turn with their position (RoPE, arXiv:2104.09864).
    """

    cfg: DenoiserConfig
    rotary: bool = False

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        cfg, (b, l, h) = self.cfg, x.shape
        qkv = _dense(3 * h, h, "qkv", cfg.dtype)(x)
        heads = (b, l, cfg.heads, h // cfg.heads)
        q, k, v = (part.reshape(heads) for part in jnp.split(qkv, 3, -1))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        scores = jnp.einsum("bqnk,bsnk->bnqs", q, k) / math.sqrt(h // cfg.heads)
        scores = scores.astype(jnp.float32)
        if cfg.causal:
            scores = jnp.where(jnp.tril(jnp.ones((l, l), bool)), scores, -jnp.inf)
        weights = jax.nn.softmax(scores, -1).astype(q.dtype)
        weights = nn.Dropout(cfg.attention_dropout)(weights, deterministic)
        mixed = jnp.einsum("bnqs,bsnk->bqnk", weights, v).reshape(b, l, h)
        return _dense(h, h, "out", cfg.dtype)(mixed)


def rotate(x: Float[Array, "b l n k"]) -> Float[Array, "b l n k"]:
    """RoPE: pairs of coordinates turn by angles proportional to the position."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 100.0 ** (-jnp.arange(half) / half)
    cos, sin = (f(angle)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    u, w = x[..., :half], x[..., half:]
    return jnp.concatenate([u * cos - w * sin, u * sin + w * cos], -1)


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
    """Pre-LN layer with AdaLN-Zero time conditioning, RoPE and tanh GELU."""

    cfg: DenoiserConfig

    @nn.compact
    def __call__(self, x: Array, time: Array, deterministic: bool) -> Array:
        cfg, h = self.cfg, x.shape[-1]
        six = _dense(6 * h, h, "modulation", cfg.dtype, zero=True)(time)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = jnp.split(six, 6, -1)
        y = _bare_norm(cfg.dtype)(x) * (1 + scale) + shift
        y = Attention(cfg, rotary=True, name="attention")(y, deterministic)
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
        block = BLOCKS[cfg.trunk]
        block = nn.remat(block, static_argnums=(3,)) if cfg.remat else block
        for i in range(cfg.layers):
            x = block(cfg, name=f"layer_{i}")(x, time, deterministic)
        if post:
            return jnp.tanh(_dense(h, h, "out", cfg.dtype)(x))
        two = _dense(2 * h, h, "modulation", cfg.dtype, zero=True)(time)
        shift, scale = jnp.split(two, 2, -1)
        return _bare_norm(cfg.dtype)(x) * (1 + scale) + shift


def _positions(post: bool) -> Callable:
    """N(0, 1) under a LayerNorm as published (Q11); small where nothing follows."""
    return nn.initializers.normal(1.0 if post else 0.02)


class Denoiser(nn.Module):
    """(x_t, t, x0_prev) -> raw output [b l out], float32 outside the trunk.

    alone: the estimate of x_0 from each position alone, where cfg.output_prior asks for
    it. Without the head, the trunk's output [b l h].
    """

    cfg: DenoiserConfig
    out: int

    @nn.compact
    def __call__(
        self,
        x_t: Latent,
        t: Time,
        x0_prev: Latent,
        alone: Latent | None = None,
        deterministic: bool = True,
        head: bool = True,
    ) -> Array:
        cfg, h = self.cfg, self.cfg.width
        features = time_features(t, cfg.time_dim)
        time = _dense(4 * cfg.time_dim, cfg.time_dim, "time", "float32")(features)
        time = _dense(h, 4 * cfg.time_dim, "time_2", "float32")(jax.nn.silu(time))
        time = (time if time.ndim == 3 else time[:, None]).astype(cfg.dtype)
        if cfg.trunk == "adaln":
            time = jax.nn.silu(time)
        x = jnp.concatenate([x_t, x0_prev], -1) if cfg.self_cond else x_t
        x = x if alone is None else jnp.concatenate([x, alone], -1)
        y = Trunk(cfg, name="trunk")(x, time, deterministic).astype(jnp.float32)
        return _dense(self.out, h, "head", "float32")(y) if head else y


def head(params: PyTree, y: Float[Array, "b l h"]) -> Float[Array, "b l out"]:
    """The raw output of the trunk's: what `apply` does last."""
    return _last_axis(y, params["head"]["kernel"], None) + params["head"]["bias"]


def output_width(cfg: DenoiserConfig, vocab: int) -> int:
    """d, or v when the denoiser emits logits."""
    return vocab if cfg.predicts == "logits" else cfg.dim


def init(key: PRNGKey, cfg: DenoiserConfig, vocab: int) -> PyTree:
    """Parameters of the denoiser; the positions set the longest text."""
    x = jnp.zeros((1, 1, cfg.dim))
    module = Denoiser(cfg, output_width(cfg, vocab))
    alone = x if cfg.output_prior else None
    return module.init(key, x, jnp.zeros(1), x, alone)["params"]


def apply(
    params: PyTree,
    cfg: DenoiserConfig,
    vocab: int,
    x_t: Latent,
    t: Time,
    x0_prev: Latent,
    *,
    alone: Latent | None = None,
    key: PRNGKey | None = None,
    head: bool = True,
) -> Float[Array, "b l out"]:
    """The raw output, or the trunk's without the head; a key turns dropout on."""
    module = Denoiser(cfg, output_width(cfg, vocab))
    rngs = None if key is None else {"dropout": key}
    args = (x_t, t, x0_prev, alone, key is None, head)
    return jnp.asarray(module.apply({"params": params}, *args, rngs=rngs))
