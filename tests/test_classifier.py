# SPDX-License-Identifier: Apache-2.0
"""Classifiers: they learn at every noise level, ask only what is asked, and steer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlm_jax.diffusion import (
    classifier,
    guidance,
    model,
    rounding,
    samplers,
    schedule,
    time_sampling,
)
from dlm_jax.diffusion.embedding import embed, init_table
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.types import HeadSpec

VOCAB, LENGTH, DIM = 9, 6, 8
NOISE = schedule.make_schedule("sqrt", 200)
CFG = DenoiserConfig(
    dim=DIM, hidden_dim=16, layers=1, heads=2, mlp_dim=32, positions=LENGTH, time_dim=8,
    trunk="adaln", dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
TABLE = init_table(jax.random.key(0), VOCAB, DIM, normalize=True)
SPECS = [
    HeadSpec("fields", (2,), 3),
    HeadSpec("tags", (LENGTH,), 3),
    HeadSpec("chart", (LENGTH, LENGTH), 3),
]


def labels_of(ids, spec):
    """Rules that the words alone decide, of each head's shape [b m]."""
    kind = ids % 3
    if spec.head == "fields":  # which word of a kind the text has, 0 for none
        return np.stack([np.isin(ids, w).any(-1) * 2 for w in ([3, 6], [4])], -1)
    if spec.head == "tags":
        return kind
    same = (kind[:, :, None] == kind[:, None]).astype(int)
    lower = np.tril(np.ones((LENGTH, LENGTH), bool), -1)
    return np.where(lower, -1, same).reshape(len(ids), -1)


def batch(seed, spec, n=64):
    ids = np.random.default_rng(seed).integers(0, VOCAB, (n, LENGTH))
    draws = time_sampling.draw_noise(
        jax.random.key(seed), (n, LENGTH, DIM), num_steps=200
    )
    return ids, labels_of(ids, spec), draws


def scores(params, seed, spec, **change):
    ids, labels, draws = batch(seed, spec)
    draws = draws._replace(**change)
    known = {"cfg": CFG, "spec": spec, "table": TABLE, "schedule": NOISE}
    return classifier.loss(params, ids, labels, draws, **known)


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.head)
def trained(request):
    """A head after 300 steps, and its spec."""
    spec = request.param
    params = classifier.init(jax.random.key(1), CFG, spec)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, ids, labels, draws):
        def mean(params):
            known = {"cfg": CFG, "spec": spec, "table": TABLE, "schedule": NOISE}
            return jnp.mean(
                classifier.loss(params, ids, labels, draws, **known).total()
            )

        updates, state = optimizer.update(jax.grad(mean)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for seed in range(300):
        params, state = step(params, state, *batch(seed, spec))
    return params, spec


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.head)
def test_shapes_and_start(spec):
    params = classifier.init(jax.random.key(1), CFG, spec)
    x = jnp.zeros((2, LENGTH, DIM))
    out = classifier.logits(params, CFG, spec, x, jnp.full(2, 0.5), NOISE)
    assert out.shape == (2, *spec.shape, spec.classes)
    assert spec.size == np.prod(spec.shape)


@pytest.mark.slow
def test_learns_and_knows_less_under_noise(trained):
    """Near-clean text is read all but rightly; pure noise only by the labels' rates."""
    params, spec = trained
    clean = scores(params, 10**6, spec, t=jnp.full(64, 0.005))
    noisy = scores(params, 10**6, spec, t=jnp.full(64, 0.995))
    assert clean.accuracy.mean() > 0.9
    assert noisy.accuracy.mean() < clean.accuracy.mean() - 0.15
    assert clean.nll.mean() < noisy.nll.mean()


@pytest.mark.slow
def test_log_prob_sums_over_what_is_asked(trained):
    params, spec = trained
    ids, labels, draws = batch(7, spec, n=4)
    x = schedule.add_noise(embed(TABLE, ids), draws.t, draws.eps_t, NOISE)
    shaped = labels.reshape(4, *spec.shape)

    def of(labels):
        return classifier.log_prob(params, CFG, spec, labels, NOISE)(x, draws.t)

    assert np.all(of(np.full_like(shaped, -1)) == 0)
    flat, parts = shaped.reshape(4, -1), []
    for i in range(spec.size):
        one = np.full_like(flat, -1)
        one[:, i] = flat[:, i]
        parts.append(of(one.reshape(shaped.shape)))
    np.testing.assert_allclose(sum(parts), of(shaped), rtol=1e-4, atol=1e-5)
    assert np.all(of(shaped) < 0)
    mean = classifier.log_prob(params, CFG, spec, shaped, NOISE, mean=True)
    count = (flat >= 0).sum(-1)
    np.testing.assert_allclose(mean(x, draws.t) * count, of(shaped), rtol=1e-5)


@pytest.mark.slow
def test_it_steers(trained):
    """Guided by it, what a Bayes-optimal denoiser of random words writes has the labels.

    By the words themselves: the classifier does not judge its own doing.
    """
    params, spec = trained
    n = 16
    _, labels, _ = batch(3, spec, n=n)
    shaped = labels.reshape(n, *spec.shape)

    def denoise(x_t, t, x0_prev):
        return model.expected_embedding(
            TABLE, model.token_posterior_logits(TABLE, x_t, t, NOISE)
        )

    log_prob = classifier.log_prob(params, CFG, spec, shaped, NOISE)
    x_T = samplers.standard_normal(
        samplers.per_example_keys(jax.random.key(5), n), (LENGTH, DIM)
    )

    def met(num_updates):
        step = guidance.gradient_guidance(
            samplers.ddim(denoise, NOISE, eta=1.0),
            log_prob,
            NOISE,
            num_updates=num_updates,
        )
        run = jax.jit(lambda x: samplers.sample(jax.random.key(6), step, x, times)[0])
        words = np.asarray(rounding.nearest(TABLE, run(x_T).x0_hat))
        right = labels_of(words, spec) == labels
        return right[labels >= 0].mean()

    times = samplers.timesteps(50)
    assert met(3) > met(0) + 0.2
