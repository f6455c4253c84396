# SPDX-License-Identifier: Apache-2.0
"""Everything random about a batch: times, noise, known tokens, truncation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dlm_jax.types import PAD, Array, Ids, Latent, PerExample, PRNGKey, Time


class NoiseDraws(NamedTuple):
    """Everything random about a batch, but dropout.

    t: times, index / steps; eps_0, eps_t: the noise of x_0 and of x_t; weight [b]:
    importance weights; self_cond [b]: 1 where the first estimate is fed back; known
    [b l]: tokens that the network is given, clean and at time 0, and is not asked.
    """

    t: Time
    eps_0: Latent
    eps_t: Latent
    weight: PerExample | None = None
    self_cond: PerExample | None = None
    known: Bool[Array, "b l"] | None = None


class LossMoments(NamedTuple):
    """The last losses of every time index, for importance sampling of t."""

    history: Float[Array, "steps 10"]
    filled: Int[Array, " steps"]


def _uniform(key, index, total):
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(index)


def _antithetic(key, index, total):
    u = _uniform(key, index // 2, total)
    return jnp.where(index % 2 == 0, u, 1 - u)


def _low_discrepancy(key, index, total):
    return (jax.random.uniform(key) + index / total) % 1.0


TIME_SAMPLERS: dict[str, Callable[..., PerExample]] = {
    "uniform": _uniform,
    "antithetic": _antithetic,
    "low_discrepancy": _low_discrepancy,
}


def draw_noise(
    key: PRNGKey,
    shape: tuple[int, int, int],
    *,
    first: int | Array = 0,
    total: int | None = None,
    time_sampler: str = "uniform",
    num_steps: int | None = None,
    self_cond_prob: float = 0.0,
    conditioning_prob: float = 0.0,
    moments: LossMoments | None = None,
) -> NoiseDraws:
    """Draws for rows first .. first + b - 1 of a global batch of `total` rows.

    Keyed by the row's global number, so that devices and processes do not matter.
    num_steps: T of a discretised schedule (times then fall on indices), None for a curve.
    self_cond_prob: the probability that this batch feeds its first estimate back.
    conditioning_prob: the probability that a row is given some of its tokens.
    """
    b, l, d = shape
    k_time, k_noise, k_self = jax.random.split(key, 3)
    index = first + jnp.arange(b)
    u = TIME_SAMPLERS[time_sampler](k_time, index, b if total is None else total)
    weight = None
    if moments is not None:
        t, weight = _importance(u, moments)
    else:
        t = u if num_steps is None else jnp.floor(u * num_steps) / num_steps

    def noise(i):
        return jax.random.normal(jax.random.fold_in(k_noise, i), (2, l, d))

    eps = jax.vmap(noise)(index)
    feed = jax.random.uniform(k_self) < self_cond_prob
    feed = jnp.full(b, feed, jnp.float32)
    known = None
    if conditioning_prob:
        known = _draw_known(jax.random.fold_in(key, 3), index, l, conditioning_prob)
    return NoiseDraws(t, eps[:, 0], eps[:, 1], weight, feed, known)


def _draw_known(key: PRNGKey, index: Array, length: int, prob: float) -> Array:
    """Tokens given [b l]: all but an interval, or each at a rate of its row's own.

    Half of the intervals reach the end: a prefix. Source: RECIPES T8, arXiv:2211.15089.
    """
    place = jnp.arange(length)

    def one(i: Array) -> Array:
        keys = jax.random.split(jax.random.fold_in(key, i), 3)
        u = jax.random.uniform(keys[0], (4,))
        first, size = u[1] * length, u[2] * length
        last = jnp.where(u[3] < 0.5, length, first + size)
        apart = (place < first) | (place >= last)
        rate, kind = jax.random.uniform(keys[1], (2,))
        scattered = jax.random.uniform(keys[2], (length,)) < rate
        return (u[0] < prob) & jnp.where(kind < 0.5, apart, scattered)

    return jax.vmap(one)(index)


def init_moments(steps: int) -> LossMoments:
    """An empty history: times stay uniform until every index has ten losses."""
    return LossMoments(jnp.zeros((steps, 10)), jnp.zeros(steps, jnp.int32))


def time_probabilities(moments: LossMoments) -> Float[Array, " steps"]:
    """p_t ~ sqrt(mean loss^2) with a uniform share of 0.001 (loss-second-moment)."""
    p = jnp.sqrt(jnp.mean(moments.history**2, -1))
    steps, total = p.shape[0], jnp.sum(p)
    warm = jnp.all(moments.filled == 10) & (total > 0)
    p = jnp.where(warm, p / jnp.where(total > 0, total, 1.0), 1.0 / steps)
    return 0.999 * p + 0.001 / steps


def _importance(u: PerExample, moments: LossMoments) -> tuple[PerExample, PerExample]:
    p = time_probabilities(moments)
    steps = p.shape[0]
    index = jnp.clip(jnp.searchsorted(jnp.cumsum(p), u, side="right"), 0, steps - 1)
    return index / steps, 1.0 / (steps * p[index])


def update_moments(
    moments: LossMoments, t: PerExample, loss: PerExample
) -> LossMoments:
    """Appends each loss to its index's history, dropping the oldest of ten."""

    def append(m, pair):
        i, value = pair
        row, n = m.history[i], m.filled[i]
        full = n == 10
        row = jnp.where(full, jnp.roll(row, -1), row).at[jnp.minimum(n, 9)].set(value)
        return LossMoments(
            m.history.at[i].set(row), m.filled.at[i].min(9).at[i].add(1)
        ), None

    index = jnp.round(t * moments.history.shape[0]).astype(jnp.int32)
    return jax.lax.scan(append, moments, (index, loss))[0]


def truncate(key: PRNGKey, ids: Ids, prob: float, *, first: int | Array = 0) -> Ids:
    """A share of the rows cut at a random length, PAD after it (arXiv:2305.18619).

    So a model also knows texts that end where training texts do not. Keyed like `draw`.
    """
    length = ids.shape[1]

    def one(i: Array, row: Array) -> Array:
        k_cut, k_size = jax.random.split(jax.random.fold_in(key, i))
        size = jax.random.randint(k_size, (), 1, length + 1)
        cut = jax.random.uniform(k_cut) < prob
        return jnp.where(cut & (jnp.arange(length) >= size), PAD, row)

    return jax.vmap(one)(first + jnp.arange(ids.shape[0]), jnp.asarray(ids))
