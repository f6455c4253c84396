# SPDX-License-Identifier: Apache-2.0
"""The exact denoiser: against enumeration, the parser, the entropy and every solver."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.data import grammar, inside_outside, tokenizer
from dlm_jax.diffusion import (
    guidance,
    likelihood,
    model,
    ode_likelihood,
    rounding,
    samplers,
    schedule,
)
from dlm_jax.evaluation import exact, text_metrics
from dlm_jax.types import END, PAD, START

TOY = {
    "S": [(("A", "B"), 0.3), (("B", "'x'", "A"), 0.5), (("A",), 0.2)],
    "A": [(("'x'",), 0.6), (("'y'",), 0.4)],
    "B": [(("A", "'z'"), 0.7), (("'z'",), 0.3)],
}
IDS = {"x": 4, "y": 5, "z": 6}
LENGTH, VOCAB, DIM = 7, 7, 8
WORDS = tokenizer.WordTokenizer(tuple(grammar.words()))


def _enumerate(symbol):
    """Yields (words, probability) of every text of a symbol of the toy grammar."""
    if symbol.startswith("'"):
        yield (symbol.strip("'"),), 1.0
        return
    for parts, p in TOY[symbol]:
        for found in itertools.product(*map(_enumerate, parts)):
            words = tuple(w for text, _ in found for w in text)
            yield words, p * np.prod([q for _, q in found])


def _row(ids, length):
    return [START, *ids, END] + [PAD] * (length - len(ids) - 2)


@pytest.mark.parametrize("sharpness", [0.3, 3.0, 10.0])
def test_posterior_is_the_sum_over_all_texts(sharpness):
    scores = sharpness * np.random.default_rng(0).standard_normal((3, LENGTH, VOCAB))
    chart = inside_outside.make_chart(TOY, "S", IDS, LENGTH - 2)
    p, evidence = inside_outside.posterior(scores, chart)
    texts = list(_enumerate("S"))
    assert sum(q for _, q in texts) == pytest.approx(1)
    rows = np.array([_row([IDS[w] for w in words], LENGTH) for words, _ in texts])
    for b in range(3):
        log = np.log([q for _, q in texts])
        log += scores[b][np.arange(LENGTH), rows].sum(-1)
        weight = np.exp(log - log.max())
        expected = np.zeros((LENGTH, VOCAB))
        for row, w in zip(rows, weight / weight.sum(), strict=True):
            expected[np.arange(LENGTH), row] += w
        np.testing.assert_allclose(p[b], expected, atol=1e-12)
        np.testing.assert_allclose(evidence[b], np.logaddexp.reduce(log), rtol=1e-12)


def _ids(texts, length=32):
    return np.array([_row(WORDS.encode(text), length) for text in texts])


def test_sharp_scores_give_the_probability_of_the_text():
    texts = grammar.sample(3, 8)
    ids = _ids(texts)
    scores = np.where(np.eye(WORDS.vocab_size)[ids] > 0, 0.0, -1e9)
    p, evidence = grammar.posterior(scores, WORDS.tokens())
    exact_ = [grammar.log_prob(text) for text in texts]
    np.testing.assert_allclose(evidence, exact_, atol=1e-5)
    np.testing.assert_array_equal(p.argmax(-1), ids)


def test_no_evidence_gives_the_language_itself():
    scores = np.zeros((1, 32, WORDS.vocab_size))
    p, evidence = grammar.posterior(scores, WORDS.tokens())
    assert evidence == pytest.approx(0, abs=1e-9)
    ids = _ids(grammar.sample(4, 4000))
    share = np.eye(WORDS.vocab_size)[ids].mean(0)
    error = np.sqrt(np.maximum(p[0] * (1 - p[0]), 1e-9) / len(ids))
    assert np.all(np.abs(share - p[0]) < 5 * error + 1e-3)


def test_a_word_that_the_vocabulary_lacks():
    tokens = WORDS.tokens()[:-1]
    with pytest.raises(ValueError, match="lacks"):
        grammar.posterior(np.zeros((1, 32, len(tokens))), tokens)


@pytest.fixture(scope="module")
def table():
    rows = jax.random.normal(jax.random.key(0), (WORDS.vocab_size, 32))
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True) * np.sqrt(32)


INFORMATION = schedule.logistic(3.4, 0.7)


@pytest.mark.slow
def test_the_bound_of_the_exact_denoiser_is_exact(table):
    """Nothing is lost: not by the prior, the weights, the draws or the rounding."""
    texts = grammar.sample(5, 96)
    predict = exact.exact_predictor(table, INFORMATION, WORDS)
    ids, key = jnp.asarray(_ids(texts)), jax.random.key(1)
    bound, _ = likelihood.bound(key, ids, table, predict, INFORMATION, draws=32)
    nats = -np.array([grammar.log_prob(text) for text in texts])
    excess = np.asarray(bound.total()) - nats
    error = excess.std(ddof=1) / np.sqrt(len(texts))
    assert abs(excess.mean()) < 5 * error
    assert error < 0.03 * nats.mean()  # so that the comparison could fail


@pytest.mark.slow
def test_the_ode_of_the_exact_denoiser_is_exact(table):
    """Each text's -log p, within the error that is stated for it."""
    texts = grammar.sample(5, 24)
    predict = exact.exact_predictor(table, INFORMATION, WORDS)
    ids, key = jnp.asarray(_ids(texts)), jax.random.key(1)

    def run(key):
        options = {"draws": 3, "num_steps": 16}
        return ode_likelihood.bound(key, ids, table, predict, INFORMATION, **options)

    bound, stderr = jax.jit(run)(key)
    nats = -np.array([grammar.log_prob(text) for text in texts])
    excess = np.asarray(bound.total()) - nats
    error = np.sqrt(np.mean(stderr**2))  # of three draws each: pooled over the texts
    assert 0.5 * error < excess.std() < 2 * error
    error /= np.sqrt(len(texts))
    assert abs(excess.mean()) < 5 * error
    assert error < 0.03 * nats.mean()  # so that the comparison could fail


