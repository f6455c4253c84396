# SPDX-License-Identifier: Apache-2.0
"""Model: every parametrisation gives the true x_0 for the true output; sizes."""

import contextlib
import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import sizes

from dlm_jax.diffusion import losses, model, schedule, time_sampling
from dlm_jax.nn import transformer
from dlm_jax.nn.transformer import DenoiserConfig

T200 = schedule.make_schedule("sqrt", 200)
TINY = DenoiserConfig(
    dim=4,
    hidden_dim=8,
    layers=1,
    heads=2,
    mlp_dim=8,
    positions=4,
    time_dim=4,
    predicts="logits",
)
KEY = jax.random.key(1, impl="unsafe_rbg")  # compiles in less than threefry's time
IDS = np.array([[0, 5, 2], [3, 3, 1]])


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: model.init(key, TINY, 6), jax.random.key(0))
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), "f"), shapes)


@pytest.fixture(scope="module", params=["b", "b l"])
def noisy(request, params):
    """(x_0, t, eps, x_t), one noise level an example or a token."""
    t = np.array([0, 100]) / 200
    if request.param == "b l":
        t = np.array([[0, 1, 3], [150, 100, 60]]) / 200
    x_0, eps = params.table[IDS], jax.random.normal(jax.random.key(1), (2, 3, 4))
    return x_0, t, eps, schedule.add_noise(x_0, t, eps, T200)


def test_conversions(params, noisy):
    """The true eps, mu or words are worth the true x_0."""
    x_0, t, eps, x_t = noisy
    mu, _ = schedule.posterior(x_0, x_t, t, T200)
    peaked = 100.0 * jax.nn.one_hot(IDS, 6)
    for name, raw in {"x0": x_0, "eps": eps, "mu": mu, "logits": peaked}.items():
        found = model.TO_X0[name](raw, x_t, t, params.table, T200)
        # mu holds x_0 with a coefficient of 0.009 at index 100
        np.testing.assert_allclose(found, x_0, atol=1e-4, err_msg=name)


def test_token_posterior_logits(params, noisy):
    """log N(x_t; alpha E_v, sigma^2) up to a constant over the vocabulary."""
    _, t, _, x_t = noisy
    prior = np.asarray(model.token_posterior_logits(params.table, x_t, t, T200), float)
    alpha, sigma = (np.reshape(a, (2, -1, 1, 1)) for a in T200.alpha_sigma(t))
    shift = np.asarray(x_t)[:, :, None] - alpha * np.asarray(params.table, float)
    want = -0.5 * (shift**2).sum(-1) / sigma[..., 0] ** 2
    apart = prior - want
    # 1 / (2 sigma^2) is 8 at index 0, times squares of 10: float32 gives 1e-4
    np.testing.assert_allclose(apart, apart[..., :1] * np.ones(6), atol=1e-3)


def test_token_posterior_input(monkeypatch, params, noisy):
    """A silent network leaves each position's own posterior, also shown to it."""
    _, t, _, x_t = noisy
    network = mock.Mock(return_value=jnp.zeros((2, 3, 6)))
    monkeypatch.setattr(transformer, "apply", network)
    monkeypatch.setattr(transformer, "head", lambda params, y: y)
    cfg = dataclasses.replace(TINY, token_posterior_input=True)
    prior = model.token_posterior_logits(params.table, x_t, t, T200)
    raw = model.apply(params, cfg, x_t, t, x_t, schedule=T200)
    np.testing.assert_array_equal(raw, prior)
    posterior_x0 = network.call_args.kwargs["posterior_x0"]
    np.testing.assert_array_equal(
        posterior_x0, model.expected_embedding(params.table, prior)
    )
    with pytest.raises(ValueError, match="schedule="):
        model.apply(params, cfg, x_t, t, x_t)


def test_average_is_the_posterior_mean(params):
    weights = np.random.default_rng(0).dirichlet(np.ones(6), (1, 2))
    found = model.expected_embedding(params.table, jnp.log(jnp.asarray(weights)) + 3.0)
    np.testing.assert_allclose(found, weights @ np.asarray(params.table), atol=1e-6)


@pytest.mark.parametrize("predicts", ["eps", "mu", "logits"])
def test_bind_needs_a_schedule(params, predicts):
    with pytest.raises(ValueError, match=f"{predicts!r}.* needs schedule="):
        model.bind(params, dataclasses.replace(TINY, predicts=predicts))


def test_mu_needs_steps(noisy, params):
    x_0, t, _, x_t = noisy
    with pytest.raises(ValueError, match="discretize"):
        model.TO_X0["mu"](x_0, x_t, t, params.table, schedule.make_schedule("sqrt"))


@pytest.mark.parametrize("predicts", model.TO_X0)
def test_bind_is_apply_and_conversion(monkeypatch, params, noisy, predicts):
    _, t, eps, x_t = noisy
    raw = 2 * params.table[IDS] @ params.table.T if predicts == "logits" else 0.1 * eps
    network = mock.Mock(return_value=raw)
    monkeypatch.setattr(transformer, "apply", network)
    monkeypatch.setattr(transformer, "head", lambda params, y: y)
    cfg, key = dataclasses.replace(TINY, predicts=predicts), jax.random.key(3)
    found = model.bind(params, cfg, schedule=T200, key=key)(x_t, t, eps)
    want = model.TO_X0[predicts](raw, x_t, jnp.asarray(t), params.table, T200)
    np.testing.assert_array_equal(found, want)
    assert found.shape == x_t.shape
    weights, _, vocab, _, _, x0_prev = network.call_args.args
    assert (weights is params.denoiser, vocab, x0_prev is eps) == (True, 6, True)
    assert network.call_args.kwargs["key"] is key


