# SPDX-License-Identifier: Apache-2.0
"""Losses: every objective in closed form for a known estimate; draws; the bound."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion import losses, model, schedule, time_sampling
from dlm_jax.diffusion.embedding import unit_rows
from dlm_jax.diffusion.losses import PAD
from dlm_jax.diffusion.model import Params
from dlm_jax.errors import UserError
from dlm_jax.nn import transformer
from dlm_jax.nn.transformer import DenoiserConfig

T20 = schedule.make_schedule("sqrt", 20)
CURVE = schedule.make_schedule("cosine")
TINY = DenoiserConfig(
    dim=4, hidden_dim=8, layers=1, heads=2, mlp_dim=8, positions=4, time_dim=4
)
IDS = np.array([[0, 5, 2], [4, 1, PAD], [2, PAD, PAD]])
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(6, 4)).astype(np.float32)
PARAMS = Params(TABLE, RNG.normal(size=6).astype(np.float32), {"w": jnp.ones(())})
EPS_0, EPS_T = RNG.normal(size=(2, 3, 3, 4)).astype(np.float32)
T = np.array([0, 1, 12], np.float32) / 20
CLEAN = TABLE[IDS]
RAW = RNG.normal(size=(3, 3, 6)).astype(np.float32)
X_0 = CLEAN + np.float32(T20.sigma_0) * EPS_0


@pytest.fixture
def network(monkeypatch):
    """Puts a function of (weights, x_t, t, x0_prev) in the network's place."""

    def put(function):
        def apply(weights, cfg, vocab, x_t, t, x0_prev, **more):
            return jnp.asarray(function(weights, x_t, t, x0_prev))

        monkeypatch.setattr(transformer, "apply", apply)
        monkeypatch.setattr(transformer, "head", lambda params, y: y)

    return put


def run(objective="x0", *, params=PARAMS, ids=IDS, noise=T20, draws=None, **options):
    """end_to_end; what DenoiserConfig knows goes there."""
    fields = {k: options.pop(k) for k in ("predicts", "self_cond") if k in options}
    draws = time_sampling.NoiseDraws(T, EPS_0, EPS_T) if draws is None else draws
    cfg = DenoiserConfig(dim=draws.eps_t.shape[-1], **fields)
    return losses.end_to_end(
        params, ids, draws, cfg=cfg, schedule=noise, objective=objective, **options
    )


draw = jax.jit(
    time_sampling.draw_noise,
    static_argnums=1,
    static_argnames=("total", "time_sampler", "num_steps", "self_cond_prob"),
)


# --- terms


@pytest.mark.parametrize("objective", ["x0", "eps", "mu", "vlb", "vlb_legacy"])
def test_perfect_estimate(network, objective):
    """No diffusion term for the true x_0, and none of the t = 0 term but at index 0."""
    network(lambda weights, x_t, t, x0_prev: X_0)
    terms = run(objective)
    # float32 round-off of 1e-6, squared and weighed by up to 1/variance
    np.testing.assert_allclose(terms.diffusion, 0, atol=1e-6)
    np.testing.assert_array_equal(terms.t0[1:], 0)
    assert terms.t0[0] > 0
    if objective in ("x0", "eps", "mu"):
        want = T20.sigma_0**2 * np.mean(EPS_0[0] ** 2)  # |EMB - x_0|^2
        np.testing.assert_allclose(terms.t0[0], want, rtol=1e-4)


@pytest.mark.parametrize("objective", ["x0", "eps", "mu", "vlb", "vlb_legacy"])
def test_constant_error(network, objective):
    """x0_hat = x_0 + c costs c^2 times the square of its coefficient in the target."""
    error = 0.5
    network(lambda weights, x_t, t, x0_prev: X_0 + error)
    terms = run(objective)
    host = np.array([1, 12]) / 20
    alpha, sigma = T20.alpha_sigma(host)
    coef, _, var = schedule.posterior_coefficients(host, host - 1 / 20, T20)
    weight = {
        "x0": np.ones(2),
        "eps": (alpha / sigma) ** 2,
        "mu": coef**2,
        "vlb": 20 * 4 * coef**2 / (2 * var),
        "vlb_legacy": 20 / np.log(2) * coef**2 / (2 * var),
    }
    np.testing.assert_array_equal(terms.diffusion[0], 0)
    np.testing.assert_allclose(
        terms.diffusion[1:], error**2 * weight[objective], rtol=1e-4
    )


