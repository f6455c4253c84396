# SPDX-License-Identifier: Apache-2.0
"""The variational bound on -log p(w), in nats.

It bounds ancestral sampling with the variance of q(x_next | x_t, w), without the clamp
and, unlike `samplers`, with two calls per step if the network is self-conditioned.
Other samplers of the same weights define other distributions.

Given the words, every latent is Gaussian: with x_0 = EMB(w) + sigma_0 n, x_t has mean
alpha EMB(w) and variance 1 - alpha^2 + alpha^2 sigma_0^2. The bound depends on its
signal-to-noise ratio SNR(t) (arXiv:2107.00630, eqs. 11 to 15):

    -log p(w) <= KL(q(x_T | w) || N(0, 1))                                      prior
               + 1/2 sum_i (SNR_{i-1} - SNR_i) E|EMB(w) - e_hat(x_i)|^2     diffusion
               + E[-log p(w | the least noisy latent)]                       rounding

For a continuous schedule the sum is an integral over t. Nothing is left out at either
end, so bounds of different schedules and parametrisations can be compared.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dlm_jax.diffusion import model, rounding
from dlm_jax.diffusion.embedding import embed
from dlm_jax.diffusion.model import Params
from dlm_jax.diffusion.schedule import Schedule, expand_to
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.types import (
    Array,
    Ids,
    Latent,
    Logits,
    PerExample,
    PRNGKey,
    Table,
    Time,
)


class Bound(NamedTuple):
    """The named terms of each example [b], nats."""

    prior: PerExample
    diffusion: PerExample
    rounding: PerExample
    length: PerExample  # -log p(length): `bound` leaves 0, `scoring.make_nll` sets it

    def total(self) -> PerExample:
        """The bound on -log p(w) of each example [b], nats."""
        return self.prior + self.diffusion + self.rounding + self.length


class TokenBound(NamedTuple):
    """The share of each token [b l] in the terms of `Bound`, nats; none in `length`."""

    prior: Float[Array, "b l"]
    diffusion: Float[Array, "b l"]
    rounding: Float[Array, "b l"]

    def total(self) -> Float[Array, "b l"]:
        """The share of each token in the bound [b l], nats."""
        return self.prior + self.diffusion + self.rounding

    def bound(self) -> Bound:
        """The terms of each example [b]."""
        prior, diffusion, word = (jnp.sum(term, -1) for term in self)
        return Bound(prior, diffusion, word, jnp.zeros_like(word))


class Profile(NamedTuple):
    """Draws of the diffusion term [k b], without the step to x_0: times and nats."""

    t: Array
    nats: Array


def profile_stderr(profile: Profile) -> PerExample:
    """Computes the standard error [b] of the mean over the draws; nan with one draw.

    That the times are stratified is not used: the error is dominated by the noise.
    """
    draws = len(profile.nats)
    return jnp.std(profile.nats, 0, ddof=1) / draws**0.5


class LatentPredictor(NamedTuple):
    """What the bound needs from a model.

    estimate(x_t [b l d], t) -> e_hat [b l d], the estimate of EMB(w). decode(x, t) ->
    logits [b l v] of the least noisy latent: x_0 if sigma_0 > 0, else x at t = 0. t is
    [b], or with given tokens [b l] with the marks of `model.insert_clean_tokens`.
    """

    estimate: Callable[[Latent, Time], Latent]
    decode: Callable[[Latent, Time], Logits]
    sigma_0: float


def latent_predictor(
    params: Params, cfg: DenoiserConfig, schedule: Schedule, *, sigma_0: float
) -> LatentPredictor:
    """Returns the predictor of a trained network; sigma_0 as in its training.

    A self-conditioned network is evaluated twice at each x_t, so that a reverse step
    depends on x_t alone. A network trained on noisy x_0 estimates x_0; subtracting
    that noise's mean given x_t gives e_hat and leaves the reverse mean unchanged.
    """
    denoise = model.bind(params, cfg, schedule=schedule)

    def feedback(x_t: Latent, t: Time) -> Latent:
        zeros = jnp.zeros_like(x_t)
        return denoise(x_t, t, zeros) if cfg.self_cond else zeros

    def estimate(x_t: Latent, t: Time) -> Latent:
        x0_hat = denoise(x_t, t, feedback(x_t, t))
        if not sigma_0:
            return x0_hat
        alpha, sigma = schedule.alpha_sigma(t)
        noisy = (alpha * sigma_0) ** 2
        kappa = noisy / (noisy + sigma**2)
        if schedule.num_steps is not None:  # at index 0 the losses compare with EMB(w)
            kappa = jnp.where(t * schedule.num_steps < 0.5, 0.0, kappa)
        x0_hat = x0_hat - expand_to(kappa / alpha, x_t) * x_t
        return x0_hat / expand_to(1 - kappa, x_t)

    def decode(x: Latent, t: Time) -> Logits:
        if sigma_0:
            return rounding.logits(params.table, params.bias, x)
        if cfg.predicts != "logits":  # each position's own posterior
            return model.token_posterior_logits(params.table, x, t, schedule)
        return model.apply(params, cfg, x, t, feedback(x, t), schedule=schedule)

    return LatentPredictor(estimate, decode, sigma_0)


def _draw(schedule: Schedule, u: Time, sigma_0: float) -> tuple[Time, Time]:
    """Returns (t, weight) for uniform u, with mean weighted error = sum over all steps.

    For a continuous schedule t = u and the weight is -dSNR/dt. For a discretised one,
    half of the draws are uniform over the indices from 1, and half in proportion to
    SNR_{i-1} - SNR_i, because the SNR falls by half within a few published indices.
    """
    steps = schedule.num_steps
    if steps is None:
        slope = jax.jvp(lambda t: schedule.snr(t, sigma_0), (u,), (jnp.ones_like(u),))
        return u, -slope[1]
    drop = -np.diff(schedule.snr(np.arange(steps) / steps, sigma_0))
    p = 0.5 / len(drop) + 0.5 * drop / drop.sum()
    index = jnp.searchsorted(jnp.asarray(np.cumsum(p), jnp.float32), u)
    index = jnp.minimum(index, len(drop) - 1)
    return (index + 1) / steps, jnp.asarray(drop / p, jnp.float32)[index]


def _noisy(x: Latent, t: Time, eps: Latent, schedule: Schedule, sigma_0: float):
    """Samples x_t given EMB(w) = x, with noise eps."""
    alpha, sigma = schedule.alpha_sigma(t)
    std = jnp.sqrt(sigma**2 + (alpha * sigma_0) ** 2)
    return expand_to(alpha, x) * x + expand_to(std, x) * eps


def _prior(x: Latent, schedule: Schedule, sigma_0: float) -> Float[Array, "b l"]:
    """Computes KL(q(x_T | w) || N(0, 1)) of each token, nats."""
    steps = schedule.num_steps
    last = np.asarray(1.0 if steps is None else (steps - 1) / steps)
    alpha, _ = schedule.alpha_sigma(last)
    off = alpha**2 * (sigma_0**2 - 1)  # the variance less 1
    kl = alpha**2 * x**2 + (off - np.log1p(off))
    return 0.5 * jnp.sum(kl, -1)


def inserter(
    x: Latent, given: model.Masks | None
) -> Callable[[Latent, Time], tuple[Latent, Time]]:
    """Returns a function (x_t, t) -> (x_t, t) that makes the given tokens of x clean."""
    if given is None:
        return lambda x_t, t: (x_t, t)
    return lambda x_t, t: model.insert_clean_tokens(x, given[0], x_t, t, given[1])


def bound(
    key: PRNGKey,
    ids: Ids,
    table: Table,
    predict: LatentPredictor,
    schedule: Schedule,
    *,
    draws: int = 8,
    given: model.Masks | None = None,
) -> tuple[Bound, Profile]:
    """Estimates each example's bound without bias, from `draws` noise levels.

    The times of an example are stratified: (u + k / draws) mod 1. given: the masks of
    `model.given_tokens`; the bound is that of the other tokens given these.
    """
    options = {"draws": draws, "given": given}
    terms, profile = bound_by_token(key, ids, table, predict, schedule, **options)
    return terms.bound(), profile


def bound_by_token(
    key: PRNGKey,
    ids: Ids,
    table: Table,
    predict: LatentPredictor,
    schedule: Schedule,
    *,
    draws: int = 8,
    given: model.Masks | None = None,
) -> tuple[TokenBound, Profile]:
    """Estimates the share of each token in the terms of `bound`, [b l], nats."""
    x, sigma_0 = embed(table, ids), predict.sigma_0
    unknown = jnp.ones(ids.shape) if given is None else 1.0 - given[0]
    with_given = inserter(x, given)

    k_time, k_noise, k_first, k_last = jax.random.split(key, 4)
    u = jax.random.uniform(k_time, ids.shape[:1])

    def error(key: PRNGKey, t: Time) -> Float[Array, "b l"]:
        eps = jax.random.normal(key, x.shape)
        x_t = _noisy(x, t, eps, schedule, sigma_0)
        e_hat = predict.estimate(*with_given(x_t, t))
        return 0.5 * jnp.sum((x - e_hat) ** 2, -1) * unknown

    def at(mean: Array, k: Array) -> tuple[Array, Profile]:
        t, weight = _draw(schedule, (u + k / draws) % 1.0, sigma_0)
        nats = weight[:, None] * error(jax.random.fold_in(k_noise, k), t)
        return mean + nats / draws, Profile(t, jnp.sum(nats, -1))

    start = jnp.zeros(ids.shape, x.dtype)
    diffusion, profile = jax.lax.scan(at, start, jnp.arange(draws))
    zero = jnp.zeros(ids.shape[:1])
    if sigma_0:  # from t = 0 to x_0 itself, a step of its own
        gap = 1 / sigma_0**2 - schedule.snr(np.zeros(()), sigma_0)
        diffusion += gap * error(k_first, zero)
    eps = jax.random.normal(k_last, x.shape)
    last = _noisy(x, zero - 1.0 if sigma_0 else zero, eps, schedule, sigma_0)
    word = rounding.nll(predict.decode(*with_given(last, zero)), ids) * unknown
    prior = _prior(x, schedule, sigma_0) * unknown
    return TokenBound(prior, diffusion, word), profile


class MeanStderr(NamedTuple):
    """A mean over examples and its standard error."""

    mean: float
    stderr: float


def ratio_with_stderr(nats: Array, count: Array) -> MeanStderr:
    """Computes sum(nats) / sum(count) over examples [n], and its standard error."""
    a, b = (np.asarray(x, np.float64) for x in (nats, count))
    ratio = a.sum() / b.sum()
    spread = np.std(a - ratio * b, ddof=1) / np.sqrt(len(a))
    return MeanStderr(float(ratio), float(spread / b.mean()))
