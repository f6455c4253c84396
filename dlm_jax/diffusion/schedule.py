# SPDX-License-Identifier: Apache-2.0
"""Noise schedules: x_t = alpha(t) x_0 + sigma(t) eps, variance preserving, t in [0, 1].

A schedule is one curve, log alpha_bar(t), which keeps full precision at both ends, where
alpha_bar or 1 - alpha_bar would lose it in float32. docs/method.md, section 1, lists all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Float

from dlm_jax.errors import UserError, choose
from dlm_jax.types import Array, Latent, Time

MAX_BETA = 0.999  # the published clip


def _numpy(*values: Any) -> Any:
    """Returns NumPy (float64) for host values, jax.numpy if one is on a device."""
    return jnp if any(isinstance(x, jax.Array) for x in values) else np


class Schedule(NamedTuple):
    """log alpha_bar as a function of t or, once discretised, as an array [num_steps].

    `curve`(t) and `betas`(steps) are `Partial`s, functions whose parameters are leaves,
    so that a schedule is a pytree. In discrete time, t stands for index round(t *
    num_steps); t < 0 stands for clean data. Host times (NumPy) give float64, device
    times float32.
    """

    curve: Partial | None
    betas: Partial
    log_alpha_bar_table: Array | None = None

    @property
    def num_steps(self) -> int | None:
        """T of a discretised schedule; None for a continuous one."""
        return (
            None
            if self.log_alpha_bar_table is None
            else self.log_alpha_bar_table.shape[0]
        )

    @property
    def sigma_0(self) -> Any:
        """Standard deviation of x_0 around EMB(w): sqrt(1 - alpha_bar(0))."""
        _, sigma = self.alpha_sigma(np.zeros(()))
        return float(sigma) if isinstance(sigma, np.generic | np.ndarray) else sigma

    def _log(self, t: Any) -> tuple[Any, Any]:
        """Returns log alpha_bar(t) as (high, low), so that differences stay precise."""
        xp = _numpy(t, *jax.tree.leaves(self.curve))
        t = xp.asarray(t)
        if self.log_alpha_bar_table is None:
            if self.curve is None:
                raise UserError(
                    "this schedule exists only discretised: call "
                    "schedule.discretize(schedule, steps) first"
                )
            value = xp.where(t < 0, 0.0, self.curve(xp.maximum(t, 0.0)))
            return value, xp.zeros_like(value)
        steps = self.log_alpha_bar_table.shape[0]
        index = xp.clip(xp.round(t * steps).astype(int), -1, steps - 1) + 1
        table = np.concatenate(
            [[0.0], np.asarray(self.log_alpha_bar_table, np.float64)]
        )
        if xp is np:
            return table[index], np.zeros(np.shape(t))
        high = table.astype(np.float32)
        low = (table - high).astype(np.float32)
        return jnp.asarray(high)[index], jnp.asarray(low)[index]

    def log_alpha_bar(self, t: Any) -> Any:
        """Returns log alpha_bar(t), of t's shape."""
        high, low = self._log(t)
        return high + low

    def alpha_bar(self, t: Any) -> Any:
        """Returns alpha_bar(t), of t's shape; 1 for t < 0."""
        log = self.log_alpha_bar(t)
        return _numpy(log).exp(log)

    def alpha_sigma(self, t: Any) -> tuple[Any, Any]:
        """Returns (sqrt(alpha_bar), sqrt(1 - alpha_bar)) at t."""
        log = self.log_alpha_bar(t)
        xp = _numpy(log)
        return xp.exp(0.5 * log), xp.sqrt(-xp.expm1(log))

    def log_snr(self, t: Any) -> Any:
        """Returns log(alpha_bar / (1 - alpha_bar)), +inf for clean data."""
        log = self.log_alpha_bar(t)
        xp = _numpy(log)
        clean = log >= 0
        return xp.where(
            clean, xp.inf, log - xp.log(-xp.expm1(xp.where(clean, -1, log)))
        )

    def snr(self, t: Any, sigma_0: float = 0.0) -> Any:
        """Returns the signal-to-noise ratio of x_t given EMB(w), of t's shape.

        sigma_0: as trained, see `losses.sigma_0`.
        """
        # not expm1(-log): XLA's CPU compiler confuses it with the -expm1(log) of the
        # same kernel (jax 0.10)
        log = self.log_alpha_bar(t)
        xp = _numpy(log)
        return xp.exp(log) / (xp.exp(log) * sigma_0**2 - xp.expm1(log))

    def beta(self, t: Any, t_next: Any) -> Any:
        """Returns 1 - alpha_bar(t) / alpha_bar(t_next), the noise added from t_next to t."""
        high, low = self._log(t)
        high_next, low_next = self._log(t_next)
        difference = (high - high_next) + (low - low_next)
        return -_numpy(difference).expm1(difference)


