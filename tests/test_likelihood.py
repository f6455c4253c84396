# SPDX-License-Identifier: Apache-2.0
"""The bound against exact probabilities: quadrature over latents, sums over texts."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion import likelihood, losses, model, schedule, time_sampling
from dlm_jax.diffusion.likelihood import LatentPredictor
from dlm_jax.nn.transformer import DenoiserConfig

TABLE = np.array([[-1.2], [0.3], [1.1]], np.float32)
VOCAB = len(TABLE)
TINY = DenoiserConfig(
    dim=1,
    hidden_dim=8,
    layers=1,
    heads=1,
    mlp_dim=16,
    positions=3,
    time_dim=8,
    dropout=0.0,
)
# (what the network predicts, whether x_0 is noisy, changes of the network)
MODELS = {
    "x0": (True, {}),
    "x0 without noise": (False, {}),
    "eps": (True, {"predicts": "eps"}),
    "mu": (True, {"predicts": "mu"}),
    "logits": (False, {"predicts": "logits", "trunk": "adaln"}),
    "self-conditioned": (
        False,
        {"predicts": "logits", "self_cond": True, "token_posterior_input": True},
    ),
}


def _texts(length):
    return np.array(list(itertools.product(range(VOCAB), repeat=length)))


def _network(name, noise):
    """A random network, wild enough to be a bad model, as a predictor."""
    noisy, changes = MODELS[name]
    cfg = dataclasses.replace(TINY, **changes)
    params = jax.jit(lambda key: model.init(key, cfg, VOCAB))(jax.random.key(5))
    params = params._replace(
        table=jnp.asarray(TABLE),
        denoiser=jax.tree.map(lambda x: 1.5 * x + 0.05, params.denoiser),
    )
    sigma_0 = noise.sigma_0 if noisy else 0.0
    found = likelihood.latent_predictor(params, cfg, noise, sigma_0=sigma_0)
    return LatentPredictor(jax.jit(found.estimate), jax.jit(found.decode), sigma_0)


def _estimate(predict, noise, ids, key=0, **options):
    """The terms of each text, [n] each."""

    def run(key):
        return likelihood.bound(
            key, jnp.asarray(ids), jnp.asarray(TABLE), predict, noise, **options
        )[0]

    return jax.device_get(jax.jit(run)(jax.random.key(key)))


def _repeated(predict, noise, ids, repeats):
    """Means and standard errors [n] of the total over `repeats` estimates."""
    many = np.tile(np.asarray(ids), (repeats, 1))
    terms = _estimate(predict, noise, many, draws=2)
    total = terms.total().reshape(repeats, -1)
    return terms, total.mean(0), total.std(0, ddof=1) / np.sqrt(repeats)


# --- by quadrature


def _normal(x, mean, var):
    return np.exp(-((x - mean) ** 2) / (2 * var)) / np.sqrt(2 * np.pi * var)


class _Quadrature:
    """The model's chain on a grid of latents [n, length], in float64."""

    def __init__(self, predict, noise, length):
        self.axis = np.linspace(-12, 12, 961 if length == 1 else 145)
        mesh = np.meshgrid(*[self.axis] * length, indexing="ij")
        self.points = np.stack([m.ravel() for m in mesh], -1)
        self.cell = (self.axis[1] - self.axis[0]) ** length
        self.predict, self.length = predict, length
        indices = range(-1 if predict.sigma_0 else 0, noise.num_steps)
        self.levels = []  # (t, signal, variance given the words), noisiest first
        for i in reversed(indices):
            alpha, sigma = noise.alpha_sigma(np.asarray(i / noise.num_steps))
            variance = sigma**2 + (alpha * predict.sigma_0) ** 2
            self.levels.append((i / noise.num_steps, float(alpha), float(variance)))

    def _e_hat(self, t):
        x = jnp.asarray(self.points[..., None], jnp.float32)
        e_hat = self.predict.estimate(x, jnp.full(len(x), t, jnp.float32))
        return np.asarray(e_hat, np.float64)[..., 0]

    def _log_p_words(self, ids):
        x = jnp.asarray(self.points[..., None], jnp.float32)
        log = np.asarray(
            jax.nn.log_softmax(self.predict.decode(x, jnp.zeros(len(x)))), np.float64
        )
        return sum(log[:, i, w] for i, w in enumerate(ids))

    def _step(self, now, after, e_hat):
        """Mean and variance of q(x_after | x_now, e_hat), by the Gaussian rule."""
        (_, a_t, v_t), (_, a_s, v_s) = now, after
        gain = a_t / a_s * v_s / v_t
        return a_s * e_hat + gain * (self.points - a_t * e_hat), v_s - gain**2 * v_t

    def exact(self, texts):
        """-log p(w) of the model, with the density of every latent on the grid."""
        density = np.prod(_normal(self.points, 0.0, 1.0), -1)
        for now, after in itertools.pairwise(self.levels):
            mean, var = self._step(now, after, self._e_hat(now[0]))
            weight = (density * self.cell)[:, None]
            parts = [
                _normal(self.axis[None], mean[:, i, None], var)
                for i in range(self.length)
            ]
            first = (weight * parts[0]).sum(0)
            density = first if self.length == 1 else (weight * parts[0]).T @ parts[1]
            density = density.ravel()
        assert density.sum() * self.cell == pytest.approx(1.0, abs=1e-3)
        p = [(density * np.exp(self._log_p_words(w))).sum() * self.cell for w in texts]
        return -np.log(p)

    def bound(self, texts):
        """The bound as an integral: KL of each Gaussian step, under q."""
        return np.array([self._bound(words) for words in texts])

    def _bound(self, words):
        e = TABLE[words, 0].astype(np.float64)

        def under_q(level, value):
            q = np.prod(_normal(self.points, level[1] * e, level[2]), -1)
            return (q * value).sum() * self.cell

        last, var = self.levels[0][1] * e, self.levels[0][2]
        total = 0.5 * np.sum(last**2 + var - 1 - np.log(var))
        for now, after in itertools.pairwise(self.levels):
            mine, var = self._step(now, after, self._e_hat(now[0]))
            true, _ = self._step(now, after, e[None])
            kl = np.sum((true - mine) ** 2, -1) / (2 * var)
            total += under_q(now, kl)
        return total - under_q(self.levels[-1], self._log_p_words(words))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "length"), [("logits", 1), *((name, 2) for name in MODELS)]
)
def test_is_the_bound_of_the_ancestral_chain(name, length):
    """Unbiased for the integral of the KLs, and so not below the exact -log p(w)."""
    noise = schedule.discretize(schedule.SCHEDULES["sqrt"](), 12)
    noise = noise._replace(
        log_alpha_bar_table=noise.log_alpha_bar_table[:6]
    )  # eps at more noise leaves the grid
    predict, texts = _network(name, noise), _texts(length)
    chain = _Quadrature(predict, noise, length)
    exact, wanted = chain.exact(texts), chain.bound(texts)
    assert np.exp(-exact).sum() == pytest.approx(1.0, abs=2e-3)
    assert (wanted > exact).all()
    _, mean, error = _repeated(predict, noise, texts, 3000)
    assert (np.abs(mean - wanted) < 5 * error + 2e-3 * wanted).all(), (mean, wanted)
    assert (error < 0.05 * wanted).all()


