# SPDX-License-Identifier: Apache-2.0
"""The end-to-end losses: diffusion, t = 0, rounding and prior terms per example.

All randomness but dropout is drawn first (`time_sampling.draw_noise`). Sources:
arXiv:2205.14217 section 4.1 and appendix A; docs/method.md, section 3, states each
term, and where the published code differs from the paper.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from dlm_jax.diffusion import model, rounding
from dlm_jax.diffusion.embedding import embed, unit_rows
from dlm_jax.diffusion.model import Params
from dlm_jax.diffusion.schedule import (
    Schedule,
    add_noise,
    clipped_variance,
    expand_to,
    posterior,
    require_num_steps,
)
from dlm_jax.diffusion.time_sampling import NoiseDraws
from dlm_jax.errors import UserError, choose
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.types import PAD, Array, Ids, Latent, PerExample, PRNGKey, Time


class LossTerms(NamedTuple):
    """Named terms of the loss, each [b]; `end_to_end` states their units.

    diffusion: error at t, 0 at index 0 if t0 takes it; t0: |EMB(w) - x0_hat|^2 (or its
    KL) at index 0, else 0; rounding: -log p(w | x_0); prior: (alpha_T x_0)^2, or its
    KL; weight: importance weight of the example.
    """

    diffusion: PerExample
    t0: PerExample
    rounding: PerExample
    prior: PerExample
    weight: PerExample

    def total(self) -> PerExample:
        """The loss of each example [b]."""
        return self.weight * (self.diffusion + self.t0 + self.rounding + self.prior)


class _ForwardPass(NamedTuple):
    """The results of one forward pass, which every objective reads."""

    clean: Latent
    x_0: Latent
    x_t: Latent
    x0_hat: Latent
    raw: Array  # the network's prediction; if that is logits, -log p(id) [b l]
    t: Time
    ids: Ids
    draws: NoiseDraws
    params: Params
    cfg: DenoiserConfig
    schedule: Schedule
    mask: Float[Array, "b l"]
    positions: PerExample

    def mean(self, value: Array) -> PerExample:
        """Averages over unmasked positions, and over d if there is such an axis [b].

        Known tokens add 0 to the sum and stay in the denominator.
        """
        value = jnp.mean(value, -1) if value.ndim == 3 else value
        return jnp.sum(value * self.mask, -1) / jnp.maximum(self.positions, 1)

    def split(self, error: Array, at_zero: Array) -> tuple[PerExample, PerExample]:
        """Returns (diffusion, t0): at_zero replaces error where t is index 0."""
        steps = self.schedule.num_steps
        zero = self.t < 0 if steps is None else self.t * steps < 0.5
        zero = expand_to(zero, error)
        return (
            self.mean(jnp.where(zero, 0.0, error)),
            self.mean(jnp.where(zero, at_zero, 0.0)),
        )

    def rounding(self) -> PerExample:
        """Computes -log p(w | x_0) on the noisy true x_0, nats per position."""
        scores = rounding.logits(self.params.table, self.params.bias, self.x_0)
        return self.mean(rounding.nll(scores, self.ids))

    def terms(self, diffusion, t0, rounding, prior, weight=None) -> LossTerms:
        if weight is None:
            weight = self.draws.weight
        ones = jnp.ones_like(diffusion)
        return LossTerms(
            diffusion, t0, rounding, prior, ones if weight is None else weight
        )


def _prior_norm(p: _ForwardPass) -> PerExample:
    """Computes mean(alpha_bar_T x_0^2), the published code's tT term."""
    steps = p.schedule.num_steps
    last = 1.0 if steps is None else (steps - 1) / steps
    alpha, _ = p.schedule.alpha_sigma(jnp.asarray(last))
    return p.mean((alpha * p.x_0) ** 2)


def _x0(p: _ForwardPass) -> LossTerms:
    """The paper's L_x0-simple e2e: the mean squared error of x0_hat."""
    error = p.split((p.x_0 - p.x0_hat) ** 2, (p.clean - p.x0_hat) ** 2)
    return p.terms(*error, p.rounding(), _prior_norm(p))


