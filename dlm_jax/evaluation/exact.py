# SPDX-License-Identifier: Apache-2.0
"""The exact denoiser of the built-in grammar, and a network's distance from it.

With x* = E[x_0 | x_t], E|x_0 - f|^2 = E|x_0 - x*|^2 + E|f - x*|^2 for any estimate f. So
the bound of a network exceeds -log p by the integral over u = log(1/SNR) of
1/2 e^-u E|f - x*|^2, the gap, and that of the exact denoiser by nothing: what it
integrates is the information in the language at each level of noise.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.data import grammar
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.diffusion import likelihood, losses, model, schedule
from dlm_jax.diffusion.embedding import embed
from dlm_jax.diffusion.likelihood import MeanStderr
from dlm_jax.diffusion.model import Denoise
from dlm_jax.diffusion.schedule import Schedule
from dlm_jax.inference.trained_model import TrainedModel
from dlm_jax.types import Array, Ids, Latent, Logits, Table, Time

EDGES = (-1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 8.0)  # of u, the levels that are told apart


def exact_denoiser(table: Table, schedule: Schedule, tokenizer: Tokenizer) -> Denoise:
    """Returns the denoiser x* = E[x_0 | x_t] of the grammar's texts, for x_0 = EMB(w).

    It runs on the host, some 3 ms per text and call. Raises ValueError if the tokenizer
    lacks words of the grammar.
    """
    predict = exact_predictor(table, schedule, tokenizer)
    return lambda x_t, t, x0_prev: predict.estimate(x_t, t)


def exact_predictor(
    table: Table, schedule: Schedule, tokenizer: Tokenizer
) -> likelihood.LatentPredictor:
    """Returns the exact denoiser in the form that `likelihood.bound` takes."""
    posterior = _differentiable_posterior(tuple(tokenizer.tokens()))

    def probabilities(x_t: Latent, t: Time) -> Array:
        t = jnp.maximum(t, 0.0)
        return posterior(model.token_posterior_logits(table, x_t, t, schedule))

    def estimate(x_t: Latent, t: Time) -> Latent:
        p = probabilities(x_t, t)
        return jnp.einsum("blv,vd->bld", p, table, precision="highest")

    def decode(x: Latent, t: Time) -> Logits:
        return jnp.log(jnp.maximum(probabilities(x, t), 1e-30))

    return likelihood.LatentPredictor(estimate, decode, 0.0)


STEP = 1e-4  # of a difference quotient, nats


def _differentiable_posterior(tokens: tuple[str, ...]) -> Callable[[Array], Array]:
    """Returns p(token | scores [b l v]), with the derivative that jax.vjp takes.

    As p is the gradient of the log of the total weight, its derivative is symmetric: a
    product with it is a difference quotient in that direction, in float64.
    """

    def on_host(function: Callable, *arrays: Array) -> jax.Array:
        def host(*arrays: Array) -> np.ndarray:
            return function(*(np.asarray(x, np.float64) for x in arrays)).astype("f4")

        shape = jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32)
        return jax.pure_callback(host, shape, *arrays)

    def value(scores: np.ndarray) -> np.ndarray:
        return grammar.posterior(scores, tokens)[0]

    def slope(scores: np.ndarray, along: np.ndarray) -> np.ndarray:
        size = STEP / np.maximum(np.abs(along).max((1, 2), keepdims=True), 1e-30)
        ends = (value(scores + sign * size * along) for sign in (1, -1))
        return (next(ends) - next(ends)) / (2 * size)

    @jax.custom_vjp
    def posterior(scores: Array) -> Array:
        return on_host(value, scores)

    posterior.defvjp(
        lambda scores: (posterior(scores), scores),
        lambda scores, along: (on_host(slope, scores, along),),
    )
    return posterior


class Level(NamedTuple):
    """A range of noise, low <= log(1/SNR) < high, and its share of the bound.

    information: what the language has there; gap: what the network adds, both in nats
    per token.
    """

    low: float
    high: float
    information: MeanStderr
    gap: MeanStderr


def time_of_noise(schedule: Schedule, u: np.ndarray) -> np.ndarray:
    """Returns the times at which log(1/SNR) is u, by linear interpolation."""
    steps = schedule.num_steps
    t = np.arange(steps) / steps if steps else np.linspace(0, 1, 4097)
    return np.interp(u, -np.asarray(schedule.log_snr(t)), t)


def gap_by_level(
    lm: TrainedModel,
    ids: Ids,
    count: Array,
    *,
    edges: tuple[float, ...] = EDGES,
    draws: int = 2,
    seed: int = 0,
) -> list[Level]:
    """Estimates information and gap of ids [n l] at each level of noise.

    count [n]: tokens per text. draws: noise levels per text and level, stratified over
    the texts. The network is evaluated as in the bound: twice, if it is
    self-conditioned.
    """
    table = jnp.asarray(lm.ema.table)
    predict = likelihood.latent_predictor(lm.ema, lm.cfg, lm.schedule, sigma_0=0.0)
    exact = exact_predictor(table, lm.schedule, lm.tokenizer)
    x = embed(table, ids)

    given = model.given_tokens(ids, lm.cfg)
    known = np.zeros(np.shape(ids), bool) if given is None else given[0]

    @jax.jit
    def errors(key: Array, t: Time) -> tuple[Array, Array]:
        x_t = schedule.add_noise(x, t, jax.random.normal(key, x.shape), lm.schedule)
        scale = 0.5 * jnp.exp(lm.schedule.log_snr(t))
        if given is not None:
            x_t, t = model.insert_clean_tokens(x, known, x_t, t, given[1])
        best = exact.estimate(x_t, t)

        def nats(a: Latent, b: Latent) -> Array:
            return scale * jnp.sum(
                jnp.where(known[..., None], 0.0, (a - b) ** 2), (-2, -1)
            )

        return nats(x, best), nats(predict.estimate(x_t, t), best)

    rng, rows = np.random.default_rng(seed), []
    for low, high in itertools.pairwise(edges):
        nats = np.zeros((2, len(x)))
        for draw in range(draws):
            place = (rng.permutation(len(x)) + rng.random()) / len(x)
            t = time_of_noise(lm.schedule, low + (high - low) * place)
            key = jax.random.fold_in(jax.random.key(seed), 100 * draw + len(rows))
            found = errors(key, jnp.asarray(t, jnp.float32))
            nats += (high - low) / draws * np.asarray(found)
        per_token = (likelihood.ratio_with_stderr(row, count) for row in nats)
        rows.append(Level(low, high, *per_token))
    return rows


def gap_rows(lm: TrainedModel, ids: Ids, count: Array) -> dict[str, MeanStderr]:
    """Returns {level: gap in nats per token}, of at most 128 rows of ids.

    Empty where the exact denoiser does not apply: to autoregressive models, to
    objectives with noise on x_0, and if the vocabulary lacks a word of the grammar.
    """
    objective = lm.config["loss"]["objective"]
    known = set(lm.tokenizer.tokens())
    if lm.cfg.causal or losses.sigma_0(objective, lm.schedule) or len(ids) < 2:
        return {}
    if not known >= set(grammar.words()):
        return {}
    return {
        f"gap, log(1/SNR) {row.low:g} to {row.high:g}": row.gap
        for row in gap_by_level(lm, ids[:128], count[:128])
    }
