# SPDX-License-Identifier: Apache-2.0
"""Control: wrappers of a Denoise or a Step that steer the text.

Three kinds of wish, from cheap to dear: known tokens (`infill`, `given`), words allowed
at each position (`only`), and any log-probability that can be differentiated, of the
noisy sample (`guide`, by a classifier) or of the model's own words (`steer`, by none).
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
    Table,
    Time,
)

# log p(c | x_t) in nats, at the noise of time t
LogProb = Callable[[Latent, Time], PerExample]
# log p(c | words) of the words' own log-probabilities, nats
TokenLogProb = Callable[[Logits], PerExample]

Known = Bool[Array, "b l"]


# --- of a Denoise


def clamp(
    denoise: Denoise,
    table: Table,
    *,
    below: float = 1.0,
    allowed: Allowed | None = None,
) -> Denoise:
    """Snaps x0_hat to the nearest word vectors, of the allowed ones, at t <= below.

    arXiv:2205.14217 section 4.2; below = 1 clamps throughout, as the published code.
    """

    def clamped(x_t: Latent, t: Time, x0_prev: Latent) -> Latent:
        x0_hat = denoise(x_t, t, x0_prev)
        late = expand_to(jnp.asarray(t) <= below, x0_hat)
        return jnp.where(late, project(table, x0_hat, allowed), x0_hat)

    return clamped


def condition_on_tokens(
    denoise: Denoise | DenoiseLogits, table: Table, ids: Ids, known: Known
) -> Any:
    """The model told the known tokens: clean vectors, at time 0.

    For models trained on texts that are known in part: config.loss.conditioning_prob.
    """
    clean = embed(table, ids)
    return lambda x_t, t, x0_prev: denoise(
        *insert_clean_tokens(clean, known, x_t, t), x0_prev
    )


def classifier_free_guidance(
    conditional: Denoise | DenoiseLogits,
    unconditional: Denoise | DenoiseLogits,
    *,
    weight: float,
) -> Any:
    """x0 + weight (x0_conditional - x0), and so the log-probabilities of a Read.

    Classifier-free guidance, arXiv:2207.12598: weight 1 is the conditional model, more
    exaggerates the condition. The mixed log-probabilities do not add up to 1: `only`
    makes them.
    """

    def mix(without: Array, within: Array) -> Array:
        return without + weight * (within - without)

    return lambda *x: jax.tree.map(mix, unconditional(*x), conditional(*x))


def token_time_guidance(
    denoise: Denoise, log_prob: LogProb, *, floor: float
) -> Denoise:
    """Tells the network that tokens which log p(c | x_t) hangs on are less noisy.

    Their time falls, by the size of their slope among those of the text, to share t at
    the least, so that what guidance wrote there is kept. After arXiv:2510.26200; share 1
    changes nothing.
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
    """The model's words given that each position's is an allowed one.

    Exact for one position, whose posterior is renormalised; the others hear of it at the
    next step.
    """
    barred = jnp.where(jnp.asarray(allowed), 0.0, -1e9)

    def restricted(x_t: Latent, t: Time, x0_prev: Latent) -> tuple[Latent, Logits]:
        log_p = jax.nn.log_softmax(denoise_logits(x_t, t, x0_prev)[1] + barred)
        mean = jnp.einsum("blv,vd->bld", jnp.exp(log_p), table, precision="highest")
        return mean, log_p

    return restricted


def drop_logits(denoise_logits: DenoiseLogits) -> Denoise:
    """The estimate alone."""
    return lambda x_t, t, x0_prev: denoise_logits(x_t, t, x0_prev)[0]