# --- the best denoiser there is


def _optimal(log_p, texts, noise, sigma_0):
    """E[EMB(w) | x_t] and each position's p(w | x), by Bayes over all texts."""
    texts = jnp.asarray(texts)
    means = jnp.asarray(TABLE)[texts][..., 0]  # [n l]

    def posterior(x, t):  # t [b], or [b l] with marks of known tokens
        t = t[:, None] if t.ndim == 1 or sigma_0 else jnp.maximum(t, 0.0)
        alpha, sigma = noise.alpha_sigma(t)
        var = (sigma**2 + (alpha * sigma_0) ** 2)[:, None]
        off = x[:, None, :, 0] - alpha[:, None] * means
        log = log_p - jnp.sum(off**2 / (2 * var), -1)
        return jax.nn.softmax(log, -1)

    def estimate(x, t):
        return jnp.matmul(posterior(x, t), means, precision="highest")[..., None]

    def decode(x, t):
        p = posterior(x, jnp.full(x.shape[0], -1.0 if sigma_0 else 0.0))
        return jnp.log(jnp.einsum("bn,nlv->blv", p, jax.nn.one_hot(texts, VOCAB)))

    return LatentPredictor(estimate, decode, sigma_0)


def _weighted(total, log_p, repeats):
    """Mean over p(w) of the bound less the exact -log p(w), with its error."""
    gap = total.reshape(repeats, -1) + log_p
    p = np.exp(log_p)
    per_repeat = gap @ p
    return per_repeat.mean(), per_repeat.std(ddof=1) / np.sqrt(repeats)