def test_true_noise(network):
    """A network of eps: its own error is the diffusion term, nothing is converted."""
    network(lambda weights, x_t, t, x0_prev: EPS_T + 0.25)
    terms = run("eps", predicts="eps")
    np.testing.assert_allclose(terms.diffusion, [0, 0.25**2, 0.25**2], rtol=1e-5)
    alpha, sigma = T20.alpha_sigma(np.zeros(1))
    want = np.mean((X_0[0] - 0.25 * sigma / alpha - CLEAN[0]) ** 2)
    np.testing.assert_allclose(terms.t0, [want, 0, 0], rtol=1e-5)


def test_rounding_and_prior(network):
    """Cross-entropy of the noisy true x_0; the published mean((alpha_T x_0)^2)."""
    network(lambda weights, x_t, t, x0_prev: X_0)
    terms = run()
    scores = X_0 @ TABLE.T + PARAMS.bias
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_p, IDS[..., None], -1).mean((1, 2))
    np.testing.assert_allclose(terms.rounding, want, rtol=1e-5)
    want = np.exp(T20.log_alpha_bar_table[-1]) * np.mean(X_0**2, (1, 2))
    np.testing.assert_allclose(terms.prior, want, rtol=1e-5)


def test_prior_of_the_bounds(network):
    """KL(q(x_T | x_0) || N(0, 1)): summed over d in nats, or T / ln 2 times its mean."""
    network(lambda weights, x_t, t, x0_prev: X_0)
    alpha, sigma = T20.alpha_sigma(np.array(19 / 20))
    kl = 0.5 * (sigma**2 - 1 - np.log(sigma**2) + (alpha * X_0) ** 2).mean((1, 2))
    np.testing.assert_allclose(run("vlb").prior, 4 * kl, rtol=1e-4)
    found = run("vlb_legacy").prior
    np.testing.assert_allclose(found, 20 / np.log(2) * kl, rtol=1e-4)


def test_total_is_the_weighted_sum(network):
    network(lambda weights, x_t, t, x0_prev: 0 * x_t)
    weight = np.array([0.5, 1.0, 3.0], np.float32)
    for objective in ("x0", "eps", "mu", "vlb_legacy"):
        terms = run(objective, draws=time_sampling.NoiseDraws(T, EPS_0, EPS_T, weight))
        sum_ = terms.diffusion + terms.t0 + terms.rounding + terms.prior
        np.testing.assert_allclose(terms.total(), weight * sum_, rtol=1e-6)
        plain = run(objective)
        np.testing.assert_array_equal(plain.weight, 1)
        np.testing.assert_allclose(terms.total(), weight * plain.total(), rtol=1e-6)


def test_bound_weighs_only_what_depends_on_time(network):
    network(lambda weights, x_t, t, x0_prev: 0 * x_t)
    weight = np.array([0.5, 1.0, 3.0], np.float32)
    terms, plain = (
        run("vlb", draws=time_sampling.NoiseDraws(T, EPS_0, EPS_T, weight)),
        run("vlb"),
    )
    want = weight * (plain.diffusion + plain.t0) + plain.rounding + plain.prior
    np.testing.assert_allclose(terms.total(), want, rtol=1e-6)


def test_curve_has_no_index_zero(network):
    network(lambda weights, x_t, t, x0_prev: CLEAN)
    terms = run(noise=CURVE)
    np.testing.assert_array_equal(terms.t0, 0)
    want = CURVE.sigma_0**2 * np.mean(EPS_0**2, (1, 2))
    np.testing.assert_allclose(terms.diffusion, want, rtol=1e-4)


def test_time_per_token(network):
    """A text with tokens at index 0 has both terms, each a part of the mean."""
    network(lambda weights, x_t, t, x0_prev: X_0 + 0.5)
    rows = np.tile(T[:, None], 3)
    one, many = run(), run(draws=time_sampling.NoiseDraws(rows, EPS_0, EPS_T))
    for name in ("diffusion", "t0"):
        np.testing.assert_allclose(getattr(many, name), getattr(one, name), rtol=1e-5)
    rows[1] = [0, 0.1, 0]
    mixed = run(draws=time_sampling.NoiseDraws(rows, EPS_0, EPS_T))
    np.testing.assert_allclose(mixed.diffusion[1], 0.25 / 3, rtol=1e-4)
    off = (X_0[1] + 0.5 - CLEAN[1])[[0, 2]]
    np.testing.assert_allclose(mixed.t0[1], np.mean(off**2) * 2 / 3, rtol=1e-4)


