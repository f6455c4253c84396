# SPDX-License-Identifier: Apache-2.0
"""The denoiser f(x_t, t): a transformer over noisy embeddings.

There are two trunks. `post_ln` is BERT's post-LN encoder between tanh projections, as in
arXiv:2205.14217 (docs/method.md, section 2). `adaln` has pre-LN blocks whose scale,
shift and gate depend on the time and start at zero (AdaLN-Zero, arXiv:2212.09748).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Bool, Float, Int

from dlm_jax.nn.ops import (
    FUSED_ATTENTION,
    apply_rope,
    dropout,
    fused_attention,
    gelu,
    matmul,
    matmul_nt,
    normal_cdf,
    normal_cdf_tanh,
)
from dlm_jax.types import Array, Latent, PRNGKey, PyTree, Time

Inside = Bool[Array, "b l"] | None  # positions of the text; None: all
Given = Int[Array, "b l"] | None  # 0: open, 1: known, OUTSIDE: beyond END
OUTSIDE = 2

# (matmul dtype, activation dtype) of the trunk. CPUs are slow at elementwise work in
# bfloat16; GPUs and TPUs are fast.
DTYPES = {
    "float32": ("float32", "float32"),
    "mixed": ("bfloat16", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """The network. The defaults are the published E2E model (87M parameters).

    Weights, and activations outside the trunk, are float32. `trunk` is a key of
    BLOCKS, `dtype` a key of DTYPES.
    """

    dim: int = 16  # d, of the embedding
    hidden_dim: int = 768
    layers: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    positions: int = 512  # the longest sequence
    time_dim: int = 128  # sinusoidal time features
    trunk: str = "post_ln"  # post_ln | adaln
    predicts: str = "x0"  # x0 | eps | mu (the mean of x_{t-1}) | logits over words
    self_cond: bool = False  # the last x0_hat is an input
    token_posterior_input: bool = (
        False  # E[x_0 | x_t] of each position alone is an input
    )
    known_length: bool = False  # a text's length is given; attention skips its PAD
    known_source: bool = False  # a pair's source is given; only its target is learned
    causal: bool = False  # no attention to later positions, for objective "ar"
    time_input: str = "t"  # t | log_snr, which keeps its meaning as schedules adapt
    dropout: float = 0.1
    attention_dropout: float = 0.1
    dtype: str = "float32"  # float32 | mixed, for CPUs | bfloat16, for GPUs and TPUs
    remat: bool = False  # recompute layers in the backward pass: less memory

    @property
    def marks_known(self) -> bool:
        """Whether known tokens are marked, with one time per text, not given a time each."""
        return (self.known_length or self.known_source) and not self.causal

    @property
    def dtypes(self) -> tuple[str, str]:
        """The dtypes of the trunk's matrix products and of its activations."""
        return DTYPES[self.dtype]

    @property
    def matmul_dtype(self) -> str:
        """The dtype of the trunk's matrix products."""
        return DTYPES[self.dtype][0]

    @property
    def activation_dtype(self) -> str:
        """The dtype of the trunk's activations."""
        return DTYPES[self.dtype][1]


def time_features(t: Time, dim: int) -> Float[Array, "*t {dim}"]:
    """Computes sinusoidal features of 1000 t, cosines first, for t in [0, 1]."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half) / half)
    angle = 1000.0 * jnp.asarray(t)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def _uniform(fan_in: int) -> Callable:
    """Returns the initializer U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dense(nn.Module):
    """Computes x w + b over the last axis.

    dtype: of the operands; activation_dtype: of the matrix product's result; out: of the
    output, x's if "". zero: initialise with zeros, otherwise as PyTorch does.
    """

    features: int
    dtype: str
    activation_dtype: str = "float32"
    zero: bool = False
    out: str = ""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        k, out = x.shape[-1], self.out or str(x.dtype)
        init = nn.initializers.zeros if self.zero else _uniform(k)
        w = self.param("kernel", init, (k, self.features))
        b = self.param("bias", init, (self.features,))
        y: Any = matmul(x.reshape(-1, k), w, self.dtype, self.activation_dtype)
        return (y + b.astype(y.dtype)).astype(out).reshape(*x.shape[:-1], self.features)


