# SPDX-License-Identifier: Apache-2.0
"""Schedules: the published tables, float32 beside float64, and q in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dlm_jax.diffusion import schedule
from dlm_jax.diffusion.schedule import SCHEDULES
from dlm_jax.errors import UserError

DISCRETE_ONLY = ("linear", "trunc_lin", "pw_lin")
CURVES = [name for name in SCHEDULES if name not in DISCRETE_ONLY]
TABLES = {name: schedule.discretize(make(), 2000) for name, make in SCHEDULES.items()}

# docs/method.md, section 1.4, to more digits: beta at 0, 1, T/2, T-2, T-1; alpha_bar at 0, T/2, T-2, T-1; sigma_0;
# the published modules' float64 values to nine digits
PUBLISHED = """
sqrt 2000 .0146413105 .00888908777 .00120697593 .555611135 .999
 .985358689 .295423315 2.02040408e-4 2.02040408e-7 .121001283
sqrt 200 .0620346306 .0313212571 .0120427494 .505672257 .999
 .937965369 .292218307 .00247778649 2.47778649e-6 .249067522
linear 2000 5e-5 5.49774887e-5 .00502748874 .00999502251 .01
 .99995 .0784295031 4.21773441e-5 4.17555706e-5 .00707106781
cosine 2000 2.00351334e-5 2.12495172e-5 .00157786296 .749999848 .999
 .999979965 .493064373 6.07192095e-7 6.07192095e-10 .00447606226
trunc_cos 2000 .0202535132 2.05814109e-4 .00164545264 .555555178 .749999873
 .979746487 .428842581 2.03917308e-6 5.09793529e-7 .142314838
trunc_lin 2000 .01005 .0100549775 .0150274887 .0199950225 .02
 .98995 3.26680644e-6 7.16955739e-14 7.02616624e-14 .100249688
pw_lin 2000 .01005 .00893888889 .00500248869 .00999499749 .01
 .98995 .0774304576 4.21663355e-5 4.17446721e-5 .100249688