@pytest.mark.parametrize("objective", ["x0", "eps", "mu", "vlb", "vlb_legacy", "ce"])
def test_masked_pads_do_not_matter(network, objective):
    """Noise at PAD changes nothing; the mean is over the other positions."""
    predicts = "logits" if objective == "ce" else "x0"
    head = TABLE.T if objective == "ce" else np.eye(4, dtype=np.float32)
    network(lambda weights, x_t, t, x0_prev: 0.5 * x_t @ head)
    pads = np.where(IDS == PAD, 1, 0)[..., None].astype(np.float32)
    moved = time_sampling.NoiseDraws(T, EPS_0 + 9 * pads, EPS_T - 9 * pads)
    options = {"mask_pad": True, "predicts": predicts}
    masked, other = run(objective, **options), run(objective, draws=moved, **options)
    np.testing.assert_allclose(masked.total(), other.total(), rtol=1e-6)
    plain = run(objective, predicts=predicts)
    np.testing.assert_allclose(masked.total()[0], plain.total()[0], rtol=1e-5)
    assert np.all(np.abs(masked.total() - plain.total())[1:] > 1e-4)
    # one position left: its own loss
    alone = time_sampling.NoiseDraws(T[2:], EPS_0[2:, :1], EPS_T[2:, :1])
    want = run(objective, ids=IDS[2:, :1], draws=alone, predicts=predicts)
    np.testing.assert_allclose(masked.total()[2], want.total()[0], rtol=1e-5)


def test_nothing_but_pads(network):
    network(lambda weights, x_t, t, x0_prev: x_t)
    terms = run(ids=np.full((3, 3), PAD), mask_pad=True)
    np.testing.assert_array_equal(terms.total(), 0)


def test_ce_is_cross_entropy(network):
    """Of the network's logits, on x_t = alpha EMB + sigma eps: no x_0 noise."""
    seen = {}

    def scores(weights, x_t, t, x0_prev):
        return seen.setdefault("x_t", x_t) @ TABLE.T

    network(scores)
    terms = run("ce", predicts="logits", noise=CURVE)
    alpha, sigma = (a[:, None, None] for a in CURVE.alpha_sigma(T.astype(float)))
    np.testing.assert_allclose(seen["x_t"], alpha * CLEAN + sigma * EPS_T, atol=1e-5)
    raw = np.asarray(seen["x_t"]) @ TABLE.T
    log_p = raw - np.log(np.exp(raw).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_p, IDS[..., None], -1).mean((1, 2))
    np.testing.assert_allclose(terms.total(), want, rtol=1e-5)


def test_known_tokens_are_given_and_not_asked(network):
    """Clean, at time 0; what is known and what is open add up to the whole."""
    seen = []

    def scores(weights, x_t, t, x0_prev):
        seen.append((x_t, t))
        return RAW

    network(scores)
    known = np.array([[True, False, False], [False, False, False], [True, True, True]])
    plain = time_sampling.NoiseDraws(T, EPS_0, EPS_T)
    whole, some, rest = (
        run("ce", predicts="logits", noise=CURVE, draws=plain._replace(known=k)).total()
        for k in (None, known, ~known)
    )
    np.testing.assert_allclose(some + rest, whole, rtol=1e-6)
    assert some[2] == 0
    assert some[0] < whole[0]
    assert some[1] == whole[1]
    (noisy, _), (given, times) = seen[:2]
    np.testing.assert_array_equal(given, np.where(known[..., None], CLEAN, noisy))
    np.testing.assert_array_equal(times, np.where(known, 0, T[:, None]))


def test_what_is_known():
    """A share of the rows; prefixes, gaps and single tokens; by the row's number."""
    first, rest, shared = (
        time_sampling.draw_noise(
            jax.random.key(0), (b, 12, 1), first=i, total=2000, conditioning_prob=0.8
        ).known
        for i, b in ((0, 1500), (1500, 500), (0, 2000))
    )
    np.testing.assert_array_equal(np.concatenate([first, rest]), shared)
    some = shared[shared.any(-1)]
    assert 0.7 < len(some) / len(shared) < 0.8  # and a few of which nothing is known
    steps = np.abs(np.diff(some.astype(int), axis=-1)).sum(-1)
    prefix = (steps == 1) & some[:, 0]
    gap = (steps == 2) & some[:, 0] & some[:, -1]
    for share in (prefix, gap, steps > 2):
        assert share.mean() > 0.08
    assert time_sampling.draw_noise(jax.random.key(0), (4, 12, 1)).known is None