def _gap(noise, noisy, length, draws=8, repeats=4000):
    texts = _texts(length)
    p = np.random.default_rng(length).dirichlet(np.ones(len(texts)))
    log_p = np.log(p)
    sigma_0 = noise.sigma_0 if noisy else 0.0
    predict = _optimal(log_p, texts, noise, sigma_0)
    many = np.tile(texts, (repeats, 1))
    terms = _estimate(predict, noise, many, draws=draws)
    return terms, log_p, repeats


@pytest.mark.slow
@pytest.mark.parametrize(("noisy", "length"), [(True, 1), (False, 2), (False, 3)])
def test_gap_closes_as_steps_grow(noisy, length):
    """With the best denoiser and the exact rounding, only the steps' size is lost."""
    curve = schedule.SCHEDULES["logistic"](0.0, 1.2)
    gaps = []
    for steps in (8, 32, 256, None):
        noise = curve if steps is None else schedule.discretize(curve, steps)
        terms, log_p, repeats = _gap(noise, noisy and steps is not None, length)
        gaps.append(_weighted(terms.total(), log_p, repeats))
    for (gap, error), (less, error_less) in itertools.pairwise(gaps):
        assert gap > less - 5 * (error + error_less)
    assert all(gap > -5 * error for gap, error in gaps)
    first, (last, error) = gaps[0][0], gaps[-1]
    assert abs(last) < 5 * error < 0.2
    assert first > 10 * last


@pytest.mark.parametrize("term", ["prior", "diffusion", "rounding"])
def test_no_term_can_be_dropped(term):
    """Without it, the would-be bound falls below the exact -log p(w)."""
    noise = schedule.discretize(schedule.SCHEDULES["sqrt"](), 300)
    noise = noise._replace(
        log_alpha_bar_table=noise.log_alpha_bar_table[60:120]
    )  # a middle, so that both ends count
    terms, log_p, repeats = _gap(noise, True, 1, repeats=80_000)
    whole, error = _weighted(terms.total(), log_p, repeats)
    assert whole > -5 * error
    dropped = terms._replace(**{term: 0.0}).total()
    assert _weighted(dropped, log_p, repeats)[0] < -5 * error


def test_noisy_x0_on_a_curve_has_its_last_step():
    """From the curve's start to x_0 there is a step, which counts."""
    noise = schedule.SCHEDULES["sqrt"]()
    terms, log_p, repeats = _gap(noise, True, 1)
    gap, error = _weighted(terms.total(), log_p, repeats)
    assert -5 * error < gap < 0.1


def test_curve_and_many_steps_agree():
    noise = schedule.from_quantiles(np.array([0.0, 1.0]), np.array([-3.0, 4.0]))
    ids = _texts(2)
    results = [
        _repeated(_network("logits", n), n, ids, 1500)[1:]
        for n in (noise, schedule.discretize(noise, 2000))
    ]
    (mean, error), (other, other_error) = results
    assert (np.abs(mean - other) < 5 * (error + other_error)).all()


