# SPDX-License-Identifier: Apache-2.0
"""The model: an embedding table, a rounding bias and a denoiser."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from dlm_jax.diffusion import rounding
from dlm_jax.diffusion.embedding import init_table
from dlm_jax.diffusion.schedule import (
    Schedule,
    expand_to,
    posterior_coefficients,
    require_num_steps,
)
from dlm_jax.nn import transformer
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.types import (
    END,
    PAD,
    START,
    Array,
    Bias,
    Ids,
    Latent,
    Logits,
    PRNGKey,
    PyTree,
    Table,
    Time,
)

AT_KNOWN, AT_OUTSIDE = -0.5, -1.0  # times of what a given length makes known
MAX_DENSE_VOCAB = 2048  # above it, logits are computed one example at a time

Masks = tuple[Bool[Array, "b l"], Bool[Array, "b l"]]
Denoise = Callable[[Latent, Time, Latent], Latent]
DenoiseLogits = Callable[[Latent, Time, Latent], tuple[Latent, Logits]]


class Params(NamedTuple):
    """table [v d] is EMB and the weight of the rounding head; bias [v] is its bias."""

    table: Table
    bias: Bias
    denoiser: PyTree


def init(
    key: PRNGKey, cfg: DenoiserConfig, vocab: int, *, normalize: bool = False
) -> Params:
    """Initialises as the published code: table N(0, 1), bias U(-1/sqrt d, 1/sqrt d)."""
    k_table, k_bias, k_denoiser = jax.random.split(key, 3)
    bound = cfg.dim**-0.5
    return Params(
        table=init_table(k_table, vocab, cfg.dim, normalize=normalize),
        bias=jax.random.uniform(k_bias, (vocab,), minval=-bound, maxval=bound),
        denoiser=transformer.init(k_denoiser, cfg, vocab),
    )


def count(params: PyTree) -> int:
    """Returns the number of parameters; the tied head's weight counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def apply(
    params: Params,
    cfg: DenoiserConfig,
    x_t: Latent,
    t: Time,
    x0_prev: Latent,
    *,
    schedule: Schedule | None = None,
    key: PRNGKey | None = None,
    head_fn: Callable[..., PyTree] = lambda raw, *args: raw,
    head_args: tuple[Array, ...] = (),
) -> PyTree:
    """Computes the raw output: x0, eps or mu [b l d], or logits [b l v].

    key: turns dropout on. head_fn(raw, *head_args), with arrays [b ...], is returned
    instead of raw; with a large vocabulary it runs on one example at a time, forward and
    backward, so that a batch's logits are never stored.
    """
    given = None
    if cfg.marks_known and jnp.ndim(t) == 2:  # one time per text, and marks
        given = jnp.where(t >= 0, 0, jnp.where(t > AT_OUTSIDE, 1, transformer.OUTSIDE))
        t = jnp.maximum(jnp.max(t, -1), 0.0)
    vocab, posterior_x0, t_cond = params.table.shape[0], None, t
    large = vocab > MAX_DENSE_VOCAB and cfg.predicts == "logits"
    if cfg.time_input == "log_snr":
        t_cond = log_snr_time(_require_schedule(schedule, cfg), t)

    def start(x_t: Latent, t: Time) -> Logits:
        return token_posterior_logits(
            params.table, x_t, t, _require_schedule(schedule, cfg)
        )

    if cfg.token_posterior_input:
        posterior_x0 = _by_example(
            lambda *x: expected_embedding(params.table, start(*x)),
            (x_t, t),
            large=large,
        )
    if cfg.known_source and given is not None:  # the best estimate of a known token
        known = (given > 0)[..., None]
        x0_prev = jnp.where(known, x_t, x0_prev)
        posterior_x0 = (
            None if posterior_x0 is None else jnp.where(known, x_t, posterior_x0)
        )
    y = transformer.apply(
        params.denoiser,
        cfg,
        vocab,
        x_t,
        t_cond,
        x0_prev,
        posterior_x0=posterior_x0,
        key=key,
        head=False,
        given=given,
    )

    def last(y: Array, x_t: Latent, t: Time, *head_args: Array) -> PyTree:
        raw = transformer.head(params.denoiser, y)
        if cfg.token_posterior_input and cfg.predicts == "logits":
            raw = raw + start(x_t, t)
        return head_fn(raw, *head_args)

    return _by_example(last, (y, x_t, t, *head_args), large=large)


