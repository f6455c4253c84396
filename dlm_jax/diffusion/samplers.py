# SPDX-License-Identifier: Apache-2.0
"""Samplers: a solver turns a Denoise into a Step, which one `lax.scan` runs over times.

Times fall from noise (t near 1) to data; t < 0 stands for clean data. All solvers use
x0_hat. Formulas: docs/method.md, section 5.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dlm_jax.diffusion.model import Denoise
from dlm_jax.diffusion.schedule import (
    VARIANCES,
    Schedule,
    broadcast_to,
    expand_to,
    posterior,
)
from dlm_jax.errors import choose
from dlm_jax.ranges import real
from dlm_jax.types import Array, Latent, PRNGKey, PRNGKeys, PyTree, Real


class State(NamedTuple):
    """x_t: the sample; x0_hat: the last estimate, for self-conditioning and multistep."""

    x_t: Latent
    x0_hat: Latent


class Times(NamedTuple):
    """The previous, current and next time, each [n]; scalars inside the scan."""

    prev: Any
    now: Any
    next: Any


Step = Callable[[PRNGKeys, State, Times], State]


def timesteps(
    num_steps: int, *, start: float | None = None, stop: float = 0.0
) -> Times:
    """Returns n evenly spaced times (n-1)/n, ..., 1/n, 0; the last step yields x0_hat.

    On a schedule with T = 2000, timesteps(200) is the published "ddim200". start, stop:
    the first and the last time, for a continuous schedule or a part of the range.
    """
    first = (num_steps - 1) / num_steps if start is None else start
    now = np.linspace(first, stop, num_steps)
    return _times(now)


def schedule_timesteps(schedule: Schedule, num_steps: int) -> Times:
    """Returns n times: (n-1)/n to 0 if discretised, else 1 to 1/n."""
    if schedule.num_steps is not None:
        return timesteps(num_steps)
    return timesteps(num_steps, start=1.0, stop=1.0 / num_steps)


def _times(now: np.ndarray) -> Times:
    """Adds the neighbours of each time; clean data, t = -1, follows the last."""
    return Times(np.append(now[:1], now[:-1]), now, np.append(now[1:], -1.0))


def per_example_keys(key: PRNGKey | PRNGKeys, count: int) -> PRNGKeys:
    """Returns one key per example, fold_in(key, i), independent of the batch size."""
    if key.ndim == 1:
        return key
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


def step_keys(keys: PRNGKeys, number: Any) -> PRNGKeys:
    """Returns the keys [b] of a step, by its number, from the keys of the examples."""
    return jax.vmap(lambda k: jax.random.fold_in(k, number))(keys)


def standard_normal(keys: PRNGKeys, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Draws standard normal noise [b *shape], with a key per example."""
    return jax.vmap(lambda k: jax.random.normal(k, shape))(keys)


def truncated_normal(
    keys: PRNGKeys, shape: tuple[int, ...], bound: Real
) -> Float[Array, "b ..."]:
    """Draws normal noise conditioned on |n| <= bound, the published `top_p`."""
    return jax.vmap(lambda k: jax.random.truncated_normal(k, -bound, bound, shape))(
        keys
    )


# --- solvers: Denoise -> Step


def _predict(denoise: Denoise, state: State, now: Any) -> Latent:
    t = jnp.broadcast_to(now, state.x_t.shape[:1])
    return denoise(state.x_t, t, state.x0_hat)


def is_off(number: Any) -> bool:
    """Returns whether a number is 0; one that is traced never is."""
    return not isinstance(number, jax.Array) and number == 0


def _check(name: str, number: Real) -> None:
    """Raises UserError unless it is from 0 to 1; one that is traced is not read."""
    if not isinstance(number, jax.Array):
        real(name, number, 0, 1)


def ancestral(
    denoise: Denoise,
    schedule: Schedule,
    *,
    sigma: str = "small",
    top_p: Real = 0.0,
) -> Step:
    """Returns DDPM's step: x_next ~ q(x_next | x_t, x0_hat).

    sigma: variance of the step, "small" (the posterior's) or "large" (beta). top_p, from 0
    (off) to 1, bounds |noise| (not nucleus sampling). Source: arXiv:2006.11239.
    """
    choose("sigma", VARIANCES, sigma)
    _check("top_p", top_p)

    def step(keys: PRNGKeys, state: State, times: Times) -> State:
        x0_hat = _predict(denoise, state, times.now)
        mean, std = posterior(
            x0_hat, state.x_t, times.now, schedule, t_next=times.next, sigma=sigma
        )
        shape = state.x_t.shape[1:]
        n = (
            standard_normal(keys, shape)
            if is_off(top_p)
            else truncated_normal(keys, shape, top_p)
        )
        return State(mean + expand_to(std, n) * n, x0_hat)

    return step


