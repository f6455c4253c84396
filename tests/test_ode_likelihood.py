# SPDX-License-Identifier: Apache-2.0
"""The ODE's likelihood against exact probabilities, and what a user may ask for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import untrained
from test_likelihood import TABLE, _optimal, _texts

from dlm_jax.data import tokenizer
from dlm_jax.diffusion import ode_likelihood, schedule
from dlm_jax.errors import UserError

CURVE = schedule.logistic(0.0, 1.2)
NOISE = {"continuous": CURVE, "discrete": schedule.discretize(CURVE, 2000)}


def _estimate(noise, length, repeats, given=None, **options):
    """(excess over -log p of every text, stated error), [repeats n] each."""
    texts = _texts(length)
    log_p = np.log(np.random.default_rng(length).dirichlet(np.ones(len(texts))))
    predict = _optimal(log_p, texts, noise, 0.0)
    ids = jnp.asarray(np.tile(texts, (repeats, 1)))
    masks = None if given is None else (ids * 0 + given > 0, ids < 0)

    def run(key):
        table = jnp.asarray(TABLE)
        return ode_likelihood.bound(
            key, ids, table, predict, noise, given=masks, **options
        )

    terms, stderr = jax.device_get(jax.jit(run)(jax.random.key(0)))
    total = terms.total().reshape(repeats, -1)
    return total, stderr.reshape(repeats, -1), log_p


@pytest.mark.parametrize("name", NOISE)
def test_every_draw_of_one_word_is_exact(name):
    """The trace of one coordinate has no error, and the exact reading no gap."""
    total, stderr, log_p = _estimate(NOISE[name], 1, 50, draws=2, num_steps=128)
    np.testing.assert_allclose(total.mean(0), -log_p, atol=0.02)
    assert np.median(np.abs(total + log_p)) < 0.01
    assert np.median(stderr) < 0.01


def test_more_words_are_exact_within_the_stated_error():
    total, stderr, log_p = _estimate(CURVE, 3, 100, draws=4, num_steps=64)
    error = total.std(0, ddof=1) / 10
    assert (np.abs(total.mean(0) + log_p) < 5 * error + 0.02).all()
    assert np.sqrt(np.mean(stderr**2)) == pytest.approx(10 * error.mean(), rel=0.3)
    assert error.max() < 0.1


def test_of_the_rest_given_a_word():
    """-log p(second word | first word): nothing of the known one counts."""
    given = np.array([1, 0])
    total, _, log_p = _estimate(CURVE, 2, 50, given, draws=2, num_steps=128)
    p = np.exp(log_p).reshape(3, 3)
    wanted = -np.log(p / p.sum(1, keepdims=True)).ravel()
    np.testing.assert_allclose(total.mean(0), wanted, atol=0.03)


@pytest.mark.parametrize(("length", "given"), [(1, None), (2, np.array([1, 0]))])
def test_probabilities_sum_to_one(length, given):
    """The last word's, though N(0, 1) is far from the noisiest texts: sum of E[e^-total]."""
    short = schedule.from_quantiles(np.array([0.0, 1.0]), np.array([-6.0, 0.5]))
    total, _, _ = _estimate(short, length, 2000, given, draws=1, num_steps=64)
    p = np.exp(-total).reshape(2000, -1, 3).sum(-1)
    error = p.std(0, ddof=1) / np.sqrt(len(p))
    assert (np.abs(p.mean(0) - 1) < 5 * error + 0.01).all(), (p.mean(0), error)
    assert error.max() < 0.02


@pytest.mark.parametrize("name", NOISE)
def test_grid_covers_all_noise(name):
    times = ode_likelihood.grid(NOISE[name], 64)
    steps = NOISE[name].num_steps
    assert times[0] == 0
    assert times[-1] == (1 if steps is None else 1 - 1 / steps)
    assert 50 < len(times) <= 65
    assert np.diff(NOISE[name].log_snr(times)).min() > -2.5  # the range is 22
    if steps:
        np.testing.assert_allclose(times * steps, np.round(times * steps), atol=1e-9)


@pytest.fixture(scope="module")
def lm():
    return untrained(tokenizer.train_word(["a b c d"] * 3, min_count=0), 8)


def test_names_its_estimator(lm):
    ids = lm.encode(["a b c", "d"])
    ode = lm.nll(ids, estimator="ode", num_steps=4, draws=3)
    assert ode.estimator == "ode"
    assert lm.nll(ids).estimator == "variational"
    assert ode.total().shape == ode.stderr.shape == (2,)
    assert np.isfinite(ode.total()).all()
    assert (ode.stderr > 0).all()
    other = lm.nll(ids, estimator="ode", num_steps=4, draws=3, seed=1).total()
    assert not np.allclose(ode.total(), other)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"estimator": "euler"}, "estimator='euler': choose one of variational, ode"),
        ({"num_steps": 8}, "num_steps=8: it needs estimator='ode'"),
        ({"estimator": "ode", "num_steps": 1}, "num_steps=1: must be from 2"),
        ({"estimator": "ode", "draws": 0}, "draws=0"),
    ],
)
def test_bad_options(options, says, lm):
    with pytest.raises(UserError, match=says):
        lm.nll(lm.encode(["a"]), **options)


def test_models_without_it(lm):
    causal = dataclasses.replace(
        lm, cfg=dataclasses.replace(lm.cfg, causal=True), compiled={}
    )
    with pytest.raises(UserError, match="autoregressive model is exact"):
        causal.nll(lm.encode(["a"]), estimator="ode")
    config = {**lm.config, "loss": {**lm.config["loss"], "objective": "x0"}}
    noise = schedule.make_schedule("sqrt", 100)
    noisy = dataclasses.replace(lm, config=config, schedule=noise, compiled={})
    with pytest.raises(UserError, match="take estimator='variational'"):
        noisy.nll(lm.encode(["a"]), estimator="ode")