def test_normalize_is_the_loss_of_the_unit_table(network):
    network(lambda weights, x_t, t, x0_prev: 0.5 * x_t)
    unit = PARAMS._replace(table=unit_rows(jnp.asarray(TABLE)))
    want = run(params=unit).total()
    np.testing.assert_allclose(run(normalize=True).total(), want, rtol=1e-6)


def test_misfits():
    for objective, predicts, noise, message in (
        ("l2", "x0", T20, "choose one of"),
        ("ce", "x0", T20, "predicts 'logits'"),
        ("vlb", "x0", CURVE, "num_steps > 0"),
        ("mu", "x0", CURVE, "num_steps > 0"),
    ):
        with pytest.raises(UserError, match=message):
            run(objective, predicts=predicts, noise=noise)


# --- gradients


def test_gradient_reaches_all():
    """Rounding teaches table and bias, diffusion table and denoiser, prior the table."""
    shapes = jax.eval_shape(lambda key: model.init(key, TINY, 6), jax.random.key(0))
    params = jax.tree.map(lambda p: RNG.normal(size=p.shape).astype("f"), shapes)
    draws = time_sampling.NoiseDraws(
        jnp.asarray(T), jnp.asarray(EPS_0), jnp.asarray(EPS_T)
    )

    def parts(params):
        terms = losses.end_to_end(
            params, IDS, draws, cfg=TINY, schedule=T20, objective="x0"
        )
        kinds = (terms.diffusion + terms.t0, terms.rounding, terms.prior)
        return jnp.stack([kind.mean() for kind in kinds])

    grads = jax.jit(jax.jacrev(parts))(params)
    reached = jax.tree.map(lambda g: [bool(row.any()) for row in g], grads)
    assert reached.table == [True, True, True]
    assert reached.bias == [False, True, False]
    is_row = lambda x: isinstance(x, list)  # noqa: E731
    for row in jax.tree.leaves(reached.denoiser, is_leaf=is_row):
        assert row == [True, False, False]


def test_first_estimate_is_a_constant(network):
    """raw = w x_t + w x0_prev: the gradient is that of a fixed first estimate."""
    network(lambda weights, x_t, t, x0_prev: weights["w"] * (x_t + x0_prev))
    feed = np.array([1, 1, 0], np.float32)
    draws = time_sampling.NoiseDraws(T, EPS_0, EPS_T, None, feed)
    x_t = np.asarray(schedule.add_noise(X_0, T, EPS_T, T20))
    first = x_t * feed[:, None, None]  # at w = 1, without feedback

    def loss(w, table):
        params = PARAMS._replace(table=table, denoiser={"w": w})
        return run(params=params, draws=draws, self_cond=True).diffusion.sum()

    def by_hand(w, table):
        x_0 = table[IDS] + T20.sigma_0 * EPS_0
        x_t = schedule.add_noise(x_0, T, EPS_T, T20)
        return jnp.mean((x_0 - w * (x_t + first)) ** 2, (1, 2))[1:].sum()

    found = jax.value_and_grad(loss, argnums=(0, 1))(1.0, jnp.asarray(TABLE))
    want = jax.value_and_grad(by_hand, argnums=(0, 1))(1.0, jnp.asarray(TABLE))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, want)


def test_no_feedback(network):
    """Zeros are fed where the draw says so, and to a network without the input."""
    seen = []
    network(lambda weights, x_t, t, x0_prev: seen.append(x0_prev) or x_t)
    off = time_sampling.NoiseDraws(T, EPS_0, EPS_T, None, np.zeros(3, np.float32))
    on = off._replace(self_cond=np.ones(3, np.float32))
    run(draws=off, self_cond=True)
    run(draws=on, self_cond=False)
    run(self_cond=True)
    for x0_prev in (seen[-1], seen[-2]):
        np.testing.assert_array_equal(x0_prev, 0)


# --- draws

WIDE = (20000, 1, 2)


def rows(first, b, seed=1):
    return draw(
        jax.random.key(seed),
        (b, 3, 2),
        first=first,
        total=8,
        num_steps=20,
        self_cond_prob=0.5,
    )