def marginal(denoise: Denoise, schedule: Schedule) -> Step:
    """Returns the step x_next = alpha_next x0_hat + sigma_next n, with fresh noise n.

    Source: arXiv:2205.14217 section 4.2; the published code uses `ancestral`.
    """

    def step(keys: PRNGKeys, state: State, times: Times) -> State:
        x0_hat = _predict(denoise, state, times.now)
        alpha, sigma = schedule.alpha_sigma(times.next)
        n = standard_normal(keys, x0_hat.shape[1:])
        return State(
            broadcast_to(alpha, n) * x0_hat + broadcast_to(sigma, n) * n, x0_hat
        )

    return step


def ddim(denoise: Denoise, schedule: Schedule, *, eta: Real = 0.0) -> Step:
    """Returns DDIM's step, arXiv:2010.02502 eq. 12; eta = 1 is `ancestral`."""
    _check("eta", eta)

    def step(keys: PRNGKeys, state: State, times: Times) -> State:
        x_t, x0_hat = state.x_t, _predict(denoise, state, times.now)
        alpha, sigma = schedule.alpha_sigma(times.now)
        alpha_next, sigma_next = schedule.alpha_sigma(times.next)
        eps_hat = (x_t - broadcast_to(alpha, x_t) * x0_hat) / broadcast_to(sigma, x_t)
        share = schedule.beta(times.now, times.next) / sigma**2
        fresh = eta * sigma_next * share**0.5
        kept = (sigma_next**2 * (1 - eta**2 * share)) ** 0.5
        x_next = (
            broadcast_to(alpha_next, x_t) * x0_hat + broadcast_to(kept, x_t) * eps_hat
        )
        if not is_off(eta):
            x_next = x_next + broadcast_to(fresh, x_t) * standard_normal(
                keys, x_t.shape[1:]
            )
        return State(x_next, x0_hat)

    return step


def flow(denoise: Denoise, schedule: Schedule, *, gain: Real = 0.0) -> Step:
    """Returns the step of the probability flow of the score times 1 + gain.

    Exact if x0_hat is constant over the step (docs/method.md, section 5.5), so a chain
    of steps is one step with a weighted mean of their x0_hat. gain 0 is `ddim` of eta 0.
    """

    def step(keys: PRNGKeys, state: State, times: Times) -> State:
        x0_hat = _predict(denoise, state, times.now)
        kept, added = flow_coefficients(schedule, times.now, times.next, gain)
        x_next = broadcast_to(kept, x0_hat) * state.x_t
        return State(x_next + broadcast_to(added, x0_hat) * x0_hat, x0_hat)

    return step


def flow_coefficients(
    schedule: Schedule, now: Any, after: Any, gain: Real
) -> tuple[Any, Any]:
    """Returns the coefficients of x_t and of x0_hat in a step of `flow`."""
    alpha, sigma = schedule.alpha_sigma(now)
    alpha_next, sigma_next = schedule.alpha_sigma(after)
    shrink = (alpha * sigma_next / (sigma * alpha_next)) ** gain
    kept = sigma_next / sigma * shrink
    return kept, alpha_next - kept * alpha


def dpmpp_2m(denoise: Denoise, schedule: Schedule) -> Step:
    """Returns DPM-Solver++(2M)'s step, data prediction: arXiv:2211.01095, algorithm 2.

    The first step and the last are of first order.
    """

    def step(keys: PRNGKeys, state: State, times: Times) -> State:
        x_t, x0_hat = state.x_t, _predict(denoise, state, times.now)
        before, here, after = (0.5 * schedule.log_snr(jnp.asarray(t)) for t in times)
        _, sigma = schedule.alpha_sigma(times.now)
        alpha_next, sigma_next = schedule.alpha_sigma(times.next)
        h, h_before = after - here, here - before
        multi = (h_before > 0) & jnp.isfinite(h)
        gain = jnp.where(multi, 0.5 * h / jnp.where(h_before > 0, h_before, 1.0), 0.0)
        d = x0_hat + broadcast_to(gain, x_t) * (x0_hat - state.x0_hat)
        scale = -alpha_next * jnp.expm1(-h)
        x_next = (
            broadcast_to(sigma_next / sigma, x_t) * x_t + broadcast_to(scale, x_t) * d
        )
        return State(x_next, x0_hat)

    return step