def test_profile_sums_to_the_diffusion_term():
    noise = schedule.discretize(schedule.SCHEDULES["sqrt"](), 40)
    predict = _network("x0 without noise", noise)
    ids = jnp.asarray(_texts(2))
    terms, profile = likelihood.bound(
        jax.random.key(0), ids, jnp.asarray(TABLE), predict, noise, draws=10
    )
    assert profile.t.shape == profile.nats.shape == (10, len(ids))
    assert np.allclose(profile.nats.mean(0), terms.diffusion, rtol=1e-5)
    assert 1 / 40 <= profile.t.min() < profile.t.max() <= 39 / 40


def test_ratio_and_its_error():
    rng = np.random.default_rng(0)
    count = rng.integers(5, 30, (400, 500))
    nats = 2.0 * count + rng.normal(size=count.shape) * np.sqrt(count)
    each = [
        likelihood.ratio_with_stderr(n, c) for n, c in zip(nats, count, strict=True)
    ]
    means = np.array([s.mean for s in each])
    assert abs(means.mean() - 2.0) < 0.002
    assert np.mean([s.stderr for s in each]) == pytest.approx(means.std(), rel=0.15)


def test_nelbo_is_the_bound_per_position():
    """The objective's terms, in the mean; its rounding is by each position's posterior."""
    noise = schedule.logistic(0.0, 1.2)
    cfg = dataclasses.replace(TINY, predicts="logits", token_posterior_input=True)
    params = jax.jit(lambda key: model.init(key, cfg, VOCAB))(jax.random.key(5))
    params = params._replace(table=jnp.asarray(TABLE))
    many = jnp.asarray(np.tile(_texts(2), (20_000, 1)))
    draws = time_sampling.draw_noise(
        jax.random.key(0), (*many.shape, 1), time_sampler="low_discrepancy"
    )
    options = {"cfg": cfg, "schedule": noise, "objective": "nelbo"}
    loss = jax.jit(lambda ids: losses.end_to_end(params, ids, draws, **options))
    terms = jax.device_get(loss(many))
    predict = likelihood.latent_predictor(params, cfg, noise, sigma_0=0.0)
    wanted = _estimate(predict, noise, many, draws=2)
    assert np.allclose(2 * terms.prior, wanted.prior, rtol=1e-4)
    difference = 2 * terms.diffusion - wanted.diffusion
    error = difference.std() / np.sqrt(len(difference))
    assert abs(difference.mean()) < 5 * error < 0.1 * wanted.diffusion.mean()
    assert 0 <= terms.rounding.max() < 1e-3


def test_nelbo_rounds_as_the_bound_does():
    """Where the least noise is much, by each position's posterior, for an x0 network."""
    noise = schedule.from_quantiles(np.array([0.0, 1.0]), np.array([-1.0, 6.0]))
    params = jax.jit(lambda key: model.init(key, TINY, VOCAB))(jax.random.key(5))
    params = params._replace(table=jnp.asarray(TABLE))
    many = jnp.asarray(np.tile(_texts(2), (2000, 1)))
    draws = time_sampling.draw_noise(jax.random.key(0), (*many.shape, 1))
    options = {"cfg": TINY, "schedule": noise, "objective": "nelbo"}
    loss = jax.jit(lambda ids: losses.end_to_end(params, ids, draws, **options))
    mine = 2 * jax.device_get(loss(many)).rounding
    predict = likelihood.latent_predictor(params, TINY, noise, sigma_0=0.0)
    wanted = _estimate(predict, noise, many, draws=1).rounding
    error = np.hypot(mine.std(), wanted.std()) / np.sqrt(len(mine))
    assert abs(mine.mean() - wanted.mean()) < 5 * error < 0.05 * wanted.mean()
