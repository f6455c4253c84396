# SPDX-License-Identifier: Apache-2.0
"""Distillation of a chain of DDIM steps into few, as a cross-entropy.

With eta = 0 and rho = (alpha / sigma)^(1 / temperature), DDIM (`samplers.flow`) is linear
in the estimates: a chain of steps from t to s ends where one step would with the estimate
sum_j w_j x_j, w_j = (rho_{j+1} - rho_j) / (rho_s - rho_t). The weights are not negative and
sum to 1, and each x_j is the mean embedding of a distribution p_j. So the student's target
is a distribution, sum_j w_j p_j.
This is progressive distillation, arXiv:2202.00512 (docs/method.md, section 10.3).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dlm_jax.diffusion import guidance, losses, model, samplers
from dlm_jax.diffusion.embedding import embed
from dlm_jax.diffusion.losses import LossTerms
from dlm_jax.diffusion.model import DenoiseLogits, Params
from dlm_jax.diffusion.schedule import Schedule, add_noise, expand_to
from dlm_jax.diffusion.time_sampling import NoiseDraws
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.types import Array, Ids, Latent, Logits, PerExample, Real, Table

Times = Float[Array, "n b"]  # of a chain, falling; negative: clean data


class _Chain(NamedTuple):
    probs: Logits
    x_s: Latent
    x0_hat: Latent


def chain_weights(
    schedule: Schedule, times: Times, gain: Real = 0.0
) -> Float[Array, "m b"]:
    """Returns the share of each estimate in a chain of DDIM steps through n times.

    m = n - 1. gain: 1 / temperature - 1. A chain that ends on clean data (a last time below 0) ends on its last
    estimate.
    """
    alpha, sigma = schedule.alpha_sigma(jnp.maximum(times, 0.0))
    rho = (alpha / sigma) ** (1 + gain)
    weights = jnp.diff(rho, axis=0) / (rho[-1] - rho[0])
    last = jnp.zeros_like(weights).at[-1].set(1.0)
    return jnp.where(times[-1] < 0, last, weights)


def chain_target(
    denoise: DenoiseLogits,
    schedule: Schedule,
    x_t: Latent,
    times: Times,
    x0_prev: Latent,
    *,
    gain: Real = 0.0,
) -> Logits:
    """Runs `samplers.flow` through the times; returns sum_j w_j p_j [b l v].

    denoise(x_t, t, x0_prev) -> (x0_hat, log p [b l v]).
    """
    weights = chain_weights(schedule, times, gain)

    def step(chain: _Chain, inputs: tuple) -> tuple[_Chain, None]:
        now, after, weight = inputs
        x0_hat, log_p = denoise(chain.x_s, now, chain.x0_hat)
        kept, added = samplers.flow_coefficients(schedule, now, after, gain)
        x_s = expand_to(kept, x0_hat) * chain.x_s + expand_to(added, x0_hat) * x0_hat
        probs = chain.probs + expand_to(weight, log_p) * jnp.exp(log_p)
        return _Chain(probs, x_s, x0_hat), None

    _, like = jax.eval_shape(denoise, x_t, times[0], x0_prev)
    start = _Chain(jnp.zeros(like.shape, like.dtype), x_t, x0_prev)
    return jax.lax.scan(step, start, (times[:-1], times[1:], weights))[0].probs


def step_times(t: PerExample, num_steps: int, parts: int) -> Times:
    """Returns the times [parts + 1, b] of a chain over one of num_steps equal steps.

    t in [0, 1) chooses the step, which falls from (k + 1) / num_steps to k / num_steps;
    the last one ends on clean data, -1, as in `samplers.schedule_timesteps`.
    """
    k = jnp.floor(t * num_steps)
    part = jnp.arange(parts + 1)[:, None] / parts
    times = (k + 1 - part) / num_steps
    return jnp.where((k == 0) & (part == 1), -1.0, times)


def loss(
    params: Params,
    ids: Ids,
    draws: NoiseDraws,
    *,
    teacher: Params,
    cfg: DenoiserConfig,
    schedule: Schedule,
    num_steps: int,
    parts: int,
    mask_pad: bool = False,
    cfg_weight: float = 1.0,
    gain: float = 0.0,
) -> LossTerms:
    """Returns the cross-entropy of the student's step and the teacher's chain.

    In nats per position. num_steps: of the student, each as long as `parts` steps of the
    teacher, which has the student's table, network and schedule. The first estimate of
    each network is its input where draws.self_cond is 1, else 0. cfg_weight: of the
    teacher of pairs, whose student then needs no guidance (arXiv:2210.03142). gain: of
    the chain, 1 / temperature - 1.
    """
    times = step_times(draws.t, num_steps, parts)
    t, clean = times[0], embed(params.table, ids)
    known, outside = losses.known_tokens(ids, draws, cfg)
    x_t = add_noise(clean, t, jnp.asarray(draws.eps_t), schedule)

    def bind(weights: Params, ids: Ids = ids) -> DenoiseLogits:
        denoise = model.bind_logits(weights, cfg, schedule=schedule)
        if known is None:
            return denoise
        return guidance.condition_on_tokens(
            denoise, params.table, ids, known, outside=outside
        )

    teach, student = bind(teacher), bind(params)
    if cfg_weight != 1:
        free = bind(teacher, model.empty_source(ids))
        teach = _guided(teach, free, params.table, cfg_weight)
    first = _first(teach, x_t, t, draws)
    target = chain_target(teach, schedule, x_t, times, first, gain=gain)
    _, log_p = student(x_t, t, _first(student, x_t, t, draws))
    mask, count = losses.scored_positions(ids, known, cfg, mask_pad)
    each = -jnp.sum(jax.lax.stop_gradient(target) * log_p, -1)
    error = jnp.sum(each * mask, -1) / jnp.maximum(count, 1)
    zero = jnp.zeros_like(error)
    return LossTerms(error, zero, zero, zero, jnp.ones_like(error))


def _guided(
    conditional: DenoiseLogits, free: DenoiseLogits, table: Table, weight: Real
) -> DenoiseLogits:
    """Mixes the probabilities as guidance mixes the estimates; none is below 0."""

    def guided(x_t: Latent, t: Any, x0_prev: Latent) -> tuple[Latent, Logits]:
        p, q = (jnp.exp(d(x_t, t, x0_prev)[1]) for d in (conditional, free))
        mixed = jnp.maximum(q + weight * (p - q), 0.0)
        mixed = mixed / jnp.sum(mixed, -1, keepdims=True)
        mean = jnp.einsum("blv,vd->bld", mixed, table, precision="highest")
        return mean, jnp.log(mixed)

    return guided


def _first(denoise: DenoiseLogits, x_t: Latent, t: Any, draws: NoiseDraws) -> Latent:
    zeros = jnp.zeros_like(x_t)
    if draws.self_cond is None:
        return zeros
    feed = jnp.asarray(draws.self_cond)
    estimate = jax.lax.cond(
        jnp.any(feed > 0), lambda: denoise(x_t, t, zeros)[0], lambda: zeros
    )
    return jax.lax.stop_gradient(estimate * expand_to(feed, x_t))
