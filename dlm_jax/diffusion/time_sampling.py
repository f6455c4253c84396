# SPDX-License-Identifier: Apache-2.0
"""The random inputs of a training step: times, noise, known tokens, what is cut."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from dlm_jax.diffusion import model
from dlm_jax.types import PAD, Array, Ids, Latent, PerExample, PRNGKey, Time


class NoiseDraws(NamedTuple):
    """The random inputs of a batch, except dropout.

    t: times; eps_0, eps_t: the noise of x_0 and of x_t; weight [b]: importance weights;
    self_cond [b]: 1 where the first estimate is an input; known [b l]: tokens that the
    network receives clean and at time 0, and that are not scored.
    """

    t: Time
    eps_0: Latent
    eps_t: Latent
    weight: PerExample | None = None
    self_cond: PerExample | None = None
    known: Bool[Array, "b l"] | None = None


class LossMoments(NamedTuple):
    """The last ten losses of every time index, for importance sampling of t."""

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
    """Draws the inputs of rows first .. first + b - 1 of a global batch of `total` rows.

    A row's values depend on its global number, not on devices and processes.
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
    """Draws the mask of known tokens [b l].

    A row knows either all tokens outside an interval, which half of the time reaches the
    end, or each token at a random rate. Source: arXiv:2211.15089.
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
    """Returns an empty history; times stay uniform until every index has ten losses."""
    return LossMoments(jnp.zeros((steps, 10)), jnp.zeros(steps, jnp.int32))


def time_probabilities(moments: LossMoments) -> Float[Array, " steps"]:
    """Returns p_t ~ sqrt(mean loss^2), mixed with 0.001 of the uniform distribution.

    The loss-second-moment sampler of arXiv:2102.09672.
    """
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
    """Appends each loss to the history of its index, dropping the oldest of ten."""

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
    """Truncates rows at a random length with this probability (arXiv:2305.18619).

    The rest becomes PAD, so that a model also learns unfinished texts. Rows are keyed as
    in `draw_noise`.
    """
    length = ids.shape[1]

    def one(i: Array, row: Array) -> Array:
        k_cut, k_size = jax.random.split(jax.random.fold_in(key, i))
        size = jax.random.randint(k_size, (), 1, length + 1)
        cut = jax.random.uniform(k_cut) < prob
        return jnp.where(cut & (jnp.arange(length) >= size), PAD, row)

    return jax.vmap(one)(first + jnp.arange(ids.shape[0]), jnp.asarray(ids))


def drop_sources(key: PRNGKey, ids: Ids, prob: float, *, first: int | Array = 0) -> Ids:
    """Empties the sources of pairs with this probability, for classifier-free guidance.

    Rows are keyed as in `draw_noise`.
    """
    u = _uniform(key, first + jnp.arange(ids.shape[0]), None)
    return jnp.where((u < prob)[:, None], model.empty_source(ids), ids)
