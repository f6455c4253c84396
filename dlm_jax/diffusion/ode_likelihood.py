# SPDX-License-Identifier: Apache-2.0
"""The likelihood of texts under the probability-flow ODE, in nats.

It is that of the deterministic sampler: x_T from N(0, 1), the ODE down to the least
noise, then p(w | x). In y = x / sigma and rho = alpha / sigma a noisy text is
y = rho EMB(w) + eps, and the ODE is dy / drho = e_hat (arXiv:2011.13456, eq. 13).
With the change of density along it (eq. 39) and any x of q(x | w) at the least noise,

    -log p(w) <= E[log q(x | w) - log p(x) - log p(w | x)]
     = E[1/2 |x_T|^2 - 1/2 |eps|^2 - n log sigma_T]                               prior
     + E[integral of tr(d e_hat / dy) over rho]                               diffusion
     + E[-log p(w | x)]                                                        rounding

The trace is v^T (d e_hat / dy) v for random signs v, others at each step (Hutchinson).
Neither the draws of x nor those of v bias the sum; the steps of the solver do.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.diffusion import likelihood, model, rounding
from dlm_jax.diffusion.embedding import embed
from dlm_jax.diffusion.likelihood import Bound, LatentPredictor
from dlm_jax.diffusion.schedule import Schedule
from dlm_jax.errors import UserError
from dlm_jax.types import Array, Ids, Latent, PerExample, PRNGKey, Table


def grid(schedule: Schedule, num_steps: int) -> np.ndarray:
    """Returns times from the least noise to the most, for num_steps steps or fewer.

    Half of them are spread evenly over t, half over log(1/SNR). In discrete time they
    are those of indices.
    """
    steps = schedule.num_steps
    t = np.arange(steps) / steps if steps else np.linspace(0.0, 1.0, 4097)
    u = -np.asarray(schedule.log_snr(t))
    place = t / t[-1] + (u - u[0]) / (u[-1] - u[0])
    chosen = np.interp(np.linspace(0.0, 2.0, num_steps + 1), place, t)
    return np.unique(np.round(chosen * steps) / steps if steps else chosen)


def _value_and_trace(
    f: Callable[[Latent], Latent], y: Latent, v: Latent
) -> tuple[Latent, PerExample]:
    """Returns f(y), and v^T (df / dy) v of each example."""
    value, pull = jax.vjp(f, y)
    return value, jnp.sum(v * pull(v)[0], (-2, -1))


def bound(
    key: PRNGKey,
    ids: Ids,
    table: Table,
    predict: LatentPredictor,
    schedule: Schedule,
    *,
    draws: int = 8,
    num_steps: int = 32,
    given: model.Masks | None = None,
) -> tuple[Bound, PerExample]:
    """Estimates each example's bound, and the standard error [b] over the draws.

    A draw is of x and of all v, and takes 2 num_steps derivatives of the network (Heun).
    given: as in `likelihood.bound`. Raises UserError for a network trained on noisy x_0.
    """
    if predict.sigma_0:
        raise UserError(
            "estimator='ode' needs a model whose x_0 has no noise (config.loss.objective "
            "ce or nelbo): take estimator='variational'"
        )
    times = grid(schedule, num_steps)
    alpha, sigma = schedule.alpha_sigma(times)
    e, rho = embed(table, ids), alpha / sigma
    unknown = jnp.ones(ids.shape) if given is None else 1.0 - given[0]
    insert = likelihood.inserter(e, given)

    def draw(k: Array) -> Bound:
        k_eps, k_v = jax.random.split(jax.random.fold_in(key, k))
        eps = jax.random.normal(k_eps, e.shape) * unknown[..., None]

        def step(carry: tuple, ends: tuple) -> tuple:
            (y, volume), (key, t, sigma, rho) = carry, ends
            v = jax.random.rademacher(key, e.shape, e.dtype) * unknown[..., None]
            more = rho[1] - rho[0]

            def end(slope: Latent, at: tuple) -> tuple:
                t, sigma = at

                def e_hat(y: Latent) -> Latent:
                    return predict.estimate(*insert(sigma * y, jnp.full(len(y), t)))

                found = _value_and_trace(e_hat, y + slope, v)
                return more * found[0], found

            _, (slopes, traces) = jax.lax.scan(end, jnp.zeros_like(y), (t, sigma))
            y = y + more * jnp.mean(slopes, 0)
            # the trapezoid in log rho, as rho itself falls by orders of magnitude
            mean = 0.5 * (rho @ traces)
            return (y, volume + mean * jnp.log(rho[0] / rho[1])), None

        start = (rho[0] * e + eps, jnp.zeros(len(e)))
        ends = (jnp.asarray(np.stack([x[:-1], x[1:]], 1), jnp.float32) for x in columns)
        keys = jax.random.split(k_v, len(times) - 1)
        (y, volume), _ = jax.lax.scan(step, start, (keys, *ends))
        least = insert(sigma[0] * start[0], jnp.zeros(len(e)))
        word = jnp.sum(rounding.nll(predict.decode(*least), ids) * unknown, -1)
        change = (sigma[-1] * y) ** 2 - eps**2 - 2.0 * np.log(sigma[-1])
        prior = 0.5 * jnp.sum(change * unknown[..., None], (-2, -1))
        return Bound(prior, volume, word, jnp.zeros_like(word))

    columns = (times, sigma, rho)
    terms = jax.lax.map(draw, jnp.arange(draws))
    stderr = jnp.std(sum(terms), 0, ddof=1) / draws**0.5
    return jax.tree.map(lambda x: jnp.mean(x, 0), terms), stderr