def _by_example(f: Callable[..., PyTree], rows: tuple, *, large: bool) -> PyTree:
    """Computes f(*rows); if large, one example at a time, with remat."""
    if not large:
        return f(*rows)

    @jax.checkpoint
    def one(row: tuple) -> PyTree:
        return jax.tree.map(lambda y: y[0], f(*(x[None] for x in row)))

    return jax.lax.map(one, rows)


def insert_clean_tokens(
    clean: Latent,
    known: Bool[Array, "b l"],
    x_t: Latent,
    t: Time,
    outside: Bool[Array, "b l"] | None = None,
) -> tuple[Latent, Float[Array, "b l"]]:
    """Returns (x_t, times [b l]) with the known tokens clean and at time 0.

    outside: positions outside the text, for cfg.marks_known, which reads negative
    times as marks: AT_KNOWN and AT_OUTSIDE.
    """
    known, t = jnp.asarray(known), jnp.asarray(t)
    each = jnp.broadcast_to(t if t.ndim == 2 else t[:, None], known.shape)
    each = jnp.where(known, 0.0 if outside is None else AT_KNOWN, each)
    if outside is not None:
        each = jnp.where(outside, AT_OUTSIDE, each)
    return jnp.where(known[..., None], clean, x_t), each


def frame(ids: Ids) -> Bool[Array, "b l"]:
    """Returns where START, END and PAD are: what a given length makes known."""
    ids = jnp.asarray(ids)
    return (ids == START) | (ids == END) | (ids == PAD)


def source(ids: Ids) -> Bool[Array, "b l"]:
    """Returns where a pair's source is, from the first START to the second, included."""
    ids = jnp.asarray(ids)
    return (jnp.cumsum(ids == START, -1) < 2) | (ids == START)


def empty_source(ids: Ids) -> Ids:
    """Returns pairs whose source has PAD for each word: what is known without a source."""
    ids = jnp.asarray(ids)
    return jnp.where(source(ids) & (ids != START), PAD, ids)


def given_tokens(ids: Ids, cfg: DenoiserConfig) -> Masks | None:
    """Returns the masks of what a model is always given: known tokens, PAD outside.

    None if it is given nothing.
    """
    if cfg.known_length:
        return frame(ids), jnp.asarray(ids) == PAD
    if cfg.known_source:
        return source(ids), jnp.zeros(ids.shape, bool)
    return None


def log_snr_time(schedule: Schedule, t: Time) -> Time:
    """Maps log(1/SNR) from [-10, 14] to a time input in [0, 1]."""
    return jnp.clip((10.0 - schedule.log_snr(jnp.asarray(t))) / 24.0, 0.0, 1.0)


def token_posterior_logits(
    table: Table, x_t: Latent, t: Time, schedule: Schedule
) -> Logits:
    """Computes log q(x_t | w) up to a constant: -|x_t - alpha E_w|^2 / (2 sigma^2).

    Its softmax is p(w | x_t) of each position alone [b l v], for uniform p(w); the
    network adds what the context says. Source: the output prior of Plaid,
    arXiv:2305.18619; as an input, the softmax transform of arXiv:2205.14217 appendix F.
    """
    alpha, sigma = schedule.alpha_sigma(t)
    near = expand_to(alpha / sigma**2, x_t) * jnp.einsum(
        "bld,vd->blv", x_t, table, precision="highest"
    )
    return near - expand_to(0.5 * (alpha / sigma) ** 2, x_t) * jnp.sum(table**2, -1)


