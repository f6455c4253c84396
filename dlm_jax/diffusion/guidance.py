# SPDX-License-Identifier: Apache-2.0
"""Control: wrappers of a `Denoise` or a `Step` that steer the text.

There are three kinds, from cheap to expensive: known tokens (`infill`,
`condition_on_tokens`), tokens allowed at each position (`restrict_tokens`), and the
gradient of a log-probability, either of the noisy sample, by a classifier
(`gradient_guidance`, `classifier_guidance_x0`), or of the model's own token
probabilities (`token_guidance`). Formulas: docs/method.md, section 7.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Bool, Float, Int

from dlm_jax.diffusion.embedding import embed
from dlm_jax.diffusion.model import Denoise, DenoiseLogits, insert_clean_tokens
from dlm_jax.diffusion.rounding import Allowed, project
from dlm_jax.diffusion.samplers import State, Step, Times, standard_normal
from dlm_jax.diffusion.schedule import Schedule, broadcast_to, expand_to, posterior
from dlm_jax.types import (
    END,
    PAD,
    START,
    Array,
    Ids,
    Latent,
    Logits,
    PerExample,
    PRNGKeys,
    Real,
    Table,
    Time,
)

# log p(c | x_t) in nats, at the noise of time t
LogProb = Callable[[Latent, Time], PerExample]
# log p(c | token log-probabilities) in nats
TokenLogProb = Callable[[Logits], PerExample]

Known = Bool[Array, "b l"]


# --- wrappers of a Denoise


def clamp(
    denoise: Denoise,
    table: Table,
    *,
    below: Real = 1.0,
    allowed: Allowed | None = None,
) -> Denoise:
    """Moves x0_hat to the nearest allowed embeddings at times t <= below.

    Source: arXiv:2205.14217 section 4.2. below = 1 clamps at every step, as the
    published code does.
    """

    def clamped(x_t: Latent, t: Time, x0_prev: Latent) -> Latent:
        x0_hat = denoise(x_t, t, x0_prev)
        late = expand_to(jnp.asarray(t) <= below, x0_hat)
        return jnp.where(late, project(table, x0_hat, allowed), x0_hat)

    return clamped


def condition_on_tokens(
    denoise: Denoise | DenoiseLogits,
    table: Table,
    ids: Ids,
    known: Known,
    *,
    outside: Known | None = None,
) -> Any:
    """Gives the network the known tokens as clean embeddings at time 0.

    For models trained so, by config.loss.conditioning_prob. outside: positions outside
    the text, for a model with cfg.marks_known, which gets marks instead of times.
    """
    clean = embed(table, ids)
    return lambda x_t, t, x0_prev: denoise(
        *insert_clean_tokens(clean, known, x_t, t, outside), x0_prev
    )


def classifier_free_guidance(
    conditional: Denoise | DenoiseLogits,
    unconditional: Denoise | DenoiseLogits,
    *,
    weight: Real,
) -> Any:
    """Returns x0 + weight (x0_conditional - x0), and the same for log-probabilities.

    Classifier-free guidance, arXiv:2207.12598: weight 1 is the conditional model, a
    larger weight exaggerates the condition. The mixed log-probabilities are not
    normalised. `restrict_tokens` belongs inside: from mixed log-probabilities it would
    take words that are unlikely under both.
    """

    def mix(without: Array, within: Array) -> Array:
        return without + weight * (within - without)

    return lambda *x: jax.tree.map(mix, unconditional(*x), conditional(*x))


def token_time_guidance(denoise: Denoise, log_prob: LogProb, *, floor: Real) -> Denoise:
    """Lowers the time input of the tokens that log p(c | x_t) depends on most.

    A token's time is scaled between 1 and floor by the norm of its gradient, relative
    to the largest in the text, so that the network keeps what guidance wrote there.
    After arXiv:2510.26200; floor 1 changes nothing.
    """

    def warped(x_t: Latent, t: Time, x0_prev: Latent) -> Latent:
        each = jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
        slope = jax.grad(lambda x: jnp.sum(log_prob(x, each)))(x_t)
        size = jnp.linalg.norm(slope, axis=-1)
        size = size / jnp.maximum(jnp.max(size, -1, keepdims=True), 1e-30)
        return denoise(x_t, each[:, None] * (1 - (1 - floor) * size), x0_prev)

    return warped


def restrict_tokens(
    denoise_logits: DenoiseLogits, table: Table, allowed: Allowed
) -> DenoiseLogits:
    """Renormalises each position's token probabilities over its allowed tokens.

    This is exact per position; other positions see it at the next step.
    """
    barred = jnp.where(jnp.asarray(allowed), 0.0, -1e9)

    def restricted(x_t: Latent, t: Time, x0_prev: Latent) -> tuple[Latent, Logits]:
        log_p = jax.nn.log_softmax(denoise_logits(x_t, t, x0_prev)[1] + barred)
        mean = jnp.einsum("blv,vd->bld", jnp.exp(log_p), table, precision="highest")
        return mean, log_p

    return restricted


def drop_logits(denoise_logits: DenoiseLogits) -> Denoise:
    """Returns the estimate x0_hat without the log-probabilities."""
    return lambda x_t, t, x0_prev: denoise_logits(x_t, t, x0_prev)[0]


def classifier_guidance_x0(
    denoise: Denoise, log_prob: LogProb, schedule: Schedule, *, weight: Real = 1.0
) -> Denoise:
    """Returns x0_hat + weight sigma^2/alpha grad log p(c | x_t), Bayes' rule.

    Classifier guidance of arXiv:2105.05233; one backward pass of the classifier per
    step.
    """

    def guided(x_t: Latent, t: Time, x0_prev: Latent) -> Latent:
        each = jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
        slope = jax.grad(lambda x: jnp.sum(log_prob(x, each)))(x_t)
        alpha, sigma = schedule.alpha_sigma(t)
        scale = weight * expand_to(sigma**2 / alpha, x_t)
        return denoise(x_t, t, x0_prev) + scale * slope

    return guided


def token_guidance(
    denoise_logits: DenoiseLogits,
    condition: TokenLogProb,
    schedule: Schedule,
    *,
    weight: Real = 1.0,
) -> Denoise:
    """Guides x0_hat by a condition on the model's own token probabilities.

    No classifier is needed, only a backward pass of the model per step. Token guidance
    of arXiv:2305.18619.
    """

    def guided(x_t: Latent, t: Time, x0_prev: Latent) -> Latent:
        def log_prob_and_x0(x_t: Latent) -> tuple[Array, Latent]:
            x0_hat, log_p = denoise_logits(x_t, t, x0_prev)
            return jnp.sum(condition(log_p)), x0_hat

        slope, x0_hat = jax.grad(log_prob_and_x0, has_aux=True)(x_t)
        alpha, sigma = schedule.alpha_sigma(t)
        return x0_hat + weight * expand_to(sigma**2 / alpha, x_t) * slope

    return guided


# --- conditions on token probabilities


def contains_phrase(phrase: Int[Array, "b k"]) -> TokenLogProb:
    """Returns log of the sum, over places, of the probability of the phrase there.

    phrase [b k]: ids, a row per example, padded with -1. By the union
    bound it is never too small; it is capped at 0.
    """
    phrase = jnp.asarray(phrase)
    real = phrase >= 0

    def condition(log_p: Logits) -> PerExample:
        length, size = log_p.shape[1], phrase.shape[1]
        words = jnp.where(real, phrase, 0)[:, None]  # [b 1 k]
        own = jnp.take_along_axis(log_p, words.repeat(length, 1), -1)  # [b l k]
        own = jnp.where(real[:, None], own, 0.0)
        padded = jnp.pad(own, ((0, 0), (0, size - 1), (0, 0)), constant_values=-1e9)
        padded = jnp.where(real[:, None], padded, 0.0)
        places = sum(padded[:, k : k + length, k] for k in range(size))
        return jnp.minimum(logsumexp(jnp.asarray(places), axis=-1), 0.0)

    return condition


def excludes_tokens(words: Int[Array, "b k"]) -> TokenLogProb:
    """Returns the sum over positions of log(1 - p(any of these words)).

    words [b k]: ids, a row per example, padded with -1.
    """
    words = jnp.asarray(words)

    def condition(log_p: Logits) -> PerExample:
        rows = jnp.where(words >= 0, words, 0)[:, None]
        p = jnp.exp(jnp.take_along_axis(log_p, rows.repeat(log_p.shape[1], 1), -1))
        p = jnp.sum(jnp.where(words[:, None] >= 0, p, 0.0), -1)
        return jnp.sum(jnp.log1p(-jnp.minimum(p, 1 - 1e-6)), -1)

    return condition


def weighted_sum(*conditions: tuple[Callable[..., PerExample], float]) -> Callable:
    """Returns the weighted sum of several conditions, given as (condition, weight)."""
    return lambda *x: jnp.asarray(sum(w * condition(*x) for condition, w in conditions))


# --- patterns of known tokens


def length_template(count: Int[Array, " b"], length: int) -> tuple[Ids, Known]:
    """Returns (ids, known) [b length]: START, `count` open positions, END, then PAD."""
    place, end = jnp.arange(length), jnp.asarray(count)[:, None] + 1
    ids = jnp.where(place == 0, START, jnp.where(place == end, END, PAD))
    return ids, (place == 0) | (place >= end)


# --- wrappers of a Step


def infill(
    step: Step,
    table: Table,
    ids: Ids,
    known: Known,
    schedule: Schedule,
    *,
    noised: bool = False,
) -> Step:
    """Writes the known tokens into the sample and the estimate after each step.

    noised: with the noise of the time reached (the replacement method); False keeps
    them clean at every time, as the published code does.
    """
    clean, keep = embed(table, ids), jnp.asarray(known)[..., None]

    def filled(keys: PRNGKeys, state: State, times: Times) -> State:
        state, x = step(keys, state, times), clean
        if noised:
            alpha, sigma = schedule.alpha_sigma(times.next)
            own = jax.vmap(lambda k: jax.random.fold_in(k, 2))(keys)
            x = broadcast_to(alpha, x) * x + broadcast_to(sigma, x) * standard_normal(
                own, x.shape[1:]
            )
        x_t = jnp.where(keep, x, state.x_t)
        return State(x_t, jnp.where(keep, clean, state.x0_hat))

    return filled


class UpdateRule(NamedTuple):
    """A rule for gradient updates: update(slope, memory, lr, std) -> (move, memory).

    slope [b l d]: the gradient of the objective; memory: its sum of squares so far in
    this step; power: the power of std that divides the fluency term.
    """

    update: Callable[..., tuple[Latent, Latent]]
    power: int


def _sign(slope, memory, lr, std):
    return lr * slope / (jnp.abs(slope) + 1e-10), memory


def _adagrad(slope, memory, lr, std):
    memory = memory + slope**2
    return lr * slope / (jnp.sqrt(memory) + 1e-10), memory


def _plain(slope, memory, lr, std):
    return lr * std**2 * slope, memory


# sign: the published code, which restarts Adagrad for every update, so that all updates
# have the size lr; it divides the fluency term by std. adagrad: the paper. gradient:
# classifier guidance of arXiv:2105.05233 at lr = 1.
UPDATE_RULES: dict[str, UpdateRule] = {
    "sign": UpdateRule(_sign, 1),
    "adagrad": UpdateRule(_adagrad, 2),
    "gradient": UpdateRule(_plain, 2),
}


def gradient_guidance(
    step: Step,
    log_prob: LogProb,
    schedule: Schedule,
    *,
    rule: str = "sign",
    lr: Real = 0.1,
    num_updates: int = 3,
    fluency: Real = 0.01,
    t_range: tuple[Real, Real] = (0.05, 1.0),
) -> Step:
    """Ascends log p(c | x) - fluency |x - mean|^2 / std^power after each step.

    mean and std are those of q(x_next | x_t, x0_hat), whatever the solver. Acts at times in
    t_range. Source: arXiv:2205.14217 section 5.1.
    """
    update, power = UPDATE_RULES[rule]

    def guided(keys: PRNGKeys, state: State, times: Times) -> State:
        after = step(keys, state, times)
        near, far = t_range
        acts = (times.now >= near) & (times.now <= far) & (times.next >= 0)
        mean, std = posterior(
            after.x0_hat, state.x_t, times.now, schedule, t_next=times.next
        )
        t = jnp.broadcast_to(times.next, mean.shape[:1])

        def climb() -> Latent:
            return gradient_updates(
                after.x_t,
                lambda x: log_prob(x, t),
                mean,
                std,
                update=update,
                power=power,
                lr=lr,
                num_updates=num_updates,
                fluency=fluency,
            )

        return after._replace(x_t=jax.lax.cond(acts, climb, lambda: after.x_t))

    return guided


def gradient_updates(
    x: Latent,
    log_prob: Callable[[Latent], PerExample],
    mean: Latent,
    std: Float[Array, ""],
    *,
    update: Callable,
    power: int,
    lr: Real,
    num_updates: int,
    fluency: Real,
) -> Latent:
    """Runs the gradient updates of one step."""
    scale = jnp.where(std > 0, std, 1.0) ** power

    def objective(x: Latent) -> Array:
        return jnp.sum(log_prob(x)) - fluency * jnp.sum((mean - x) ** 2) / scale

    def one(_, carry):
        x, memory = carry
        move, memory = update(jax.grad(objective)(x), memory, lr, std)
        return x + move, memory

    return jax.lax.fori_loop(0, num_updates, one, (x, jnp.zeros_like(x)))[0]