def _eps(p: _ForwardPass) -> LossTerms:
    """L_simple on eps; its t = 0 term uses the x_0 that eps_hat implies."""
    alpha, sigma = p.schedule.alpha_sigma(p.t)
    eps_hat = p.raw
    if p.cfg.predicts != "eps":
        eps_hat = (p.x_t - expand_to(alpha, p.x_t) * p.x0_hat) / expand_to(sigma, p.x_t)
    error = p.split((p.draws.eps_t - eps_hat) ** 2, (p.clean - p.x0_hat) ** 2)
    return p.terms(*error, p.rounding(), _prior_norm(p))


def _mu(p: _ForwardPass) -> LossTerms:
    """L_simple e2e: the squared error of the posterior mean mu(x_t, x_0)."""
    true, _ = posterior(p.x_0, p.x_t, p.t, p.schedule)
    mine, _ = posterior(p.x0_hat, p.x_t, p.t, p.schedule)
    error = p.split((true - mine) ** 2, (p.clean - p.x0_hat) ** 2)
    return p.terms(*error, p.rounding(), _prior_norm(p))


def _kl(mean_1, log_var_1, mean_2, log_var_2) -> Array:
    """Computes KL(N(mean_1, var_1) || N(mean_2, var_2)) in nats per coordinate."""
    ratio = log_var_1 - log_var_2
    square = (mean_1 - mean_2) ** 2 * jnp.exp(-log_var_2)
    return 0.5 * (jnp.expm1(ratio) - ratio + square)


def _kl_terms(p: _ForwardPass, sigma: str) -> tuple[Array, Array, Array]:
    """Returns the KL of step t, of index 0 and of the prior, nats per coordinate [b l d]."""
    true, _ = posterior(p.x_0, p.x_t, p.t, p.schedule)
    mine, _ = posterior(p.x0_hat, p.x_t, p.t, p.schedule)
    log_true, log_mine = (
        jnp.log(expand_to(clipped_variance(p.t, p.schedule, sigma=s), p.x_t))
        for s in ("small", sigma)
    )
    kl = _kl(true, log_true, mine, log_mine)
    log_zero = 2 * math.log(p.schedule.sigma_0)
    kl_zero = _kl(p.clean, log_zero, mine, log_mine)
    steps = require_num_steps(p.schedule)
    last = jnp.asarray((steps - 1) / steps)
    alpha, std = p.schedule.alpha_sigma(last)
    return kl, kl_zero, _kl(alpha * p.x_0, 2 * jnp.log(std), 0.0, 0.0)


def _vlb(p: _ForwardPass, sigma: str = "small") -> LossTerms:
    """L_vlb e2e in nats per position; T times the KL of step t estimates the sum."""
    kl, kl_zero, prior = _kl_terms(p, sigma)
    steps, d = require_num_steps(p.schedule), p.x_t.shape[-1]
    weight = 1.0 if p.draws.weight is None else p.draws.weight
    diffusion, t0 = (steps * d * weight * part for part in p.split(kl, kl_zero))
    ones = jnp.ones_like(diffusion)
    return p.terms(diffusion, t0, p.rounding(), d * p.mean(prior), ones)


def _vlb_legacy(p: _ForwardPass, sigma: str = "small") -> LossTerms:
    """The published code's E2E_KL in bits per dimension; T multiplies every term."""
    kl, kl_zero, prior = _kl_terms(p, sigma)
    scale = require_num_steps(p.schedule) / math.log(2)
    diffusion, t0 = (scale * part for part in p.split(kl, kl_zero))
    word = scale * p.rounding() / p.x_t.shape[-1]
    return p.terms(diffusion, t0, word, scale * p.mean(prior))


def _ce(p: _ForwardPass) -> LossTerms:
    """Cross-entropy of the denoiser's logits, nats per position (arXiv:2211.15089)."""
    error = p.mean(p.raw)
    zero = jnp.zeros_like(error)
    return p.terms(error, zero, zero, zero)