def test_draws_know_only_the_global_row():
    """Eight rows at once are four and four: hosts and devices do not matter."""
    whole = rows(0, 8)
    halves = jax.tree.map(lambda a, b: np.concatenate([a, b]), rows(0, 4), rows(4, 4))
    jax.tree.map(np.testing.assert_array_equal, whole, halves)
    index = np.asarray(whole.t) * 20
    np.testing.assert_allclose(index, index.round(), atol=1e-5)
    assert np.all((index > -0.5) & (index < 19.5))
    assert whole.weight is None


@pytest.mark.parametrize("times", time_sampling.TIME_SAMPLERS)
def test_times_know_only_the_global_row(times):
    key, index = jax.random.key(1), jnp.arange(8)
    halves = [
        time_sampling.TIME_SAMPLERS[times](key, part, 8) for part in jnp.split(index, 2)
    ]
    whole = time_sampling.TIME_SAMPLERS[times](key, index, 8)
    np.testing.assert_array_equal(whole, jnp.concatenate(halves))


def test_noise_and_feedback():
    """Independent standard normals; the whole batch is fed back, or nothing of it."""
    n = 400
    draws = jax.tree.map(lambda *x: np.stack(x), *(rows(0, 8, i) for i in range(n)))
    eps = np.stack([draws.eps_0, draws.eps_t]).reshape(2, -1)
    size = eps.shape[1]
    assert np.all(np.abs(eps.mean(1)) < 5 / size**0.5)
    assert np.all(np.abs(eps.var(1) - 1) < 5 * (2 / size) ** 0.5)
    assert abs(np.mean(eps[0] * eps[1])) < 5 / size**0.5
    feed = draws.self_cond
    np.testing.assert_array_equal(feed, feed[:, :1] * np.ones(8))
    assert abs(feed[:, 0].mean() - 0.5) < 5 * 0.5 / n**0.5


def test_low_discrepancy_is_even():
    """One time in every n-th part of [0, 1), so each of n indices exactly once."""
    for seed in range(5):
        t = draw(jax.random.key(seed), (20, 1, 1), time_sampler="low_discrepancy").t
        np.testing.assert_allclose(np.diff(np.sort(t)), 0.05, atol=1e-6)
        assert 0 <= min(t) < 0.05


def test_antithetic_pairs():
    t = np.asarray(draw(jax.random.key(3), WIDE, time_sampler="antithetic").t)
    np.testing.assert_allclose(t[::2] + t[1::2], 1, rtol=1e-6)
    even = t[::2]  # each a half of its pair, uniform
    assert abs(even.mean() - 0.5) < 5 * (1 / 12 / even.size) ** 0.5
    assert abs(even.var() - 1 / 12) < 5 * (1 / 180 / even.size) ** 0.5


def test_indices_are_uniform():
    """Binomial counts, each to five standard errors."""
    n = WIDE[0]
    t = np.asarray(draw(jax.random.key(4), WIDE, num_steps=20).t)
    count = np.bincount(np.round(t * 20).astype(int), minlength=20)
    assert np.all(np.abs(count - n / 20) < 5 * (n * 0.05 * 0.95) ** 0.5)


# --- importance sampling


def full_moments(num_steps=20, seed=6):
    loss = (
        np.random.default_rng(seed).gamma(1.0, size=(num_steps, 10)).astype(np.float32)
    )
    return time_sampling.LossMoments(jnp.asarray(loss), jnp.full(num_steps, 10))


def test_importance_sampling_is_unbiased():
    """E_p[w f] is the plain mean of f, and indices come at their rate."""
    n, moments = WIDE[0], full_moments()
    draws = draw(jax.random.key(7), WIDE, num_steps=20, moments=moments)
    index = np.round(np.asarray(draws.t) * 20).astype(int)
    square = (np.asarray(moments.history, float) ** 2).mean(1) ** 0.5
    p = 0.999 * square / square.sum() + 0.001 / 20
    count = np.bincount(index, minlength=20)
    assert np.all(np.abs(count - n * p) < 5 * (n * p * (1 - p)) ** 0.5)
    np.testing.assert_allclose(draws.weight, 1 / (20 * p[index]), rtol=1e-4)
    f = np.arange(20.0) ** 2
    value = draws.weight * f[index]
    assert abs(value.mean() - f.mean()) < 5 * value.std() / n**0.5