@contextlib.contextmanager
def double(monkeypatch):
    """The trunk in float64, by plain products, whose gradients JAX derives.

    Yields what makes arrays float64.
    """
    with monkeypatch.context() as patch, jax.enable_x64(True):
        patch.setitem(transformer.DTYPES, "float32", ("float64", "float64"))
        patch.setattr(transformer, "matmul", lambda a, b, *dtypes: a @ b)
        patch.setattr(transformer, "matmul_nt", lambda a, b, *dtypes: a @ b.mT)
        patch.setattr(transformer, "gelu", lambda x, phi: x * phi(x)[0])
        yield lambda tree: jax.tree.map(lambda a: jnp.asarray(a, float), tree)


@pytest.mark.slow
@pytest.mark.parametrize("prior", [False, True])
def test_large_vocabulary_is_read_by_example(monkeypatch, params, noisy, prior):
    """Loss and gradient are the same either way, and those of float64."""
    cfg, rng = (
        dataclasses.replace(TINY, token_posterior_input=prior),
        np.random.default_rng(0),
    )
    shapes = jax.eval_shape(lambda key: model.init(key, cfg, 6), jax.random.key(0))
    # Weights that differ: if all are equal, so are the numbers of every row that a
    # LayerNorm gets. Their variance of 0 is far below its eps of 1e-12, and it gives the
    # rounding error of their mean times 1e6, which an ulp before it decides. Gradients
    # of the head were 1.5e-3 off, up to 13% of them: either way alike on jax 0.10.2 and
    # 0.11.2, by example alone on 0.12.0 without jit. Here no variance is below 0.04.
    params = params._replace(
        denoiser=jax.tree.map(
            lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), "f"), shapes.denoiser
        )
    )
    _, t, _, x_t = noisy
    draws = time_sampling.NoiseDraws(
        jnp.asarray(t), jnp.zeros_like(x_t), jnp.ones_like(x_t)
    )
    options = {"cfg": cfg, "schedule": T200, "objective": "ce"}

    def loss(params, draws):
        return losses.end_to_end(params, IDS, draws, **options).total().sum()

    def slopes(params, draws):
        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params, draws))

    with double(monkeypatch) as wide:
        right = slopes(wide(params), wide(draws))
    whole = slopes(params, draws)
    monkeypatch.setattr(model, "MAX_DENSE_VOCAB", 5)
    found = slopes(params, draws)
    for a, b, c in zip(whole, found, right, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(a, c, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(b, c, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab", [model.MAX_DENSE_VOCAB, model.MAX_DENSE_VOCAB + 1])
def test_no_batch_of_large_logits(vocab):
    """No value of the gradient holds the logits of a batch, where there are many."""
    cfg, b, l = dataclasses.replace(TINY, token_posterior_input=True), 20, 4
    shapes = jax.eval_shape(lambda key: model.init(key, cfg, vocab), KEY)
    x = jnp.zeros((b, l, TINY.dim))
    draws = time_sampling.NoiseDraws(jnp.full(b, 0.5), x, x)
    options = {"cfg": cfg, "schedule": T200, "objective": "ce"}

    def loss(params):
        ids = jnp.zeros((b, l), int)
        return losses.end_to_end(params, ids, draws, **options).total().sum()

    largest = max(sizes(jax.make_jaxpr(jax.grad(loss))(shapes).jaxpr))
    assert (largest >= b * l * vocab) == (vocab == model.MAX_DENSE_VOCAB)


def test_start():
    """Table N(0, 1), bias within 1/sqrt d of 0; on request rows on the sphere."""
    big = dataclasses.replace(TINY, dim=16)
    first = jax.jit(lambda key: model.init(key, big, 500)[:2])(KEY)
    table, bias = (np.asarray(a) for a in first)
    assert abs(table.std() - 1) < 5 / (2 * table.size) ** 0.5
    assert np.abs(bias).max() <= 0.25
    # the uniform's standard error of the deviation is sigma sqrt(0.8 / n) / 2
    sigma = 0.25 / 3**0.5
    assert abs(bias.std() - sigma) < 2.5 * sigma * (0.8 / 500) ** 0.5
    unit = jax.jit(lambda key: model.init(key, TINY, 6, normalize=True).table)
    norm = np.linalg.norm(unit(KEY), axis=-1)
    np.testing.assert_allclose(norm, 2, rtol=1e-6)


def test_count(params):
    """By hand for the tiny one; docs/method.md, section 2.5, for the large."""

    def linear(fan_in, fan_out):
        return fan_in * fan_out + fan_out

    inside = linear(8, 24) + 3 * linear(8, 8) + 2 * 16
    outside = linear(4, 16) + linear(16, 8) + linear(4, 8) + 2 * linear(8, 8)
    want = inside + outside + 16 + 4 * 8 + linear(8, 6) + 6 * 4 + 6
    assert model.count(params) == want


@pytest.mark.parametrize(
    ("vocab", "dim", "want"), [(821, 16, 87_129_749), (11043, 128, 88_712_483)]
)
def test_published_size(vocab, dim, want):
    cfg = DenoiserConfig(dim=dim)
    shapes = jax.eval_shape(lambda key: model.init(key, cfg, vocab), jax.random.key(0))
    assert model.count(shapes) == want