def _ar(p: _ForwardPass) -> LossTerms:
    """Cross-entropy of the next token, nats per position; the first token is given."""
    error = p.mean(jnp.pad(p.raw[:, :-1], ((0, 0), (1, 0))))
    zero = jnp.zeros_like(error)
    return p.terms(error, zero, zero, zero)


def _nelbo(p: _ForwardPass) -> LossTerms:
    """The continuous-time bound, nats per position (arXiv:2107.00630, eq. 17).

    It also trains the embedding (arXiv:2305.18619): x_0 = EMB(w), and the least noisy
    latent is rounded by Bayes' rule at each position.
    """
    _, slope = jax.jvp(p.schedule.snr, (p.t,), (jnp.ones_like(p.t),))
    error = jnp.sum((p.clean - p.x0_hat) ** 2, -1)
    diffusion = -0.5 * slope * p.mean(error)
    zero = jnp.zeros_like(p.t)
    last = add_noise(p.clean, zero, jnp.asarray(p.draws.eps_0), p.schedule)
    scores = model.token_posterior_logits(p.params.table, last, zero, p.schedule)
    rounded = p.mean(rounding.nll(scores, p.ids))
    share = jnp.exp(p.schedule.log_alpha_bar(jnp.ones(())))  # alpha_bar at the end
    square = jnp.sum(p.clean**2, -1)
    constant = p.x_t.shape[-1] * (-share - jnp.log1p(-share))
    prior = 0.5 * p.mean(share * square + constant)
    return p.terms(diffusion, jnp.zeros_like(diffusion), rounded, prior)


OBJECTIVES: dict[str, Callable[..., LossTerms]] = {
    "x0": _x0,
    "eps": _eps,
    "mu": _mu,
    "vlb": _vlb,
    "vlb_legacy": _vlb_legacy,
    "nelbo": _nelbo,
    "ce": _ce,
    "ar": _ar,
}
NEEDS_STEPS = ("mu", "vlb", "vlb_legacy")


def end_to_end(
    params: Params,
    ids: Ids,
    draws: NoiseDraws,
    *,
    cfg: DenoiserConfig,
    schedule: Schedule,
    objective: str,
    key: PRNGKey | None = None,
    mask_pad: bool = False,
    normalize: bool = False,
    **options: str,
) -> LossTerms:
    """Computes the named terms of one batch; differentiable in all of params.

    objective: a key of OBJECTIVES. Units: "x0", "eps", "mu": squared error per
    coordinate plus nats per position, as published; "vlb", "nelbo", "ce": nats per
    position; "vlb_legacy": bits per dimension, times T; "ar": nats per position, on
    clean embeddings. key: turns dropout on. mask_pad: ignore PAD, which the published
    code counts. normalize: scale the table's rows to norm sqrt(d) first. options: sigma
    ("small", "large") of the vlbs. Raises UserError if objective, network and schedule
    do not fit together.
    """
    check_compatible(objective, cfg, schedule)
    if normalize:
        params = params._replace(table=unit_rows(params.table))
    clean = embed(params.table, ids)
    x_0 = clean + sigma_0(objective, schedule) * draws.eps_0
    t = jnp.asarray(draws.t)
    x_t = add_noise(x_0, t, jnp.asarray(draws.eps_t), schedule)
    if objective == "ar":
        t, x_t = jnp.zeros_like(t), clean
    t_cond = t
    known, outside = known_tokens(ids, draws, cfg)
    if known is not None and not cfg.causal:
        x_t, t_cond = model.insert_clean_tokens(clean, known, x_t, t, outside)
    x0_prev = _first_estimate(params, cfg, schedule, x_t, t_cond, draws)
    scored = jnp.asarray(ids)
    if objective == "ar":  # the next token is predicted
        scored = jnp.roll(scored, -1, 1)

    def head_fn(raw: Array, x_t: Latent, t: Time, ids: Ids) -> tuple:
        x0_hat = model.TO_X0[cfg.predicts](raw, x_t, t, params.table, schedule)
        if cfg.predicts == "logits":
            raw = rounding.nll(raw, ids)
        return x0_hat, raw

    head_args = (x_t, t_cond, scored)
    x0_hat, raw = model.apply(
        params,
        cfg,
        x_t,
        t_cond,
        x0_prev,
        schedule=schedule,
        key=key,
        head_fn=head_fn,
        head_args=head_args,
    )
    mask, count = scored_positions(ids, known, cfg, mask_pad)
    done = _ForwardPass(
        clean, x_0, x_t, x0_hat, raw, t, ids, draws, params, cfg, schedule, mask, count
    )
    return OBJECTIVES[objective](done, **options)