class Dropout(nn.Module):
    """Dropout at a rate, with `ops.dropout`."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        if deterministic or not self.rate:
            return x
        return dropout(x, jax.random.bits(self.make_rng("dropout"), (2,)), self.rate)


class Attention(nn.Module):
    """Self-attention to `inside` (None: all, as published); causal if cfg.causal.

    rotary: apply RoPE to queries and keys.
    """

    cfg: DenoiserConfig
    rotary: bool = False

    @nn.compact
    def __call__(self, x: Array, deterministic: bool, inside: Inside = None) -> Array:
        cfg, (b, l, h) = self.cfg, x.shape
        qkv = Dense(3 * h, *cfg.dtypes, name="qkv")(x)
        heads = qkv.reshape(b, l, 3 * cfg.heads, -1).swapaxes(1, 2)
        q, k, v = jnp.split(heads, 3, 1)  # [b heads l k]
        if self.rotary:
            q, k = apply_rope(q), apply_rope(k)
        drops = not deterministic and cfg.attention_dropout > 0
        if can_fuse_attention(cfg) and not drops and l > 1:  # cuDNN needs two positions
            mixed: Any = fused_attention(q, k, v, cfg.causal, inside)
        else:
            scores: Any = matmul_nt(q, k, cfg.matmul_dtype, "float32")
            scores = scores / math.sqrt(h // cfg.heads)
            if cfg.causal:
                scores = jnp.where(jnp.tril(jnp.ones((l, l), bool)), scores, -jnp.inf)
            if inside is not None:
                scores = jnp.where(inside[:, None, None], scores, -jnp.inf)
            weights = jax.nn.softmax(scores, -1)
            weights = Dropout(cfg.attention_dropout)(weights, deterministic)
            mixed = matmul(weights, v, *cfg.dtypes)
        mixed = mixed.astype(x.dtype).swapaxes(1, 2).reshape(b, l, h)
        return Dense(h, *cfg.dtypes, name="out")(mixed)


def can_fuse_attention(cfg: DenoiserConfig) -> bool:
    """Whether this backend has fused attention for this dtype and head size."""
    head = cfg.hidden_dim // cfg.heads
    known = (
        jax.default_backend() in FUSED_ATTENTION and cfg.activation_dtype == "bfloat16"
    )
    return known and head % 8 == 0 and head <= 128


class PostLNBlock(nn.Module):
    """BERT's layer: each residual sum is followed by LayerNorm; GELU by erf."""

    cfg: DenoiserConfig

    @nn.compact
    def __call__(
        self, x: Array, time: Array, deterministic: bool, inside: Inside = None
    ) -> Array:
        cfg = self.cfg

        def add(name: str, x: Array, update: Array) -> Array:
            update = Dropout(cfg.dropout)(update, deterministic)
            return _layer_norm(name, cfg, x + update)

        attended = Attention(cfg, name="attention")(x, deterministic, inside)
        x = add("attention_norm", x, attended)
        return add("norm", x, _feed_forward(cfg, normal_cdf)(x))


class AdaLNBlock(nn.Module):
    """Pre-LN layer with AdaLN-Zero time conditioning, RoPE and GELU by tanh."""

    cfg: DenoiserConfig

    @nn.compact
    def __call__(
        self, x: Array, time: Array, deterministic: bool, inside: Inside = None
    ) -> Array:
        cfg, h = self.cfg, x.shape[-1]
        six = Dense(6 * h, *cfg.dtypes, zero=True, name="modulation")(time)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = jnp.split(six, 6, -1)
        y = _norm_without_affine(cfg.activation_dtype)(x) * (1 + scale) + shift
        y = Attention(cfg, rotary=True, name="attention")(y, deterministic, inside)
        x = x + gate * Dropout(cfg.dropout)(y, deterministic)
        y = _norm_without_affine(cfg.activation_dtype)(x) * (1 + scale_ff) + shift_ff
        y = _feed_forward(cfg, normal_cdf_tanh)(y)
        return x + gate_ff * Dropout(cfg.dropout)(y, deterministic)