def _require_schedule(schedule: Schedule | None, cfg: DenoiserConfig) -> Schedule:
    if schedule is None:
        raise ValueError(
            f"a model with predicts={cfg.predicts!r}, token_posterior_input={cfg.token_posterior_input}, "
            f"time_input={cfg.time_input!r} needs schedule="
        )
    return schedule


def _from_eps(raw, x_t, t, table, schedule):
    alpha, sigma = schedule.alpha_sigma(t)
    return (x_t - expand_to(sigma, x_t) * raw) / expand_to(alpha, x_t)


def _from_mu(raw, x_t, t, table, schedule):
    """Inverts mu = coef_0 x0 + coef_t x_t for the step of one index."""
    t_next = t - 1.0 / require_num_steps(schedule)
    coef_0, coef_t, _ = posterior_coefficients(t, t_next, schedule)
    return (raw - expand_to(coef_t, x_t) * x_t) / expand_to(coef_0, x_t)


# x0_hat as a function of the raw output, by what the network predicts
TO_X0: dict[str, Callable[..., Latent]] = {
    "x0": lambda raw, x_t, t, table, schedule: raw,
    "eps": _from_eps,
    "mu": _from_mu,
    "logits": lambda raw, x_t, t, table, schedule: expected_embedding(table, raw),
}


def expected_embedding(table: Table, logits: Logits) -> Latent:
    """Computes softmax(logits) @ table, the posterior mean embedding [b l d]."""
    return jnp.einsum(
        "blv,vd->bld", jax.nn.softmax(logits, -1), table, precision="highest"
    )


def bind(
    params: Params,
    cfg: DenoiserConfig,
    *,
    schedule: Schedule | None = None,
    key: PRNGKey | None = None,
) -> Denoise:
    """Returns denoise(x_t [b l d], t [b] or [b l], x0_prev [b l d]) -> x0_hat [b l d].

    t in [0, 1]; in discrete time index / num_steps. schedule is needed unless the network
    predicts x0 from x_t and t alone. key: turns dropout on.
    """
    if cfg.predicts != "x0" or cfg.token_posterior_input or cfg.time_input == "log_snr":
        _require_schedule(schedule, cfg)
    params = _cast(params, cfg)

    def denoise(x_t: Latent, t: Time, x0_prev: Latent) -> Latent:
        t = jnp.asarray(t)

        def head_fn(raw: Array, x_t: Latent, t: Time) -> Latent:
            return TO_X0[cfg.predicts](raw, x_t, t, params.table, schedule)

        options = {
            "schedule": schedule,
            "key": key,
            "head_fn": head_fn,
            "head_args": (x_t, t),
        }
        return apply(params, cfg, x_t, t, x0_prev, **options)

    return denoise


def _cast(params: Params, cfg: DenoiserConfig) -> Params:
    return params._replace(denoiser=transformer.cast_kernels(params.denoiser, cfg))


def bind_logits(
    params: Params, cfg: DenoiserConfig, *, schedule: Schedule | None = None
) -> DenoiseLogits:
    """Returns a function (x_t, t, x0_prev) -> (x0_hat [b l d], log p(w | x_t) [b l v]).

    The log-probabilities, in nats, are the network's own if it predicts logits, else
    those of the rounding of x0_hat.
    """
    params = _cast(params, cfg)

    def denoise_logits(x_t: Latent, t: Time, x0_prev: Latent) -> tuple[Latent, Logits]:
        raw = apply(params, cfg, x_t, jnp.asarray(t), x0_prev, schedule=schedule)
        x0_hat = TO_X0[cfg.predicts](raw, x_t, t, params.table, schedule)
        if cfg.predicts != "logits":
            raw = rounding.logits(params.table, params.bias, x0_hat)
        return x0_hat, jax.nn.log_softmax(raw)

    return denoise_logits