"""
ROWS = [r.split() for r in PUBLISHED.strip().replace("\n ", " ").split("\n")]
NINE_DIGITS = 5e-9  # half a unit of the ninth digit, relative, at its worst


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}{row[1]}")
def test_published_table(row):
    name, steps, values = row[0], int(row[1]), [float(x) for x in row[2:]]
    betas = schedule.betas(SCHEDULES[name](), steps)
    table = schedule.discretize(SCHEDULES[name](), steps)
    alpha_bar = table.alpha_bar(np.arange(steps) / steps)
    mine = [*betas[[0, 1, steps // 2, -2, -1]], *alpha_bar[[0, steps // 2, -2, -1]]]
    assert betas.dtype == alpha_bar.dtype == np.float64
    np.testing.assert_allclose([*mine, table.sigma_0], values, rtol=NINE_DIGITS)


def test_published_coefficients():
    """The published posterior coefficients (docs/method.md, section 1.6), sqrt."""
    table = TABLES["sqrt"]
    t = np.array([0, 1, 2, 1000, 1998, 1999]) / 2000
    coef_0, coef_t, var = schedule.posterior_coefficients(t, t - 1 / 2000, table)
    want = [1, 0.377080318, 0.230504634, 9.31654689e-4, 0.0118493964, 0.0141998807]
    np.testing.assert_allclose(coef_0, want, rtol=NINE_DIGITS)
    want = [0, 0.62290322, 0.769474372, 0.998889949, 0.666456553, 0.0316163939]
    np.testing.assert_allclose(coef_t, want, rtol=NINE_DIGITS)
    want = [0, 0.00556181631, 0.00545810469, 0.00120636437, 0.555470755, 0.998798363]
    np.testing.assert_allclose(var, want, rtol=NINE_DIGITS)
    log = np.log(schedule.clipped_variance(t, table))
    want = [-5.19183055] * 2 + [-5.21065368, -6.7201441, -0.587939318, -0.00120235911]
    np.testing.assert_allclose(log, want, rtol=NINE_DIGITS)


def test_coarse_table_is_every_tenth_of_the_fine():
    """docs/method.md, section 5.6: abar200 = abar2000[9::10], but for the clipped last."""
    fine, coarse = TABLES["sqrt"], schedule.make_schedule("sqrt", 200)
    np.testing.assert_allclose(
        coarse.log_alpha_bar_table[:-1],
        fine.log_alpha_bar_table[9::10][:-1],
        rtol=1e-12,
    )
    assert coarse.log_alpha_bar_table[-1] > fine.log_alpha_bar_table[-1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_float32_beta_agrees_with_float64(name):
    """Differences of float32 log alpha_bar would lose four digits at T = 2000."""
    table = TABLES[name]
    host = np.arange(2000) / 2000
    want = table.beta(host, host - 1 / 2000)
    # float64 logs sum to |log| of 20 at most: 1e-15 of it, beside betas from 2e-5 on
    betas = schedule.betas(SCHEDULES[name](), 2000)
    np.testing.assert_allclose(want, betas, rtol=1e-9)
    t = jnp.asarray(host, jnp.float32)
    beta = table.beta(t, t - 1 / 2000)
    assert beta.dtype == jnp.float32
    np.testing.assert_allclose(beta, want, rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_clean_data_lies_below_zero(name):
    kinds = [TABLES[name], SCHEDULES[name]()][: 1 + (name in CURVES)]
    for noise in kinds:
        for t in (np.array([-1.0, -1e-3]), jnp.array([-1.0, -1e-3])):
            np.testing.assert_array_equal(noise.alpha_bar(t), 1.0)
            np.testing.assert_array_equal(noise.alpha_sigma(t)[1], 0.0)
            np.testing.assert_array_equal(noise.log_snr(t), np.inf)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_grows(name):
    t = np.arange(2000) / 2000
    alpha, sigma = TABLES[name].alpha_sigma(t)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
    assert np.all(np.diff(TABLES[name].log_snr(t)) < 0)
    np.testing.assert_allclose(TABLES[name].sigma_0, sigma[0], rtol=1e-12)


@pytest.mark.parametrize("name", DISCRETE_ONLY)
def test_some_exist_only_discretised(name):
    noise, t, x = SCHEDULES[name](), np.zeros(1), np.zeros((1, 1, 1))
    for use in (
        lambda: noise.alpha_bar(t),
        lambda: noise.log_snr(t),
        lambda: noise.sigma_0,
        lambda: schedule.add_noise(x, t, x, noise),
    ):
        with pytest.raises(UserError, match="discretize"):
            use()
    assert np.isfinite(schedule.discretize(noise, 200).log_snr(t)).all()


def test_curve_and_table():
    """trunc_cos is not normalised: its table holds the curve at i / T."""
    curve, t = SCHEDULES["trunc_cos"](), np.arange(2000) / 2000
    want = TABLES["trunc_cos"].log_alpha_bar(t)
    # but for the last, where the curve keeps off its infinite end
    np.testing.assert_allclose(curve.log_alpha_bar(t)[:-1], want[:-1], rtol=1e-9)
    assert (curve.num_steps, TABLES["trunc_cos"].num_steps) == (None, 2000)
    # the normalised ones hold f((i + 1) / T) / f(0), up to the clip of the last beta
    for name in ("sqrt", "cosine"):
        log = SCHEDULES[name]().log_alpha_bar(t)
        want = TABLES[name].log_alpha_bar(t[:-2])
        np.testing.assert_allclose(log[1:-1] - log[0], want, rtol=1e-9)


def test_time_stands_for_its_nearest_index():
    table, t = TABLES["sqrt"], np.array([0.4, 0.6, 1999.4, 5000]) / 2000
    want = np.exp(table.log_alpha_bar_table[[0, 1, 1999, 1999]])
    np.testing.assert_allclose(table.alpha_bar(t), want, rtol=1e-12)


def test_unknown_names():
    with pytest.raises(UserError, match=r"config.schedule.name='sqrd'.*sqrt"):
        schedule.make_schedule("sqrd")
    with pytest.raises(UserError, match="logistic"):
        schedule.make_schedule("sqrt", scale=1.0)
    with pytest.raises(UserError, match="discretize"):
        schedule.require_num_steps(schedule.make_schedule("sqrt"))


@pytest.mark.parametrize("name", CURVES)
def test_float32_curve_keeps_both_ends(name):
    """Neither sigma near clean data nor alpha near noise is a difference of ones."""
    t = np.array([0, 1e-3, 0.01, 0.1, 0.5, 0.9], np.float32)
    curve = SCHEDULES[name]()
    for found, want in zip(
        curve.alpha_sigma(jnp.asarray(t)),
        curve.alpha_sigma(t.astype(float)),
        strict=True,
    ):
        np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize("name", CURVES)
def test_curve_is_a_jit_argument(name):
    """A curve's parameters are leaves: one compilation serves all of them."""
    curve, t = SCHEDULES[name](), np.linspace(0, 0.99, 9)
    alpha_bar = jax.jit(lambda noise, t: noise.alpha_bar(t))(curve, jnp.asarray(t))
    np.testing.assert_allclose(alpha_bar, curve.alpha_bar(t), atol=5e-7)