def test_history_keeps_the_last_ten():
    """In order, by index; times stay uniform until every index has its ten."""
    steps, rng = 4, np.random.default_rng(8)
    index = np.append(rng.integers(0, steps, 58), [3, 3])
    loss = rng.gamma(1.0, size=60).astype(np.float32)
    want = [collections.deque(maxlen=10) for _ in range(steps)]
    moments, update = (
        time_sampling.init_moments(steps),
        jax.jit(time_sampling.update_moments),
    )
    uniform = []
    for part in np.split(np.arange(60), 10):
        t = (index[part] / steps).astype(np.float32)
        moments = update(moments, t, loss[part])
        for i, value in zip(index[part], loss[part], strict=True):
            want[i].append(value)
        p = time_sampling.time_probabilities(moments)
        full = all(len(row) == 10 for row in want)
        uniform.append(full)
        assert np.allclose(p, 1 / steps) != full
    assert uniform == sorted(uniform)
    assert {*uniform} == {False, True}
    np.testing.assert_array_equal(moments.history, np.array(want))
    np.testing.assert_array_equal(moments.filled, 10)


def test_equal_losses_of_zero_are_uniform():
    p = time_sampling.time_probabilities(
        time_sampling.LossMoments(jnp.zeros((5, 10)), jnp.full(5, 10))
    )
    np.testing.assert_allclose(p, 0.2, rtol=1e-6)


# --- the bound


def direct_bound(mean, sigma):
    """The sum over all steps of the KLs of a one-word language in nats a position.

    x_0 ~ N(mean, s^2) with s = sigma_0, and x0_hat its posterior mean, whose variance
    of error is v = s^2 sigma_t^2 / (alpha_t^2 s^2 + sigma_t^2). Each coordinate alike.
    """
    s2, t = T20.sigma_0**2, np.arange(20) / 20
    alpha, std = T20.alpha_sigma(t)
    total = alpha**2 * s2 + std**2
    coef, _, var = schedule.posterior_coefficients(t[1:], t[1:] - 1 / 20, T20)
    mine = schedule.VARIANCES[sigma](t[1:], t[1:] - 1 / 20, T20)
    error = coef**2 * (s2 * std**2 / total)[1:]
    kl = 0.5 * (var / mine - 1 - np.log(var / mine) + error / mine)
    # at index 0, N(EMB, s^2) beside N(x0_hat, the variance of index 1)
    spread = (alpha * s2) ** 2 / total
    kl_0 = 0.5 * (s2 / var[0] - 1 - np.log(s2 / var[0]) + spread[0] / var[0])
    last = std[-1] ** 2
    prior = 0.5 * (last - 1 - np.log(last) + alpha[-1] ** 2 * (mean**2 + s2))
    return np.sum(kl.sum() + kl_0 + prior)


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("sigma", ["small", "large"])
def test_bound_is_the_sum_of_its_kls(network, sigma, importance):
    """One random step a text estimates the sum over T, to five standard errors."""
    n, mean = WIDE[0], 1.3

    def posterior_mean(weights, x_t, t, x0_prev):
        (alpha, std), s2 = T20.alpha_sigma(t), T20.sigma_0**2
        gain = alpha * s2 / (alpha**2 * s2 + std**2)
        return mean + gain[:, None, None] * (x_t - alpha[:, None, None] * mean)

    network(posterior_mean)
    one_word = Params(np.full((1, 2), mean, np.float32), np.zeros(1, np.float32), {})
    moments = full_moments() if importance else None
    draws = draw(jax.random.key(9), WIDE, num_steps=20, moments=moments)
    ids = np.zeros((n, 1), int)
    terms = run("vlb", params=one_word, ids=ids, draws=draws, sigma=sigma)
    np.testing.assert_array_equal(terms.rounding, 0)
    total = np.asarray(terms.total(), float)
    assert abs(total.mean() - 2 * direct_bound(mean, sigma)) < 5 * total.std() / n**0.5


def test_truncated_texts():
    """A share of the rows ends early, each at its own length; the rest is PAD."""
    ids = np.full((4000, 6), 5)
    cut = np.asarray(time_sampling.truncate(jax.random.key(0), ids, 0.3))
    sizes = (cut == 5).sum(-1)
    assert ((cut == 5) == (np.arange(6) < sizes[:, None])).all()
    assert (cut[cut != 5] == PAD).all()
    shorter = np.bincount(sizes, minlength=7)[1:6] / 4000  # 6 of 6 is not cut
    assert np.abs(shorter - 0.3 / 6).max() < 0.02
    later = time_sampling.truncate(jax.random.key(0), ids[:10], 0.3, first=20)
    np.testing.assert_array_equal(later, cut[20:30])
    np.testing.assert_array_equal(
        time_sampling.truncate(jax.random.key(0), ids, 0.0), ids
    )