def expand_to(t: Any, x: Latent) -> Any:
    """Reshapes a value per example [b] or per token [b l] to broadcast with x [b l d]."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def broadcast_to(value: Any, x: Latent) -> Any:
    """Converts a coefficient [b] or [b l] to x's dtype, and reshapes it as `expand_to`."""
    return expand_to(jnp.asarray(value, x.dtype), x)


def add_noise(x_0: Latent, t: Time, eps: Latent, schedule: Schedule) -> Latent:
    """Computes x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps."""
    alpha, sigma = schedule.alpha_sigma(t)
    return (
        expand_to(jnp.asarray(alpha), x_0) * x_0
        + expand_to(jnp.asarray(sigma), eps) * eps
    )


# --- one reverse step


def posterior_coefficients(t: Any, t_next: Any, schedule: Schedule) -> tuple:
    """Returns the coefficients of x0_hat and x_t, and the variance of the posterior.

    They belong to q(x_next | x_t, x0_hat), and have t's shape.
    """
    beta = schedule.beta(t, t_next)
    noise = schedule.beta(t, -1.0)
    alpha_next, sigma_next = schedule.alpha_sigma(t_next)
    coef_t = sigma_next**2 * (1 - beta) ** 0.5 / noise
    return beta * alpha_next / noise, coef_t, beta * sigma_next**2 / noise


def _large(t: Any, t_next: Any, schedule: Schedule) -> Any:
    beta = schedule.beta(t, t_next)
    return _numpy(t_next, beta).where(t_next < 0, 0.0, beta)


# variance of a reverse step from t to t_next
VARIANCES: dict[str, Callable[[Any, Any, Schedule], Any]] = {
    "small": lambda t, t_next, s: posterior_coefficients(t, t_next, s)[2],
    "large": _large,
}


def posterior(
    x0_hat: Latent,
    x_t: Latent,
    t: Time | Float[Array, ""],
    schedule: Schedule,
    *,
    t_next: Time | Float[Array, ""] | None = None,
    sigma: str = "small",
) -> tuple[Latent, Any]:
    """Returns mean [b l d] and standard deviation (t's shape) of q(x_next | x_t, x0_hat).

    t_next: the time reached, by default t - 1/num_steps. sigma: "small" is the
    posterior's own deviation, "large" is sqrt(beta); both are 0 at t_next < 0. Source:
    arXiv:2006.11239.
    """
    if t_next is None:
        t_next = t - 1.0 / require_num_steps(schedule)
    coef_0, coef_t, _ = posterior_coefficients(t, t_next, schedule)
    std = jnp.asarray(VARIANCES[sigma](t, t_next, schedule)) ** 0.5
    return broadcast_to(coef_0, x_t) * x0_hat + broadcast_to(coef_t, x_t) * x_t, std


def require_num_steps(schedule: Schedule) -> int:
    """Returns T of a discretised schedule. Raises UserError for a continuous one."""
    if schedule.num_steps is None:
        raise UserError(
            "a continuous schedule has no steps: set config.schedule.num_steps, or call "
            "schedule.discretize(schedule, T)"
        )
    return schedule.num_steps


def clipped_variance(t: Time, schedule: Schedule, *, sigma: str = "small") -> Any:
    """Returns the step's variance; index 0, where it is 0, takes index 1's small one."""
    xp, step = _numpy(t), 1.0 / require_num_steps(schedule)
    later = xp.maximum(t, step)
    small, mine = (
        VARIANCES[s](later, later - step, schedule) for s in ("small", sigma)
    )
    return xp.where(t < 0.5 * step, small, mine)