def test_gradient_reaches_the_parameters():
    """A learned schedule: d log SNR / d mean = -1 for a location."""
    grad = jax.grad(lambda noise: noise.log_snr(jnp.array([0.3]))[0], allow_int=True)
    found = grad(SCHEDULES["logistic"]()).curve.keywords
    np.testing.assert_allclose(found["mean"], -1, rtol=1e-5)
    np.testing.assert_allclose(found["scale"], -np.log(0.3 / 0.7), rtol=1e-5)


def test_schedule_is_a_pytree():
    for noise in (TABLES["sqrt"], SCHEDULES["cosine"]()):
        leaves, kind = jax.tree.flatten(noise)
        again, t = jax.tree.unflatten(kind, leaves), np.linspace(0, 0.9, 5)
        np.testing.assert_array_equal(again.alpha_bar(t), noise.alpha_bar(t))


@pytest.mark.parametrize(
    ("name", "law"), [("logistic", stats.logistic), ("gumbel", stats.gumbel_r)]
)
def test_quantile_schedules(name, law):
    """Uniform t makes log(1/SNR) follow the law of that name."""
    t = np.linspace(0.001, 0.999, 97)
    for noise, (mean, scale) in (
        (schedule.make_schedule(name, mean=-1.0, scale=0.7), (-1.0, 0.7)),
        (
            schedule.make_schedule(name),
            {"logistic": (2.0, 1.2), "gumbel": (4.723, 0.852)}[name],
        ),
    ):
        want = law.ppf(t, loc=mean, scale=scale)
        np.testing.assert_allclose(-noise.log_snr(t), want, atol=1e-9)
        device = -noise.log_snr(jnp.asarray(t, jnp.float32))
        # t itself is rounded: near 1 the quantile's slope is scale / (1 - t)
        np.testing.assert_allclose(device, want, atol=2e-3 * scale)
        assert np.isfinite(noise.log_snr(np.array([0.0, 1.0]))).all()


def test_add_noise_moments():
    """Mean alpha x_0 and variance sigma^2, to five standard errors, token by token."""
    count, noise = 4000, SCHEDULES["cosine"]()
    x_0 = np.tile(np.float32([[1.5, -2.0], [0.3, 4.0]]), (count, 1, 1))
    t = np.tile(np.float32([0.2, 0.8]), (count, 1))
    eps = np.random.default_rng(0).normal(size=x_0.shape).astype(np.float32)
    x_t = np.asarray(schedule.add_noise(x_0, t, eps, noise))
    alpha, sigma = (a[0, :, None] for a in noise.alpha_sigma(np.array([[0.2, 0.8]])))
    mean, var = np.asarray(x_t.mean(0)), np.asarray(x_t.var(0))
    assert np.all(np.abs(mean - alpha * x_0[0]) < 5 * sigma / count**0.5)
    assert np.all(np.abs(var - sigma**2) < 5 * sigma**2 * (2 / count) ** 0.5)


