# SPDX-License-Identifier: Apache-2.0
"""Control: each wrapper against its formula; known tokens come back, others do not move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion import guidance, model, samplers, schedule
from dlm_jax.types import END, PAD, START

NOISE = schedule.make_schedule("sqrt")

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(7, 4)).astype(np.float32)
X = RNG.normal(size=(3, 5, 4)).astype(np.float32)
T = np.array([0.2, 0.5, 0.8], np.float32)


def estimate(x_t, t, x0_prev):
    """Reads all three inputs, so that the wrapper must pass them on."""
    return x_t + 0.1 * t.reshape(t.shape + (1,) * (3 - t.ndim)) + 0.5 * x0_prev


BARE = estimate(X, T, 0.2 * X)


def clamped(t=T, **options):
    return np.asarray(guidance.clamp(estimate, TABLE, **options)(X, t, 0.2 * X))


def nearest_rows(x):
    distance = np.linalg.norm(x[..., None, :].astype(float) - TABLE, axis=-1)
    return TABLE[distance.argmin(-1)]


def test_clamp_throughout():
    """As published: every position of every text becomes its nearest row."""
    np.testing.assert_array_equal(clamped(), nearest_rows(BARE))
    np.testing.assert_array_equal(clamped(below=0.8), clamped())  # t = below counts


@pytest.mark.parametrize(("below", "late"), [(0.5, 2), (0.49, 1), (0.2, 1), (0.1, 0)])
def test_clamp_is_late(below, late):
    """Times at or below the bound snap; the others stay as they were, bit for bit."""
    found = clamped(below=below)
    np.testing.assert_array_equal(found[:late], nearest_rows(BARE)[:late])
    np.testing.assert_array_equal(found[late:], BARE[late:])


def test_no_time_is_below_minus_one():
    np.testing.assert_array_equal(clamped(below=-1.0), BARE)


def test_time_per_token():
    """A text may hold clean and noisy positions: only the clean ones snap."""
    t = jnp.linspace(0.1, 0.9, 15).reshape(3, 5)
    bare, late = np.asarray(estimate(X, t, 0.2 * X)), np.asarray(t <= 0.5)
    found = clamped(t, below=0.5)
    np.testing.assert_array_equal(found[late], nearest_rows(bare)[late])
    np.testing.assert_array_equal(found[~late], bare[~late])
    assert 0 < late.sum() < 15


# --- of a Denoise


def test_known_tokens_are_given_clean_at_time_0():
    seen = {}

    def denoise(x_t, t, x0_prev):
        seen.update(x=x_t, t=t)
        return x_t

    ids, known = np.array([[1, 2, 3]]), np.array([[True, False, True]])
    x_t = np.full((1, 3, 4), 9.0, np.float32)
    guidance.condition_on_tokens(denoise, TABLE, ids, known)(
        x_t, np.array([0.5], np.float32), x_t
    )
    np.testing.assert_array_equal(seen["t"], [[0.0, 0.5, 0.0]])
    np.testing.assert_array_equal(seen["x"][0, [0, 2]], TABLE[[1, 3]])
    np.testing.assert_array_equal(seen["x"][0, 1], x_t[0, 1])


def test_classifier_free_is_a_line_through_both():
    def with_condition(x_t, t, x0_prev):
        return 3.0 * x_t

    for weight, factor in [(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]:
        mixed = guidance.classifier_free_guidance(
            with_condition, lambda x, t, p: x, weight=weight
        )
        np.testing.assert_allclose(mixed(X, T, X), factor * X, rtol=1e-6)


def test_classifier_free_mixes_words_too():
    def certain(x_t, t, x0_prev):
        return x_t, jax.nn.log_softmax(3.0 * exact_logits(x_t, t, x0_prev)[1])

    x0_hat, log_p = guidance.classifier_free_guidance(
        certain, exact_logits, weight=2.0
    )(X, T, X)
    np.testing.assert_allclose(x0_hat, 2 * X - exact_logits(X, T, X)[0], rtol=1e-5)
    want = 2 * certain(X, T, X)[1] - exact_logits(X, T, X)[1]
    np.testing.assert_allclose(log_p, want, rtol=1e-5)


def test_tokens_under_guidance_are_given_less_noise():
    weights = np.array([0.0, 1.0, 2.0, 0.5, 4.0], np.float32)[:, None]

    def of(x, t):
        return jnp.sum(weights * x, (1, 2))

    def times(x_t, t, x0_prev):
        return jnp.broadcast_to(t[..., None], x_t.shape)

    given = guidance.token_time_guidance(times, of, floor=0.6)(X, T, X)[..., 0]
    size = weights[:, 0] / 4
    np.testing.assert_allclose(given, T[:, None] * (1 - 0.4 * size), rtol=1e-5)
    same = guidance.token_time_guidance(times, of, floor=1.0)(X, T, X)[..., 0]
    np.testing.assert_allclose(same, np.broadcast_to(T[:, None], (3, 5)), rtol=1e-6)
    flat = guidance.token_time_guidance(times, lambda x, t: 0.0 * of(x, t), floor=0.6)(
        X, T, X
    )
    np.testing.assert_allclose(flat[..., 0], same)


def exact_logits(x_t, t, x0_prev):
    """Bayes for words drawn uniformly and alone: p(w | x_t) by N(alpha E_w, sigma^2)."""
    raw = model.token_posterior_logits(TABLE, jnp.asarray(x_t), t, NOISE)
    return model.expected_embedding(TABLE, raw), jax.nn.log_softmax(raw)


def test_restrict_tokens_renormalises_over_the_allowed():
    allowed = np.zeros((3, 5, 7), bool)
    allowed[..., [1, 4]] = True
    x0_hat, log_p = guidance.restrict_tokens(exact_logits, TABLE, allowed)(X, T, X)
    p = np.exp(exact_logits(X, T, X)[1]) * allowed
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(log_p), p, atol=1e-6)
    np.testing.assert_allclose(x0_hat, p @ TABLE, atol=1e-5)


def test_token_guidance_is_bayes_rule():
    """Guided by a condition, the estimate is the exact mean of x_0 under it."""
    ids = RNG.integers(0, 7, (3, 5))
    known = np.zeros((3, 5), bool)
    known[:, 2] = True

    def known_words(log_p):
        own = jnp.take_along_axis(log_p, jnp.asarray(ids)[..., None], -1)[..., 0]
        return jnp.sum(jnp.where(known, own, 0.0), -1)

    guided = guidance.token_guidance(exact_logits, known_words, NOISE)(X, T, X)
    wanted = np.where(known[..., None], TABLE[ids], exact_logits(X, T, X)[0])
    np.testing.assert_allclose(guided, wanted, atol=2e-4)
    bare = guidance.token_guidance(exact_logits, known_words, NOISE, weight=0.0)
    np.testing.assert_array_equal(bare(X, T, X), exact_logits(X, T, X)[0])


# --- conditions on the tokens


def one_text(words, sure=50.0):
    """Log-probabilities that are all but certain of these words [1 l v]."""
    return jax.nn.log_softmax(sure * jax.nn.one_hot(jnp.asarray([words]), 7))


@pytest.mark.parametrize(
    ("condition", "meets", "fails"),
    [
        (guidance.contains_phrase(np.array([[2, 3]])), [1, 2, 3], [2, 1, 3]),
        (guidance.contains_phrase(np.array([[3, -1]])), [1, 2, 3], [1, 2, 2]),
        (guidance.excludes_tokens(np.array([[4, 5]])), [1, 2, 3], [1, 4, 3]),
        (guidance.excludes_tokens(np.array([[4, -1]])), [1, 5, 3], [1, 4, 3]),
    ],
)
def test_conditions_know_texts_that_meet_them(condition, meets, fails):
    assert abs(float(condition(one_text(meets))[0])) < 1e-4
    assert float(condition(one_text(fails))[0]) < -10


def test_a_phrase_at_any_place_by_enumeration():
    log_p = jax.nn.log_softmax(RNG.normal(size=(1, 4, 7)).astype(np.float32))
    p = np.exp(log_p[0])
    wanted = sum(p[i, 2] * p[i + 1, 5] for i in range(3))
    found = guidance.contains_phrase(np.array([[2, 5]]))(log_p)
    np.testing.assert_allclose(found, [np.log(wanted)], rtol=1e-5)


def test_no_phrase_is_no_condition():
    found = guidance.contains_phrase(np.array([[-1, -1]]))(one_text([1, 2, 3]))
    np.testing.assert_array_equal(found, [0])


def test_every_condition_at_once():
    log_p = one_text([1, 2, 3])
    a, b = (
        guidance.contains_phrase(np.array([[2]])),
        guidance.contains_phrase(np.array([[6]])),
    )
    both = guidance.weighted_sum((a, 1.0), (b, 0.5))(log_p)
    np.testing.assert_allclose(both, a(log_p) + 0.5 * b(log_p), rtol=1e-6)


def test_length_pattern():
    ids, known = guidance.length_template(np.array([2, 3]), 6)
    assert ids[0].tolist() == [START, PAD, PAD, END, PAD, PAD]
    assert known[0].tolist() == [True, False, False, True, True, True]
    assert ids[1].tolist()[4:] == [END, PAD]
    assert known[1].tolist() == [True, False, False, False, True, True]


# --- of a Step


def gaussian(x_t, t, x0_prev):
    """The mean of x_0 ~ N(0, 1) given x_t: a denoiser with no table."""
    alpha, _ = NOISE.alpha_sigma(t)
    return jnp.asarray(alpha).reshape(-1, 1, 1) * x_t


SOLVERS = {name: make(gaussian, NOISE) for name, make in samplers.SOLVERS.items()}


@pytest.mark.parametrize("noised", [True, False])
@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_known_tokens_come_back_for_every_solver(solver, noised):
    ids, known = RNG.integers(0, 7, (3, 5)), RNG.random((3, 5)) < 0.5
    step = guidance.infill(SOLVERS[solver], TABLE, ids, known, NOISE, noised=noised)
    state, trace = samplers.sample(
        jax.random.key(0), step, X, samplers.timesteps(6), trace=lambda s: s
    )
    for x in (state.x_t, state.x0_hat, *trace.x0_hat):
        np.testing.assert_array_equal(x[known], TABLE[ids][known])
    clean = np.abs(np.asarray(trace.x_t[0])[known] - TABLE[ids][known]).max()
    assert (clean > 0.1) == noised


def test_infill_leaves_the_noise_of_the_others_alone():
    nothing = np.zeros((3, 5), bool)
    ids = np.zeros((3, 5), int)
    step = guidance.infill(SOLVERS["ddim"], TABLE, ids, nothing, NOISE, noised=True)
    plain, filled = (
        samplers.sample(jax.random.key(0), s, X, samplers.timesteps(6))[0]
        for s in (SOLVERS["ddim"], step)
    )
    np.testing.assert_array_equal(plain.x_t, filled.x_t)


def test_published_rule(golden):
    """Three sign steps, fluency over sigma (docs/method.md, section 7.6)."""
    x, target = golden["n1"], golden["n0"]
    found = guidance.gradient_updates(
        jnp.asarray(x),
        lambda x: -jnp.mean((x - target) ** 2, (1, 2)),
        0.9 * x,
        jnp.float32(0.1095),
        update=guidance.UPDATE_RULES["sign"].update,
        power=1,
        lr=0.1,
        num_updates=3,
        fluency=0.0005,
    )
    np.testing.assert_allclose(found, golden["langevin/out"], atol=1e-5)


def towards(target):
    return lambda x, t: -jnp.sum((x - target) ** 2, (1, 2))


@pytest.mark.parametrize("rule", guidance.UPDATE_RULES)
def test_guidance_raises_the_log_probability(rule):
    target = RNG.normal(size=X.shape).astype(np.float32)
    log_prob, values = towards(target), []
    for num_updates in (0, 1, 3):
        step = guidance.gradient_guidance(
            SOLVERS["ddim"],
            log_prob,
            NOISE,
            rule=rule,
            num_updates=num_updates,
            fluency=0.0,
        )
        keys = samplers.per_example_keys(jax.random.key(0), 3)
        times = samplers.Times(*map(jnp.float32, (0.6, 0.5, 0.4)))
        after = step(keys, samplers.State(X, X), times)
        values.append(log_prob(after.x_t, T))
    assert np.all(np.diff(np.stack(values), axis=0) > 0)


def test_no_update_and_no_time_change_nothing():
    log_prob = towards(np.zeros_like(X))
    plain, *same = (
        samplers.sample(jax.random.key(0), s, X, samplers.timesteps(6))[0].x_t
        for s in (
            SOLVERS["ddim"],
            guidance.gradient_guidance(SOLVERS["ddim"], log_prob, NOISE, num_updates=0),
            guidance.gradient_guidance(
                SOLVERS["ddim"], log_prob, NOISE, t_range=(0.95, 1.0)
            ),
        )
    )
    for found in same:
        np.testing.assert_array_equal(found, plain)
    acts = guidance.gradient_guidance(
        SOLVERS["ddim"], log_prob, NOISE, t_range=(0.4, 0.7)
    )
    moved = samplers.sample(jax.random.key(0), acts, X, samplers.timesteps(6))[0].x_t
    assert not np.array_equal(moved, plain)


def test_fluency_holds_the_sample():
    target = 5.0 + np.zeros_like(X)
    free, held = (
        guidance.gradient_updates(
            jnp.asarray(X),
            lambda x: towards(target)(x, None),
            X,
            jnp.float32(0.1),
            update=guidance.UPDATE_RULES["gradient"].update,
            power=2,
            lr=1.0,
            num_updates=3,
            fluency=fluency,
        )
        for fluency in (0.0, 0.5)
    )
    assert np.abs(held - X).mean() < 0.5 * np.abs(free - X).mean()