# --- curves: log alpha_bar(t)


def _sqrt(t):
    xp = _numpy(t)
    return xp.log1p(-xp.minimum(xp.sqrt(t + 1e-4), 1 - 1e-6))


def _cosine(t, shift):
    xp = _numpy(t)
    angle = xp.minimum((t + shift) / (1 + shift) * np.pi / 2, np.pi / 2 - 1e-3)
    # log cos^2, by the sine where the cosine is near 1
    near, far = xp.log1p(-(xp.sin(angle) ** 2)), 2.0 * xp.log(xp.cos(angle))
    return xp.where(angle < np.pi / 4, near, far)


def _log_sigmoid(xp, x):
    return -xp.logaddexp(0.0, -x)


def _logistic(t, mean, scale, cut):
    xp = _numpy(t)
    u = xp.clip(t, cut, 1 - cut)
    return _log_sigmoid(xp, -(mean + scale * (xp.log(u) - xp.log1p(-u))))


def _gumbel(t, mean, scale, cut):
    xp = _numpy(t)
    u = xp.clip(t, cut, 1 - cut)
    return _log_sigmoid(xp, -(mean - scale * xp.log(-xp.log(u))))


def _linear_between(t, knots, noise):
    xp = _numpy(t)
    return _log_sigmoid(xp, -xp.interp(t, knots, noise))


def _rescaled(t, curve, factor):
    log, xp = curve(t), _numpy(t)
    return log - xp.log1p((factor**2 - 1) * -xp.expm1(log))


# --- discretisations: betas [T], float64


def _betas_normalised(steps, f):
    """The published `betas_for_alpha_bar`: 1 - f((i+1)/T) / f(i/T)."""
    s = np.arange(steps + 1) / steps
    return np.minimum(1 - f(s[1:]) / f(s[:-1]), MAX_BETA)


def _betas_shifted(steps, f):
    """The published `betas_for_alpha_bar2`: the first beta is 1 - f(0)."""
    s = np.arange(steps) / steps
    return np.minimum(1 - f(s) / np.append(1.0, f(s[:-1])), MAX_BETA)


def _betas_linear(steps, shift):
    low, high = 1e-4 * 1000 / steps, 0.02 * 1000 / steps
    return np.linspace(low + shift, high + shift, steps)


def _betas_piecewise(steps):
    low, high = 1e-4 * 1000 / steps, 0.02 * 1000 / steps
    head = np.linspace(low + 0.01, low, 10)
    return np.concatenate([head, np.linspace(low, high, steps - 10)])


def _betas_rescaled(steps, betas, factor):
    log = np.cumsum(np.log1p(-np.asarray(betas(steps), np.float64)))
    log -= np.log1p((factor**2 - 1) * -np.expm1(log))
    return np.minimum(-np.expm1(np.diff(log, prepend=0.0)), MAX_BETA)


def _f_sqrt(s):
    return 1 - np.sqrt(s + 1e-4)


def _f_cosine(s, shift):
    return np.cos((s + shift) / (1 + shift) * np.pi / 2) ** 2


def _f_curve(s, curve):
    return np.exp(curve(s))


def _curve(curve: Callable, betas: Callable, f: Callable, **options: float) -> Schedule:
    return Schedule(Partial(curve, **options), Partial(betas, f=Partial(f, **options)))


def _of_curve(curve: Partial) -> Schedule:
    return Schedule(curve, Partial(_betas_shifted, f=Partial(_f_curve, curve=curve)))


def logistic(mean: Any, scale: Any, cut: float = 1e-4) -> Schedule:
    """Returns the schedule under which uniform t makes log(1/SNR) logistic.

    mean, scale: of log(1/SNR); cut: times below it and above 1 - cut are clipped.
    """
    return _of_curve(Partial(_logistic, mean=mean, scale=scale, cut=cut))