# --- wrappers


def churn(step: Step, schedule: Schedule, *, rate: Real) -> Step:
    """Adds noise before each step, so that it starts at t + rate (t - t_next).

    This corrects errors of earlier steps (arXiv:2206.00364, algorithm 2).
    """

    def churned(keys: PRNGKeys, state: State, times: Times) -> State:
        after = jnp.maximum(times.next, 0.0)
        latest = jnp.maximum(times.now, _max_time(schedule))
        start = jnp.minimum(times.now + rate * (times.now - after), latest)
        beta = broadcast_to(schedule.beta(start, times.now), state.x_t)
        fresh = jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys)
        n = standard_normal(fresh, state.x_t.shape[1:])
        x_t = jnp.sqrt(1 - beta) * state.x_t + jnp.sqrt(beta) * n
        return step(keys, state._replace(x_t=x_t), times._replace(now=start))

    return churned


def _max_time(schedule: Schedule) -> float:
    return (
        1.0
        if schedule.num_steps is None
        else (schedule.num_steps - 1) / schedule.num_steps
    )


def temperature(
    solver: Callable[[Denoise], Step],
    denoise: Denoise,
    schedule: Schedule,
    *,
    tau: Real,
) -> Step:
    """Returns solver(denoise) with the score divided by tau (arXiv:2211.15089)."""
    return sharpen(solver, denoise, schedule, gain=1 / tau - 1)


def sharpen(
    solver: Callable[[Denoise], Step],
    denoise: Denoise,
    schedule: Schedule,
    *,
    gain: Real,
) -> Step:
    """Returns solver(denoise) with the score multiplied by 1 + gain: see `temperature`.

    The step uses x0_hat moved away from x_t; the state keeps x0_hat itself for
    self-conditioning. For the solvers in ONE_STEP; without noise `flow` is exact.
    """

    def step(keys: PRNGKeys, state: State, times: Times) -> State:
        kept = []

        def sharpened(x_t: Latent, t: Any, x0_prev: Latent) -> Latent:
            kept.append(denoise(x_t, t, x0_prev))
            alpha, _ = schedule.alpha_sigma(t)
            return kept[0] + gain * (kept[0] - x_t / broadcast_to(alpha, x_t))

        moved = solver(sharpened)(keys, state, times)
        return moved._replace(x0_hat=kept[0])

    return step


def by_noise(low: Step, high: Step, schedule: Schedule, *, level: float) -> Step:
    """Returns the step `low` where log(1/SNR) at its start is below level, else `high`.

    They may differ in solver, clamp or denoiser.
    """

    def switched(keys: PRNGKeys, state: State, times: Times) -> State:
        quiet = -schedule.log_snr(times.now) < level
        return jax.lax.cond(quiet, low, high, keys, state, times)

    return switched


def shift_timesteps(times: Times, gap: float) -> Times:
    """Moves the end of each step `gap` step lengths further.

    The next step still passes the original time to the network: asymmetric time
    intervals, arXiv:2208.04202, for few steps. The last step ends on clean data.
    """
    moved = times.next - gap * (times.now - times.next)
    return times._replace(next=np.where(times.next < 0, -1.0, np.maximum(moved, 0.0)))


SOLVERS: dict[str, Callable[..., Step]] = {
    "ancestral": ancestral,
    "marginal": marginal,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
}
ONE_STEP = ("ancestral", "ddim")  # read x_t alone: for `churn`, `temperature`


def solver_options(name: str) -> dict[str, Any]:
    """Returns the keyword arguments of a solver and their defaults."""
    parameters = inspect.signature(SOLVERS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def sample(
    key: PRNGKey | PRNGKeys,
    step: Step,
    x_T: Latent,
    times: Times,
    *,
    trace: Callable[[State], PyTree] | None = None,
) -> tuple[State, PyTree]:
    """Runs all steps; returns the last State and trace(state) per step [n ...].

    key [] or [b]: an example's noise depends only on its key and the step's number.
    """
    keys = per_example_keys(key, x_T.shape[0])
    number = len(times.now)

    def body(state: State, inputs: tuple[Array, Times]) -> tuple[State, PyTree]:
        i, now = inputs
        state = step(step_keys(keys, i), state, now)
        return state, None if trace is None else trace(state)

    x_T = jnp.asarray(x_T)
    start = State(x_T, jnp.zeros_like(x_T))
    device_times = jax.tree.map(jnp.asarray, times)
    return jax.lax.scan(body, start, (jnp.arange(number), device_times))
