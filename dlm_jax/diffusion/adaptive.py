# SPDX-License-Identifier: Apache-2.0
"""Adaptive schedules: each unit of t removes the same amount of information.

While a model trains, its loss is tracked as a function of the noise u = log(1 / SNR) in
nats. Where the loss rises fast with u, words are being decided, and both training and
the sampler's grid spend more time there. Sources: time warping of CDCD, arXiv:2211.15089
section 3.4; the Gumbel form of LangFlow, arXiv:2604.11748.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dlm_jax.diffusion.schedule import Schedule, from_quantiles, gumbel
from dlm_jax.types import Array, PerExample

BINS, LOW, HIGH = 64, -9.0, 13.0  # of u
MIN_COUNT = 0.5  # decayed count of examples below which a bin is interpolated
FLOOR = 0.1  # fraction of times that keep the initial schedule's distribution
EVEN = 3e-4  # added to each bin, so that the bound samples every one


class AdaptiveState(NamedTuple):
    """Statistics of the loss by bin of u, with exponential decay.

    loss: sums of losses; counts: numbers of examples; start: the probability of each bin
    under the initial schedule.
    """

    loss: Float[Array, " bins"]
    counts: Float[Array, " bins"]
    start: Float[Array, " bins"]


def edges() -> Float[Array, " edges"]:
    """Returns the edges of the bins of u."""
    return jnp.linspace(LOW, HIGH, BINS + 1)


def init(schedule: Schedule) -> AdaptiveState:
    """Returns empty statistics; the initial schedule is taken as information-uniform."""
    t = (jnp.arange(4096) + 0.5) / 4096
    start = _count(-schedule.log_snr(t), jnp.ones_like(t)) / 4096
    return AdaptiveState(jnp.zeros(BINS), jnp.zeros(BINS), start)


def _count(u: PerExample, value: PerExample) -> Float[Array, " bins"]:
    width = (HIGH - LOW) / BINS
    index = jnp.clip(jnp.floor((u - LOW) / width), 0, BINS - 1).astype(int)
    return jnp.zeros(BINS).at[index].add(value)


def update(
    state: AdaptiveState, u: PerExample, loss: PerExample, *, rate: float = 0.995
) -> AdaptiveState:
    """Adds the losses [b] of examples at noise u [b]; rate: decay of the old ones."""
    return state._replace(
        loss=rate * state.loss + _count(u, loss),
        counts=rate * state.counts + _count(u, jnp.ones_like(u)),
    )


def curve(state: AdaptiveState) -> Float[Array, " bins"]:
    """Returns the mean loss by bin, made non-decreasing.

    A bin with too few examples is interpolated; if all have too few, the loss is the
    initial schedule's distribution function.
    """
    counts, start = jnp.asarray(state.counts), jnp.asarray(state.start)
    mean = state.loss / jnp.maximum(counts, 1e-6)
    level = jnp.max(jnp.where(counts > MIN_COUNT, mean, 0.0))
    up = jax.lax.cummax(jnp.where(counts > MIN_COUNT, mean, 0.0))
    down = jax.lax.cummin(jnp.where(counts > MIN_COUNT, mean, level), reverse=True)
    return jnp.where(level > 0, 0.5 * (up + down), jnp.cumsum(start) - 0.5 * start)


def warp(state: AdaptiveState) -> Schedule:
    """Returns the schedule whose time density follows the rise of the loss."""
    loss = curve(state)
    border = jnp.concatenate([loss[:1], 0.5 * (loss[1:] + loss[:-1]), loss[-1:]])
    rise = jnp.diff(border)
    p = (1 - FLOOR) * rise / jnp.maximum(jnp.sum(rise), 1e-9) + FLOOR * state.start
    p = p + EVEN
    cdf = jnp.concatenate([jnp.zeros(1), jnp.cumsum(p)])
    return from_quantiles(cdf / cdf[-1], edges())


def fit_gumbel(state: AdaptiveState) -> Schedule:
    """Returns the Gumbel schedule whose distribution function is closest to the loss.

    By linear regression: loss = H exp(-exp(-(u - mean) / scale)) means u = mean - scale
    log(-log(loss/H)).
    """
    loss = curve(state)
    share = jnp.clip(loss / jnp.maximum(loss[-1], 1e-9), 1e-4, 1 - 1e-4)
    y = -jnp.log(-jnp.log(share))
    u = 0.5 * (edges()[1:] + edges()[:-1])
    weight = share * (1 - share)
    weight = weight / jnp.sum(weight)
    mean_y, mean_u = jnp.sum(weight * y), jnp.sum(weight * u)
    spread = jnp.sum(weight * (y - mean_y) ** 2)
    scale = jnp.sum(weight * (y - mean_y) * (u - mean_u)) / jnp.maximum(spread, 1e-6)
    scale = jnp.clip(scale, 0.1, 5.0)
    return gumbel(jnp.clip(mean_u - scale * mean_y, LOW, HIGH), scale)


ADAPTIVE_SCHEDULES: dict[str, Callable[[AdaptiveState], Schedule]] = {
    "warp": warp,
    "gumbel": fit_gumbel,
}
