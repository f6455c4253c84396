# SPDX-License-Identifier: Apache-2.0
"""Samplers: orders and laws measured where the denoiser and the answer are known.

The toy: x_0 ~ N(MEAN, SPREAD^2). Then E[x_0 | x_t], the probability-flow path and the
law of an ancestral chain are closed forms.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from scipy import stats

from dlm_jax.diffusion import samplers, schedule
from dlm_jax.diffusion.samplers import State, Times

MEAN, SPREAD = 0.8, 0.5
CURVE = schedule.make_schedule("cosine")
T200 = schedule.make_schedule("sqrt", 200)
KEY = jax.random.key(0)


def posterior_mean(noise):
    """The toy's denoiser: E[x_0 | x_t] = m + g (x_t - alpha m)."""

    def denoise(x_t, t, x0_prev):
        alpha, sigma = noise.alpha_sigma(t)
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        gain, alpha = (schedule.broadcast_to(a, x_t) for a in (gain, alpha))
        return MEAN + gain * (x_t - alpha * MEAN)

    return denoise


def true_x_0(x_0):
    return lambda x_t, t, x0_prev: jnp.broadcast_to(x_0, x_t.shape)


def path(now):
    """Times that end at a positive time: the grid's last lands on clean data."""
    return Times(np.append(now[:1], now[:-2]), now[:-1], now[1:])


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- grids


def test_grid():
    """timesteps(200) is the published "ddim200" of T = 2000; clean data follows the last."""
    times = samplers.timesteps(200)
    kept = np.arange(0, 2000, 10)
    np.testing.assert_allclose(times.now * 2000, kept[::-1], atol=1e-9)
    np.testing.assert_array_equal(times.next[:-1], times.now[1:])
    np.testing.assert_array_equal(times.prev[1:], times.now[:-1])
    assert times.prev[0] == times.now[0]
    assert times.next[-1] < 0


def test_part_of_a_grid():
    times = samplers.timesteps(5, start=0.9, stop=0.1)
    np.testing.assert_allclose(times.now, [0.9, 0.7, 0.5, 0.3, 0.1])


# --- orders


@pytest.mark.parametrize(
    ("solver", "order"), [(samplers.ddim, 1), (samplers.dpmpp_2m, 2)]
)
def test_order(solver, order):
    """Halving the step halves DDIM's error and quarters 2M's.

    On the probability-flow path (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2) stands
    still. The band of 0.1 leaves room for the error's next term, a twentieth of the
    first at 20 steps, and for float32, whose 1e-6 is 2% of 2M's error at 80 steps.
    """
    start, stop = 0.95, 0.3
    (a_0, s_0), (a_1, s_1) = (CURVE.alpha_sigma(np.array(t)) for t in (start, stop))
    shrink = np.sqrt((a_1**2 * SPREAD**2 + s_1**2) / (a_0**2 * SPREAD**2 + s_0**2))
    x_T = normal(0, 4, 8, 8)
    want = a_1 * MEAN + shrink * (x_T - a_0 * MEAN)
    step = solver(posterior_mean(CURVE), CURVE)
    errors = []
    for n in (20, 40, 80):
        times = path(np.linspace(start, stop, n + 1))
        state, _ = samplers.sample(KEY, step, x_T, times)
        errors.append(np.sqrt(np.mean((state.x_t - want) ** 2)))
    np.testing.assert_allclose(-np.diff(np.log2(errors)), order, atol=0.1)


# --- single steps


@pytest.mark.parametrize("solver", [samplers.ddim, samplers.dpmpp_2m])
@pytest.mark.parametrize("noise", [CURVE, T200], ids=["curve", "table"])
def test_true_x_0_keeps_its_noise(solver, noise):
    """With the true x_0, any number of steps lands on alpha_s x_0 + sigma_s eps."""
    x_0, eps = normal(1, 2, 3, 4), normal(2, 2, 3, 4)
    now = np.array([180, 120, 119, 20, 1]) / 200
    x_T = schedule.add_noise(x_0, jnp.full(2, now[0]), eps, noise)
    state, trace = samplers.sample(
        KEY, solver(true_x_0(x_0), noise), x_T, path(now), trace=lambda s: s.x_t
    )
    alpha, sigma = (a[:, None, None, None] for a in noise.alpha_sigma(now[1:]))
    np.testing.assert_allclose(trace, alpha * x_0 + sigma * eps, atol=1e-5)
    np.testing.assert_array_equal(state.x_t, trace[-1])