def known_tokens(ids: Ids, draws: NoiseDraws, cfg: DenoiserConfig) -> tuple[Any, Any]:
    """Returns the masks [b l] of known tokens and of PAD outside the text, or None."""
    given = model.given_tokens(ids, cfg)
    if given is None:
        return draws.known, None
    known, outside = given
    return (known if draws.known is None else known | draws.known), outside


def scored_positions(
    ids: Ids, known: Any, cfg: DenoiserConfig, mask_pad: bool
) -> tuple[Array, PerExample]:
    """Returns the mask [b l] of scored positions, and the number to divide by [b]."""
    mask = jnp.ones(ids.shape)
    if mask_pad:
        mask = jnp.where(jnp.asarray(ids) == PAD, 0.0, 1.0)
    count = jnp.sum(mask, -1)
    if cfg.known_length:  # a batch may be narrower: all words weigh the same
        count = jnp.full_like(count, cfg.positions)
    return (mask if known is None else jnp.where(known, 0.0, mask)), count


def sigma_0(objective: str, schedule: Schedule) -> Any:
    """Returns the standard deviation of x_0 around EMB(w) in training."""
    return 0.0 if objective in ("nelbo", "ce", "ar") else schedule.sigma_0


def check_compatible(objective: str, cfg: DenoiserConfig, schedule: Schedule) -> None:
    """Raises UserError if objective, network and schedule do not fit together."""
    choose("objective", OBJECTIVES, objective)
    if objective in ("ce", "ar") and cfg.predicts != "logits":
        raise UserError(
            f"objective {objective!r} needs predicts 'logits', not {cfg.predicts!r}"
        )
    if cfg.known_length and objective != "ce":
        raise UserError(
            f"config.model.known_length=True needs objective 'ce', not {objective!r}: "
            "change one of them"
        )
    if cfg.known_source and (cfg.known_length or objective not in ("ce", "ar")):
        raise UserError(
            "config.model.known_source=True needs objective 'ce' or 'ar', and "
            "known_length=False, as a target's length follows from its source"
        )
    if cfg.causal != (objective == "ar"):
        raise UserError(
            f"objective {objective!r}, causal={cfg.causal}: only 'ar' takes causal=True, "
            "and it must"
        )
    if cfg.causal and (
        cfg.self_cond or cfg.token_posterior_input or cfg.time_input == "log_snr"
    ):
        raise UserError(
            "objective 'ar' takes neither self_cond nor token_posterior_input nor time_input='log_snr'"
        )
    if objective == "nelbo" and schedule.num_steps is not None:
        raise UserError(
            "objective 'nelbo' needs continuous time: config.schedule.num_steps=0"
        )
    if objective in NEEDS_STEPS and schedule.num_steps is None:
        raise UserError(f"objective {objective!r} needs config.schedule.num_steps > 0")


def _first_estimate(params, cfg, schedule, x_t, t, draws) -> Latent:
    """Returns x0_hat for self-conditioning where self_cond is 1, without gradient, else 0."""
    zeros = jnp.zeros_like(x_t)
    if not cfg.self_cond or draws.self_cond is None:
        return zeros

    def first():
        denoise = model.bind(jax.lax.stop_gradient(params), cfg, schedule=schedule)
        return denoise(jax.lax.stop_gradient(x_t), t, zeros)

    feed = jnp.asarray(draws.self_cond)
    estimate = jax.lax.cond(jnp.any(feed > 0), first, lambda: zeros)
    return jax.lax.stop_gradient(estimate * expand_to(feed, x_t))