def classifier_guidance_x0(
    denoise: Denoise, log_prob: LogProb, schedule: Schedule, *, weight: float = 1.0
) -> Denoise:
    """Bayes' rule on the estimate: x0_hat + weight sigma^2/alpha grad log p(c | x_t).

    Classifier guidance of arXiv:2105.05233: one backward pass of the classifier.
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
    weight: float = 1.0,
) -> Denoise:
    """`lean` to a condition that is read from the model's own words: no classifier.

    One backward pass of the model. Token guidance, arXiv:2305.18619.
    """

    def guided(x_t: Latent, t: Time, x0_prev: Latent) -> Latent:
        def log_prob_and_x0(x_t: Latent) -> tuple[Array, Latent]:
            x0_hat, log_p = denoise_logits(x_t, t, x0_prev)
            return jnp.sum(condition(log_p)), x0_hat

        slope, x0_hat = jax.grad(log_prob_and_x0, has_aux=True)(x_t)
        alpha, sigma = schedule.alpha_sigma(t)
        return x0_hat + weight * expand_to(sigma**2 / alpha, x_t) * slope

    return guided


# --- wishes about the words


def contains_phrase(phrase: Int[Array, "b k"]) -> TokenLogProb:
    """The phrase at some place: log sum over places of the product of its words.

    phrase: ids, of each example its own; a row is filled up with -1. The sum counts a
    text with the phrase twice twice, so it is a bound, close where p is small.
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
    """None of these words anywhere: sum over positions of log(1 - p). Rows end in -1."""
    words = jnp.asarray(words)

    def condition(log_p: Logits) -> PerExample:
        rows = jnp.where(words >= 0, words, 0)[:, None]
        p = jnp.exp(jnp.take_along_axis(log_p, rows.repeat(log_p.shape[1], 1), -1))
        p = jnp.sum(jnp.where(words[:, None] >= 0, p, 0.0), -1)
        return jnp.sum(jnp.log1p(-jnp.minimum(p, 1 - 1e-6)), -1)

    return condition


def weighted_sum(*conditions: tuple[Callable[..., PerExample], float]) -> Callable:
    """Several conditions at once, each with its weight: the weighted sum."""
    return lambda *x: jnp.asarray(sum(w * condition(*x) for condition, w in conditions))


# --- patterns of known tokens


def length_template(words: Int[Array, " b"], length: int) -> tuple[Ids, Known]:
    """START, as many open positions as words, END, then PAD [b length]."""
    place, end = jnp.arange(length), jnp.asarray(words)[:, None] + 1
    ids = jnp.where(place == 0, START, jnp.where(place == end, END, PAD))
    return ids, (place == 0) | (place >= end)


# --- of a Step


def infill(
    step: Step,
    table: Table,
    ids: Ids,
    known: Known,
    schedule: Schedule,
    *,
    noised: bool = True,
) -> Step:
    """Writes the known tokens into the sample and the estimate after each step.

    noised: at the noise of the time reached (the replacement method); False keeps them
    clean at every level, as the published code does (REFERENCE Q15).
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
    """update(slope, memory, lr, std) -> (move, memory); power: of std under the fluency.

    slope [b l d]: of the objective. memory: the sum of squares so far, in one step.
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


# "sign": the published rule, whose Adagrad is made anew for every update and so takes
# steps of one size, its fluency over sigma (REFERENCE Q12). "adagrad": the paper's.
# "gradient": lr = 1 is classifier guidance, arXiv:2105.05233.
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
    lr: float = 0.1,
    num_updates: int = 3,
    fluency: float = 0.01,
    t_range: tuple[float, float] = (0.05, 1.0),
) -> Step:
    """Climbs log p(c | x) - fluency |x - mean|^2 / std after each step.

    mean, std: of q(x_next | x_t, x0_hat), so that the sample stays likely. Acts at
    times between[0] <= t <= between[1]. arXiv:2205.14217 section 5.1, REFERENCE 1.7.
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
    lr: float,
    num_updates: int,
    fluency: float,
) -> Latent:
    """`guide`'s inner updates of one step."""
    scale = jnp.where(std > 0, std, 1.0) ** power

    def objective(x: Latent) -> Array:
        return jnp.sum(log_prob(x)) - fluency * jnp.sum((mean - x) ** 2) / scale

    def one(_, carry):
        x, memory = carry
        move, memory = update(jax.grad(objective)(x), memory, lr, std)
        return x + move, memory

    return jax.lax.fori_loop(0, num_updates, one, (x, jnp.zeros_like(x)))[0]