# solver, its options, clamp, accepted at least of 48; the ceilings of a network
SOLVERS = {
    "marginal": (samplers.marginal, {}, True, 0.9),
    "ddim": (samplers.ddim, {"eta": 1.0}, False, 0.8),
    "dpmpp_2m": (samplers.dpmpp_2m, {}, False, 0.85),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_sample_the_language_in_16_steps(name, table):
    solver, options, clamped, accepted = SOLVERS[name]
    denoise = exact.exact_denoiser(table, INFORMATION, WORDS)
    denoise = guidance.clamp(denoise, table) if clamped else denoise
    step = solver(denoise, INFORMATION, **options)
    x_T = jax.random.normal(jax.random.key(2), (48, 32, 32))
    times = samplers.schedule_timesteps(INFORMATION, 16)
    state, _ = samplers.sample(jax.random.key(3), step, x_T, times)
    texts = [WORDS.decode(row) for row in rounding.nearest(table, state.x0_hat)]
    assert np.mean([grammar.accepts(text) for text in texts]) >= accepted
    real = grammar.sample(6, 48)
    assert abs(text_metrics.unigram_entropy(texts) - 4.25) < 0.15
    gap = np.mean(text_metrics.lengths(texts)) - np.mean(text_metrics.lengths(real))
    assert -3.5 < gap < 3


def test_steps_switch_at_their_level(table):
    """The low step runs below the level of noise only, with its own state and noise."""
    low, high = (
        samplers.marginal(lambda *x, s=s: jnp.full((2, 3, 4), s), INFORMATION)
        for s in (1.0, 2.0)
    )
    step = samplers.by_noise(low, high, INFORMATION, level=3.4)
    keys = samplers.per_example_keys(jax.random.key(0), 2)
    for t, estimate in ((0.2, 1.0), (0.8, 2.0)):
        times = samplers.Times(*map(jnp.float32, (t, t, t - 0.1)))
        state = samplers.State(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4)))
        out = step(keys, state, times)
        own = (low if estimate == 1 else high)(keys, state, times)
        np.testing.assert_array_equal(out.x0_hat, estimate)
        np.testing.assert_allclose(out.x_t, own.x_t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("made", [INFORMATION, schedule.make_schedule("sqrt", 2000)])
def test_time_of_noise_inverts_the_schedule(made):
    u = np.array([-1.0, 2.0, 3.4, 6.0])
    t = exact.time_of_noise(made, u)
    tolerance = 0.05 if made.num_steps else 0.01
    np.testing.assert_allclose(-made.log_snr(t), u, atol=tolerance)


def test_posterior_of_each_position_alone_is_no_better(table):
    """The exact denoiser's error is below that of the token posterior, and not zero."""
    ids = jnp.asarray(_ids(grammar.sample(7, 16)))
    x, t = table[ids], jnp.full(16, 0.5)
    x_t = schedule.add_noise(
        x, t, jax.random.normal(jax.random.key(4), x.shape), INFORMATION
    )
    best = exact.exact_denoiser(table, INFORMATION, WORDS)(x_t, t, x)
    alone = model.expected_embedding(
        table, model.token_posterior_logits(table, x_t, t, INFORMATION)
    )
    error, other = (float(jnp.mean((x - y) ** 2)) for y in (best, alone))
    assert 0.01 < error < 0.7 * other