def gumbel(mean: Any, scale: Any, cut: float = 1e-5) -> Schedule:
    """Returns the schedule under which uniform t makes log(1/SNR) Gumbel.

    Source: arXiv:2604.11748.
    """
    return _of_curve(Partial(_gumbel, mean=mean, scale=scale, cut=cut))


def from_quantiles(t: Array, log_nsr: Array) -> Schedule:
    """Returns the schedule with log(1/SNR) `log_nsr` at times `t`, linear in between."""
    return _of_curve(Partial(_linear_between, knots=t, noise=log_nsr))


def rescale(schedule: Schedule, factor: float) -> Schedule:
    """Rescales the noise by the factor F of arXiv:2212.09412.

    alpha_bar' = alpha_bar / (F^2 - (F^2 - 1) alpha_bar).
    """
    betas = Partial(_betas_rescaled, betas=schedule.betas, factor=factor)
    curve = schedule.curve
    if curve is not None:
        curve = Partial(_rescaled, curve=curve, factor=factor)
    return Schedule(curve, betas)


# The six of the published code, and two quantile functions: the logistic, and the Gumbel
# of arXiv:2604.11748 with its published parameters.
SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "sqrt": lambda: _curve(_sqrt, _betas_normalised, _f_sqrt),
    "cosine": lambda: _curve(_cosine, _betas_normalised, _f_cosine, shift=0.008),
    "trunc_cos": lambda: _curve(_cosine, _betas_shifted, _f_cosine, shift=0.1),
    "linear": lambda: Schedule(None, Partial(_betas_linear, shift=0.0)),
    "trunc_lin": lambda: Schedule(None, Partial(_betas_linear, shift=0.01)),
    "pw_lin": lambda: Schedule(None, Partial(_betas_piecewise)),
    "logistic": lambda mean=2.0, scale=1.2: logistic(mean, scale),
    "gumbel": lambda mean=4.723, scale=0.852: gumbel(mean, scale),
}


QUANTILE_SCHEDULES = ("logistic", "gumbel")


def betas(schedule: Schedule, steps: int) -> np.ndarray:
    """Returns the schedule's betas [steps], float64."""
    return np.asarray(schedule.betas(steps), np.float64)


def discretize(schedule: Schedule, steps: int) -> Schedule:
    """Returns the schedule in discrete time: `steps` levels; index i is t = i / steps."""
    return schedule._replace(
        log_alpha_bar_table=np.cumsum(np.log1p(-betas(schedule, steps)))
    )


def make_schedule(
    name: str,
    num_steps: int = 0,
    *,
    mean: float = 0.0,
    scale: float = 0.0,
    noise_factor: float = 1.0,
    adaptive: str = "",
) -> Schedule:
    """Returns SCHEDULES[name], discretised if num_steps > 0. Raises UserError.

    mean, scale: of logistic or gumbel; scale 0: their defaults. noise_factor: see
    `rescale`. adaptive: training adapts the schedule from this start (see `adaptive`).
    """
    choose("config.schedule.name", SCHEDULES, name)
    if num_steps < 0 or 0 < num_steps < 20:
        raise UserError(
            f"config.schedule.num_steps={num_steps}: take 20 or more, or 0 (continuous)"
        )
    if scale and name not in QUANTILE_SCHEDULES:
        raise UserError(
            f"config.schedule.scale is for {QUANTILE_SCHEDULES}, not {name!r}"
        )
    if adaptive and (num_steps or name not in QUANTILE_SCHEDULES or noise_factor != 1):
        raise UserError(
            f"config.schedule.adaptive={adaptive!r} needs num_steps=0, noise_factor=1 and "
            f"a name of {QUANTILE_SCHEDULES}"
        )
    if noise_factor <= 0:
        raise UserError(f"config.schedule.noise_factor={noise_factor}: must be over 0")
    schedule = SCHEDULES[name](mean, scale) if scale else SCHEDULES[name]()
    schedule = schedule if noise_factor == 1 else rescale(schedule, noise_factor)
    if num_steps and betas(schedule, num_steps).max() >= 1:
        raise UserError(f"config.schedule.num_steps={num_steps}: too few for {name!r}")
    return discretize(schedule, num_steps) if num_steps else schedule