def _feed_forward(cfg: DenoiserConfig, phi: Callable) -> Callable[[Array], Array]:
    """Returns the MLP, whose two layers belong to the calling block."""
    up = Dense(cfg.mlp_dim, *cfg.dtypes, name="up")
    down = Dense(cfg.hidden_dim, *cfg.dtypes, out=cfg.activation_dtype, name="down")
    return lambda x: down(gelu(up(x.astype(cfg.matmul_dtype)), phi))


def _layer_norm(name: str, cfg: DenoiserConfig, x: Array) -> Array:
    """Applies BERT's LayerNorm to rows [m h], so that its gradient sums over one axis."""
    norm = nn.LayerNorm(
        1e-12, name=name, dtype=cfg.activation_dtype, use_fast_variance=False
    )
    return norm(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def _norm_without_affine(dtype: Any) -> nn.LayerNorm:
    return nn.LayerNorm(1e-6, use_bias=False, use_scale=False, dtype=dtype)


BLOCKS: dict[str, type[nn.Module]] = {"post_ln": PostLNBlock, "adaln": AdaLNBlock}


def _compile_separately(layer: Callable) -> Callable:
    """Returns layer(block, x) as a call that XLA compiles separately on CPU.

    Otherwise XLA's CPU compiler fuses the elementwise residual stream from the first
    layer into every kernel of the last, and time grows quadratically with the layers.
    """
    inlineable = "false" if jax.default_backend() == "cpu" else None

    def inside(block: nn.Module, x: Array) -> Array:
        with set_xla_metadata(inlineable=None):  # not the ops inside
            return layer(block, x)

    def call(block: nn.Module, x: Array) -> Array:
        with set_xla_metadata(inlineable=inlineable):
            return nn.jit(inside)(block, x)

    return call


class Trunk(nn.Module):
    """The layers, between tanh projections (post_ln) or before a final norm (adaln)."""

    cfg: DenoiserConfig

    @nn.compact
    def __call__(
        self, x: Array, time: Array, deterministic: bool, inside: Inside = None
    ) -> Array:
        cfg, h, post = self.cfg, self.cfg.hidden_dim, self.cfg.trunk == "post_ln"
        x = Dense(h, *cfg.dtypes, name="in")(x.astype(cfg.activation_dtype))
        if post:
            x = Dense(h, *cfg.dtypes, name="in_2")(jnp.tanh(x))
        table = self.param("positions", _positions(post), (cfg.positions, h))
        x = x + table[: x.shape[1]].astype(x.dtype)
        if post:
            x = _layer_norm("norm", cfg, x + time)
        x = Dropout(cfg.dropout)(x, deterministic)
        block = BLOCKS[cfg.trunk]
        block = nn.remat(block, static_argnums=(3,)) if cfg.remat else block
        layer = _compile_separately(
            lambda block, x: block(x, time, deterministic, inside)
        )
        for i in range(cfg.layers):
            x = layer(block(cfg, name=f"layer_{i}"), x)
        if post:
            return jnp.tanh(Dense(h, *cfg.dtypes, name="out")(x))
        two = Dense(2 * h, *cfg.dtypes, zero=True, name="modulation")(time)
        shift, scale = jnp.split(two, 2, -1)
        return _norm_without_affine(cfg.activation_dtype)(x) * (1 + scale) + shift


def _positions(post: bool) -> Callable:
    """Returns the initializer N(0, 1), as published, or N(0, 0.02^2) for adaln."""
    return nn.initializers.normal(1.0 if post else 0.02)


class Denoiser(nn.Module):
    """Maps (x_t, t, x0_prev) to the raw output [b l out], or without head to [b l h].

    posterior_x0 [b l d]: E[x_0 | x_t] by each position alone, an input if
    cfg.token_posterior_input is set.
    """

    cfg: DenoiserConfig
    out: int

    @nn.compact
    def __call__(
        self,
        x_t: Latent,
        t: Time,
        x0_prev: Latent,
        posterior_x0: Latent | None = None,
        deterministic: bool = True,
        head: bool = True,
        given: Given = None,
    ) -> Array:
        cfg, h = self.cfg, self.cfg.hidden_dim
        features = time_features(t, cfg.time_dim)
        time = Dense(4 * cfg.time_dim, "float32", name="time")(features)
        time = Dense(h, "float32", name="time_2")(jax.nn.silu(time))
        time = (time if time.ndim == 3 else time[:, None]).astype(cfg.activation_dtype)
        if cfg.trunk == "adaln":
            time = jax.nn.silu(time)
        x = jnp.concatenate([x_t, x0_prev], -1) if cfg.self_cond else x_t
        x = x if posterior_x0 is None else jnp.concatenate([x, posterior_x0], -1)
        inside = None
        if cfg.marks_known:
            given = jnp.zeros(x.shape[:2], int) if given is None else given
            x = jnp.concatenate([x, (given > 0)[..., None].astype(x.dtype)], -1)
            inside = given < OUTSIDE if cfg.known_length else None
        y = Trunk(cfg, name="trunk")(x, time, deterministic, inside)
        y = y.astype(jnp.float32)
        return Dense(self.out, "float32", name="head")(y) if head else y


def head(params: PyTree, y: Float[Array, "b l h"]) -> Float[Array, "b l out"]:
    """Applies the output layer to the trunk's output: the last part of `apply`."""
    module = Dense(params["head"]["bias"].size, "float32")
    return jnp.asarray(module.apply({"params": params["head"]}, y))


def output_width(cfg: DenoiserConfig, vocab: int) -> int:
    """Returns v if the network predicts logits, else d."""
    return vocab if cfg.predicts == "logits" else cfg.dim


def init(key: PRNGKey, cfg: DenoiserConfig, vocab: int) -> PyTree:
    """Initialises the parameters of the denoiser."""
    x = jnp.zeros((1, 1, cfg.dim))
    module = Denoiser(cfg, output_width(cfg, vocab))
    posterior_x0 = x if cfg.token_posterior_input else None
    return module.init(key, x, jnp.zeros(1), x, posterior_x0)["params"]


def cast_kernels(params: PyTree, cfg: DenoiserConfig) -> PyTree:
    """Casts the trunk's kernels to the dtype of its matrix products.

    A sampler does this once, instead of in every step.
    """
    if cfg.matmul_dtype == "float32":
        return params

    def cast(path: tuple, leaf: Array) -> Array:
        kernel = path[0].key == "trunk" and path[-1].key == "kernel"
        return leaf.astype(cfg.matmul_dtype) if kernel else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def apply(
    params: PyTree,
    cfg: DenoiserConfig,
    vocab: int,
    x_t: Latent,
    t: Time,
    x0_prev: Latent,
    *,
    posterior_x0: Latent | None = None,
    key: PRNGKey | None = None,
    head: bool = True,
    given: Given = None,
) -> Float[Array, "b l out"]:
    """Computes the raw output, or without head the trunk's output [b l h].

    A key turns dropout on. given: for cfg.marks_known, which tokens are known.
    """
    module = Denoiser(cfg, output_width(cfg, vocab))
    rngs = None if key is None else {"dropout": key}
    args = (x_t, t, x0_prev, posterior_x0, key is None, head, given)
    return jnp.asarray(module.apply({"params": params}, *args, rngs=rngs))
