# SPDX-License-Identifier: Apache-2.0
"""Invariants of schedules, posteriors, solvers and the clamp, for any parameters."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_jax.diffusion import guidance, rounding, samplers, schedule

settings.register_profile("few", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("few")

CONTINUOUS = [n for n in schedule.SCHEDULES if schedule.SCHEDULES[n]().curve]


@st.composite
def schedules(draw, names=tuple(schedule.SCHEDULES), discrete=None):
    """Any schedule: a name, continuous or of T steps, a noise factor, a location."""
    name = draw(st.sampled_from(sorted(names)))
    if discrete is None:
        discrete = name not in CONTINUOUS or draw(st.booleans())
    options = {"noise_factor": draw(st.floats(1.0, 8.0))}
    if name in schedule.QUANTILE_SCHEDULES and draw(st.booleans()):
        options |= {"mean": draw(st.floats(-2, 5)), "scale": draw(st.floats(0.3, 2))}
    steps = draw(st.integers(25, 3000)) if discrete else 0
    return schedule.make_schedule(name, steps, **options)


@st.composite
def with_times(draw, number):
    """A schedule and that many times of it, falling."""
    made = draw(schedules())
    if made.num_steps is None:
        t = st.floats(0.0, 1.0)
    else:
        t = st.integers(0, made.num_steps - 1).map(lambda i: i / made.num_steps)
    drawn = draw(st.lists(t, min_size=number, max_size=number, unique=True))
    return made, [np.asarray(x) for x in sorted(drawn, reverse=True)]


@given(with_times(3))
def test_noise_grows_and_composes(made):
    """Noise added from u to s and then from s to t is that from u to t."""
    curve, (t, s, u) = made
    alpha, sigma = curve.alpha_sigma(t)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
    assert 0 < curve.alpha_bar(t) <= curve.alpha_bar(s) <= curve.alpha_bar(u) <= 1
    assert curve.log_snr(t) <= curve.log_snr(u)
    kept = (1 - curve.beta(t, s)) * (1 - curve.beta(s, u))
    np.testing.assert_allclose(kept, 1 - curve.beta(t, u), rtol=1e-9, atol=1e-15)


@given(with_times(2))
def test_posterior_keeps_the_marginal(made):
    """q(x_s | x_t, x_0) averaged over q(x_t | x_0) is q(x_s | x_0)."""
    curve, (t, s) = made
    c_0, c_t, _ = schedule.posterior_coefficients(t, s, curve)
    (alpha, sigma), (alpha_s, sigma_s) = curve.alpha_sigma(t), curve.alpha_sigma(s)
    np.testing.assert_allclose(c_0 + c_t * alpha, alpha_s, rtol=1e-8)
    variance = schedule.VARIANCES["small"](t, s, curve)
    np.testing.assert_allclose(
        (c_t * sigma) ** 2 + variance, sigma_s**2, rtol=1e-8, atol=1e-15
    )


@given(schedules(CONTINUOUS, discrete=False), st.floats(1, 4), st.floats(1, 4))
def test_noise_factors_multiply(made, f, g):
    t = np.linspace(0.01, 0.99, 9)
    one = schedule.rescale(schedule.rescale(made, f), g)
    np.testing.assert_allclose(
        one.log_snr(t), schedule.rescale(made, f * g).log_snr(t), rtol=1e-8, atol=1e-8
    )


@settings(max_examples=15)
@given(
    with_times(2),
    st.sampled_from(sorted(samplers.SOLVERS)),
    st.integers(0, 9),
)
def test_a_perfect_estimate_keeps_every_marginal(made, name, seed):
    """Where x0_hat is x_0, x_s has the mean alpha_s x_0 and the noise sigma_s."""
    curve, (t, s) = made
    x_0, eps = jax.random.normal(jax.random.key(seed), (2, 400, 4, 3))
    x_0 = x_0[:1].repeat(400, 0)
    alpha, sigma = curve.alpha_sigma(t)
    x_t = jnp.float32(alpha) * x_0 + jnp.float32(sigma) * eps
    step = samplers.SOLVERS[name](lambda *x: x_0, curve)
    keys = samplers.per_example_keys(jax.random.key(seed + 1), 400)
    times = samplers.Times(jnp.float32(t), jnp.float32(t), jnp.float32(s))
    x_s = step(keys, samplers.State(x_t, jnp.zeros_like(x_t)), times).x_t
    alpha_s, sigma_s = curve.alpha_sigma(s)
    noise = np.asarray(x_s) - alpha_s * np.asarray(x_0)
    error = sigma_s / np.sqrt(noise.size)
    assert abs(noise.mean()) < 5 * error + 1e-4
    assert abs(noise.std() - sigma_s) < 5 * error / np.sqrt(2) + 1e-3 * sigma_s + 1e-4


@given(st.sampled_from(sorted(samplers.SOLVERS)), st.integers(1, 12), st.integers(0, 9))
@settings(max_examples=12)
def test_a_chain_ends_at_the_last_estimate(name, num_steps, seed):
    x_0 = jax.random.normal(jax.random.key(seed), (2, 3, 4))
    curve = schedule.make_schedule("sqrt", 2000)
    step = samplers.SOLVERS[name](lambda *x: x_0, curve)
    times = samplers.schedule_timesteps(curve, num_steps)
    state, _ = samplers.sample(jax.random.key(1), step, jnp.ones_like(x_0), times)
    np.testing.assert_allclose(state.x_t, x_0, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state.x0_hat, x_0)


@given(st.integers(2, 40), st.integers(1, 8), st.integers(0, 99), st.floats(0.1, 9))
@settings(max_examples=15)
def test_the_clamp_is_a_nearest_projection(v, d, seed, scale):
    """It returns the nearest rows, and a second one changes nothing."""
    key, other = jax.random.split(jax.random.key(seed))
    table = scale * jax.random.normal(key, (v, d))
    x = scale * jax.random.normal(other, (2, 5, d))
    clamped = guidance.clamp(lambda *a: x, table, below=1.0)
    once = np.asarray(clamped(x, jnp.zeros(2), x))
    ids = np.asarray(rounding.nearest(table, x))
    np.testing.assert_array_equal(once, np.asarray(table)[ids])
    far = np.linalg.norm(np.asarray(x)[:, :, None] - np.asarray(table), axis=-1)
    mine = np.take_along_axis(far, ids[..., None], -1)[..., 0]
    np.testing.assert_allclose(mine, far.min(-1), rtol=1e-5, atol=1e-5 * scale)
    again = guidance.clamp(lambda *a: jnp.asarray(once), table, below=1.0)
    np.testing.assert_array_equal(again(x, jnp.zeros(2), x), once)