def test_time_per_token():
    """[b l] with equal columns is [b]."""
    x, eps = np.ones((2, 3, 1), np.float32), np.full((2, 3, 1), 2.0, np.float32)
    t, noise = np.array([0.1, 0.7]), SCHEDULES["sqrt"]()
    one = schedule.add_noise(x, t, eps, noise)
    many = schedule.add_noise(x, np.tile(t[:, None], 3), eps, noise)
    np.testing.assert_array_equal(one, many)


@pytest.mark.parametrize("gap", [1, 10])
def test_posterior_is_bayes(gap):
    """N(x_s; alpha_s x_0, sigma_s^2) N(x_t; sqrt(1-beta) x_s, beta), normalised."""
    table = TABLES["sqrt"]
    i = np.array([gap, 500, 1999])
    t, s = i / 2000, (i - gap) / 2000
    x_0, x_t = (np.full((3, 1, 1), v, np.float32) for v in (0.7, -1.3))
    beta = table.beta(t, s)
    alpha_s, sigma_s = table.alpha_sigma(s)
    precision = sigma_s**-2 + (1 - beta) / beta
    want = (alpha_s * 0.7 / sigma_s**2 + (1 - beta) ** 0.5 * -1.3 / beta) / precision
    for time in (np.asarray, lambda t: jnp.asarray(t, jnp.float32)):
        mean, std = schedule.posterior(x_0, x_t, time(t), table, t_next=time(s))
        np.testing.assert_allclose(mean[:, 0, 0], want, rtol=1e-5)
        np.testing.assert_allclose(std, precision**-0.5, rtol=1e-5)
    large = schedule.posterior(x_0, x_t, t, table, t_next=s, sigma="large")[1]
    np.testing.assert_allclose(large, beta**0.5, rtol=1e-6)


def test_posterior_of_the_last_step():
    """Reaching clean data is x0_hat itself, without noise."""
    x_0, x_t = np.ones((1, 1, 1), np.float32), np.full((1, 1, 1), 5.0, np.float32)
    for sigma in schedule.VARIANCES:
        mean, std = schedule.posterior(
            x_0, x_t, np.zeros(1), TABLES["sqrt"], sigma=sigma
        )
        np.testing.assert_array_equal(mean, x_0)
        np.testing.assert_array_equal(std, 0)


@pytest.mark.parametrize("name", ["sqrt", "cosine", "linear"])
def test_noise_factor_divides_the_signal(name):
    """SNR' = SNR / F^2, on the curve and on the table (arXiv:2212.09412)."""
    plain, scaled = (
        schedule.make_schedule(name, 1000, noise_factor=f) for f in (1.0, 3.0)
    )
    t = np.arange(0, 990, 30) / 1000  # the last betas are clipped
    expected = plain.log_snr(t) - 2 * np.log(3.0)
    np.testing.assert_allclose(scaled.log_snr(t), expected, atol=1e-9)
    if plain.curve is not None:
        curve, scaled = (
            schedule.make_schedule(name, noise_factor=f) for f in (1.0, 3.0)
        )
        expected = curve.log_snr(t) - 2 * np.log(3.0)
        np.testing.assert_allclose(scaled.log_snr(t), expected, atol=1e-9)


def test_quantiles_between_knots():
    noise = schedule.from_quantiles(
        np.array([0.0, 0.5, 1.0]), np.array([-4.0, 0.0, 2.0])
    )
    t = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(noise.log_snr(t), [4.0, 2.0, 0.0, -1.0, -2.0])
    np.testing.assert_allclose(
        noise.log_snr(jnp.asarray(t)), noise.log_snr(t), atol=1e-5
    )
    table = schedule.discretize(noise, 40)
    np.testing.assert_allclose(table.log_snr(t[:-1]), noise.log_snr(t[:-1]), atol=1e-9)


@pytest.mark.parametrize("options", [{"noise_factor": 0.0}, {"adaptive": "warp"}])
def test_bad_options(options):
    with pytest.raises(UserError):
        schedule.make_schedule("sqrt", **options)