@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_last_step_is_the_estimate(solver):
    """Landing on clean data adds no noise and keeps nothing of x_t."""
    x_0 = normal(3, 2, 3, 4)
    step = samplers.SOLVERS[solver](true_x_0(x_0), T200)
    x_T = np.full((2, 3, 4), 9.0, np.float32)
    state, _ = samplers.sample(KEY, step, x_T, samplers.timesteps(3))
    np.testing.assert_allclose(state.x_t, x_0, atol=1e-6)
    np.testing.assert_array_equal(state.x0_hat, x_0)


def noise_of(keys, i, shape):
    """What step i of a chain draws for each example."""
    return samplers.standard_normal(
        jax.vmap(lambda k: jax.random.fold_in(k, i))(keys), shape
    )


def test_marginal_is_section_4_2():
    """x_next = sqrt(abar) x0_hat + sqrt(1 - abar) eps, without a trace of x_t."""
    x_0, keys = normal(4, 2, 3, 4), samplers.per_example_keys(KEY, 2)
    step = samplers.marginal(true_x_0(x_0), T200)
    x_T, times = np.full((2, 3, 4), 9.0, np.float32), path(np.array([0.9, 0.5, 0.3]))
    state, _ = samplers.sample(KEY, step, x_T, times)
    alpha, sigma = T200.alpha_sigma(np.array(0.3))
    want = alpha * x_0 + sigma * noise_of(keys, 1, (3, 4))
    np.testing.assert_allclose(state.x_t, want, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_its_equation_12(eta):
    x_t, x_0, keys = (
        normal(5, 2, 3, 4),
        normal(6, 2, 3, 4),
        samplers.per_example_keys(KEY, 2),
    )
    i = np.array([150, 140])
    (a, a_next) = np.exp(T200.log_alpha_bar_table[i])
    times = Times(*(jnp.asarray(t) for t in (0.75, 0.75, 0.70)))
    state = samplers.ddim(true_x_0(x_0), T200, eta=eta)(keys, State(x_t, x_0), times)
    sigma = eta * np.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
    eps_hat = (x_t - np.sqrt(a) * x_0) / np.sqrt(1 - a)
    want = np.sqrt(a_next) * x_0 + np.sqrt(1 - a_next - sigma**2) * eps_hat
    want = want + sigma * np.asarray(samplers.standard_normal(keys, (3, 4)))
    np.testing.assert_allclose(state.x_t, want, atol=1e-5)


def test_eta_one_is_ancestral():
    """The same noise through DDIM with eta = 1 and DDPM with the small variance."""
    x_T, denoise = normal(7, 3, 4, 2), posterior_mean(T200)
    chains = [
        samplers.sample(KEY, step, x_T, samplers.timesteps(200), trace=lambda s: s.x_t)[
            1
        ]
        for step in (
            samplers.ddim(denoise, T200, eta=1.0),
            samplers.ancestral(denoise, T200),
        )
    ]
    # 200 float32 roundings of numbers up to 3
    np.testing.assert_allclose(*chains, atol=5e-5)


# --- laws


def law_of_the_chain(noise, sigma):
    """Mean and variance of a full ancestral chain from x_T of the true law."""
    steps = noise.num_steps
    t = np.arange(steps)[::-1] / steps
    coef_0, coef_t, _ = schedule.posterior_coefficients(t, t - 1 / steps, noise)
    fresh = schedule.VARIANCES[sigma](t, t - 1 / steps, noise)
    alpha, std = noise.alpha_sigma(t)
    total = (alpha * SPREAD) ** 2 + std**2
    gain = alpha * SPREAD**2 / total
    mean, var = alpha[0] * MEAN, total[0]
    for i in range(steps):
        x0_hat = MEAN + gain[i] * (mean - alpha[i] * MEAN)
        mean = coef_0[i] * x0_hat + coef_t[i] * mean
        var = (coef_0[i] * gain[i] + coef_t[i]) ** 2 * var + fresh[i]
    return mean, var


@pytest.mark.parametrize("sigma", schedule.VARIANCES)
def test_ancestral_law(sigma):
    """Moments of 10,000 samples, to five standard errors of the chain's exact law.

    Its mean is the data's; its variance comes nearer to the data's with more steps.
    """
    mean, var = law_of_the_chain(T200, sigma)
    finer = law_of_the_chain(schedule.make_schedule("sqrt", 2000), sigma)
    np.testing.assert_allclose([mean, finer[0]], MEAN, rtol=1e-9)
    assert abs(finer[1] - SPREAD**2) < abs(var - SPREAD**2) / 2
    alpha, std = T200.alpha_sigma(np.array(199 / 200))
    n = 10000
    x_T = alpha * MEAN + np.hypot(alpha * SPREAD, std) * normal(8, 20, 50, 10)
    step = samplers.ancestral(posterior_mean(T200), T200, sigma=sigma)
    x = samplers.sample(KEY, step, x_T.astype("f"), samplers.timesteps(200))[0].x_t
    assert abs(np.mean(x) - mean) < 5 * (var / n) ** 0.5
    assert abs(np.var(x) - var) < 5 * var * (2 / n) ** 0.5


def test_top_p_noise():
    """Standard normal conditioned on |n| <= bound: never beyond it, and by KS."""
    bound, shape = 0.7, (40, 25)
    x_0, keys = np.zeros((20, *shape), np.float32), samplers.per_example_keys(KEY, 20)
    step = samplers.ancestral(true_x_0(x_0), T200, top_p=bound)
    now, after = (jnp.asarray(t) for t in (0.5, 0.495))
    found = step(keys, State(x_0, x_0), Times(now, now, after)).x_t
    _, std = samplers.posterior(x_0, x_0, now, T200, t_next=after)
    n = np.asarray(found / std).ravel()
    assert np.abs(n).max() <= bound * (1 + 1e-6)
    # 6e-7 is the two-sided tail beyond five standard errors
    assert stats.kstest(n, stats.truncnorm(-bound, bound).cdf).pvalue > 6e-7
    assert len(np.unique(n)) > 0.99 * n.size
    free = samplers.ancestral(true_x_0(x_0), T200)
    n = np.asarray(free(keys, State(x_0, x_0), Times(now, now, after)).x_t / std)
    assert stats.kstest(n.ravel(), stats.norm.cdf).pvalue > 6e-7


# --- the scan


def test_noise_is_the_examples_own():
    """An example's key decides its noise, whoever shares the batch."""
    x_T, keys = normal(9, 4, 3, 2), samplers.per_example_keys(KEY, 4)
    step = samplers.ancestral(posterior_mean(T200), T200)
    times = samplers.timesteps(20)
    together, _ = samplers.sample(KEY, step, x_T, times)
    alone, _ = samplers.sample(keys[2:3], step, x_T[2:3], times)
    np.testing.assert_allclose(alone.x_t, together.x_t[2:3], atol=1e-6)
    # no two examples, and no two steps, share their noise
    first, second = (noise_of(keys, i, (3, 2)) for i in (0, 1))
    assert len(np.unique([first, second])) == 2 * 4 * 3 * 2


def test_trace_and_feedback():
    """trace(state) of every step [n ...]; each estimate is fed to the next call."""

    def count(x_t, t, x0_prev):
        return x0_prev + 1

    def see(state):
        return {"x0": state.x0_hat, "norm": jnp.sum(state.x_t, (1, 2))}

    x_T = np.zeros((2, 3, 4), np.float32)
    step = samplers.ddim(count, T200)
    state, trace = samplers.sample(KEY, step, x_T, samplers.timesteps(7), trace=see)
    assert trace["x0"].shape == (7, 2, 3, 4)
    assert trace["norm"].shape == (7, 2)
    np.testing.assert_array_equal(trace["x0"][:, 0, 0, 0], np.arange(1, 8))
    np.testing.assert_array_equal(state.x0_hat, 7)
    assert samplers.sample(KEY, step, x_T, samplers.timesteps(2))[1] is None


def equations(jaxpr):
    inner = (i for e in jaxpr.eqns for i in jaxprs_in_params(e.params))
    return len(jaxpr.eqns) + sum(map(equations, inner))


@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_program_does_not_grow_with_the_steps(solver):
    step = samplers.SOLVERS[solver](posterior_mean(T200), T200)

    def size(n):
        def run(key, x_T):
            return samplers.sample(key, step, x_T, samplers.timesteps(n))

        return equations(jax.make_jaxpr(run)(KEY, np.zeros((1, 2, 3), "f")).jaxpr)

    assert size(20) == size(200)


# --- wrappers


def toy_chain(wrap, denoise, noise, num_steps=400, n=20_000):
    """The end of a chain from N(0, 1), one coordinate an example."""
    step = wrap(samplers.ddim(denoise, noise))
    x_T = jnp.asarray(normal(1, n, 1, 1))
    times = samplers.schedule_timesteps(noise, num_steps)
    run = jax.jit(lambda key: samplers.sample(key, step, x_T, times)[0])
    return np.asarray(run(KEY).x_t).ravel()


@pytest.mark.parametrize("rate", [0.5, 3.0])
@pytest.mark.parametrize(
    "noise", [CURVE, schedule.make_schedule("cosine", 200)], ids=["curve", "table"]
)
def test_churn_keeps_the_law(rate, noise):
    """Noise is put back and taken away again: the exact denoiser's data come out."""
    steps = noise.num_steps or 400
    wrap = lambda step: samplers.churn(step, noise, rate=rate)  # noqa: E731
    x = toy_chain(wrap, posterior_mean(noise), noise, steps)
    assert abs(x.mean() - MEAN) < 0.02
    assert abs(x.std() - SPREAD) < 0.03
    plain = toy_chain(lambda step: step, posterior_mean(noise), noise, steps)
    assert np.corrcoef(x, plain)[0, 1] < 0.95  # but not the same ones


def test_no_churn_is_the_step_itself():
    denoise = posterior_mean(CURVE)
    plain, churned = (
        toy_chain(wrap, denoise, CURVE, 20, 50)
        for wrap in (lambda s: s, lambda s: samplers.churn(s, CURVE, rate=0.0))
    )
    np.testing.assert_allclose(churned, plain, rtol=1e-5, atol=1e-5)


def test_temperature_divides_the_score():
    """(alpha x0_hat - x_t) / sigma^2 is the score; the state keeps x0_hat itself."""
    denoise, x_t = posterior_mean(CURVE), jnp.asarray(normal(2, 3, 4, 1))
    alpha, sigma = (float(a) for a in CURVE.alpha_sigma(np.asarray(0.6)))
    used = []

    def solver(denoise):
        def step(keys, state, times):
            x0_hat = denoise(state.x_t, jnp.full(3, times.now), state.x0_hat)
            used.append((alpha * x0_hat - state.x_t) / sigma**2)
            return State(state.x_t, x0_hat)

        return step

    state, times = State(x_t, x_t), Times(0.7, 0.6, 0.5)
    keys = samplers.per_example_keys(KEY, 3)
    plain = solver(denoise)(keys, state, times)
    for tau in (0.8, 1.0):
        step = samplers.temperature(solver, denoise, CURVE, tau=tau)
        after = step(keys, state, times)
        np.testing.assert_allclose(used[-1], used[0] / tau, rtol=1e-4)
        np.testing.assert_allclose(after.x0_hat, plain.x0_hat, rtol=1e-6)


def test_low_temperature_narrows_the_data():
    spreads = []
    for tau in (1.0, 0.8):
        step = samplers.temperature(
            lambda d: samplers.ddim(d, CURVE), posterior_mean(CURVE), CURVE, tau=tau
        )
        x = toy_chain(lambda s, step=step: step, posterior_mean(CURVE), CURVE)
        spreads.append(x.std())
    assert spreads[1] < 0.95 * spreads[0]


@pytest.mark.parametrize("gain", [0.0, 0.25, 1.5])
def test_flow_of_a_constant_estimate_is_exact_in_one_step(gain):
    x_t, x0 = (jnp.asarray(normal(seed, 3, 4, 1)) for seed in (2, 3))
    step = samplers.flow(lambda *_: x0, CURVE, gain=gain)
    keys, ends = samplers.per_example_keys(KEY, 3), []
    for parts in (1, 7):
        times, state = np.linspace(0.9, 0.2, parts + 1), State(x_t, x0)
        for now, after in itertools.pairwise(times):
            state = step(keys, state, Times(now, now, after))
        ends.append(state.x_t)
    np.testing.assert_allclose(*ends, rtol=1e-4, atol=1e-5)
    last = step(keys, State(x_t, x0), Times(0.2, 0.1, -1.0))
    np.testing.assert_allclose(last.x_t, x0, rtol=1e-6)


def test_flow_follows_the_score_times_its_gain():
    """Its short steps are DDIM's with the score divided by tau, and tau 1 is DDIM."""
    denoise, x_t = posterior_mean(CURVE), jnp.asarray(normal(2, 3, 4, 1))
    keys, state = samplers.per_example_keys(KEY, 3), State(x_t, x_t)
    for tau, after in ((1.0, 0.3), (0.7, 0.5999)):
        times = Times(0.6, 0.6, after)
        wanted = samplers.temperature(
            lambda d: samplers.ddim(d, CURVE), denoise, CURVE, tau=tau
        )(keys, state, times)
        made = samplers.flow(denoise, CURVE, gain=1 / tau - 1)(keys, state, times)
        np.testing.assert_allclose(made.x_t, wanted.x_t, rtol=1e-5, atol=1e-6)
        assert np.abs(made.x_t - x_t).max() > 1e-5


def test_asymmetric_times():
    times = samplers.timesteps(4)
    moved = samplers.shift_timesteps(times, 0.5)
    np.testing.assert_array_equal(moved.now, times.now)
    np.testing.assert_allclose(moved.next, [0.375, 0.125, 0.0, -1.0])
    np.testing.assert_array_equal(samplers.shift_timesteps(times, 0.0).next, times.next)
