# SPDX-License-Identifier: Apache-2.0
"""The autoregressive model: causal, exact, and a sampler of what it scores."""

import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion import autoregressive, losses, model, schedule, time_sampling
from dlm_jax.errors import UserError
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.types import END, PAD, START

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from lib import fudge

CFG = DenoiserConfig(
    dim=8, hidden_dim=16, layers=2, heads=2, mlp_dim=32, positions=6, time_dim=8,
    trunk="adaln", predicts="logits", causal=True, dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
VOCAB = 6


@pytest.fixture(scope="module")
def params():
    """Random weights, away from AdaLN-Zero's start, where nothing depends on anything."""
    init = jax.jit(lambda key: model.init(key, CFG, VOCAB))
    params = init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        x + 0.3 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


def _nll(params, rows, cfg=CFG):
    return np.asarray(jax.jit(lambda rows: autoregressive.nll(params, cfg, rows))(rows))


def test_sees_nothing_after_a_position(params):
    ids = jnp.array([[0, 4, 5, 4, 1, 3]])
    logits = jax.jit(
        lambda ids: autoregressive.trunk_output(params, CFG, ids, head=True)
    )
    before = logits(ids)
    for i in range(1, 6):
        changed = logits(ids.at[0, i].set(2))
        same = np.abs(changed - before).max(-1)[0] < 1e-6
        assert same.tolist() == [True] * i + [False] * (6 - i)


@pytest.mark.parametrize("trunk", ["adaln", "post_ln"])
def test_probabilities_sum_to_one(params, trunk):
    """Over all rows of three tokens after START."""
    cfg = CFG.__class__(**{**CFG.__dict__, "trunk": trunk})
    if trunk == "post_ln":
        params = jax.jit(lambda key: model.init(key, cfg, VOCAB))(jax.random.key(0))
    rows = [[START, *rest] for rest in itertools.product(range(VOCAB), repeat=3)]
    nll = _nll(params, np.array(rows), cfg)
    assert (nll[:, 0] == 0).all()
    assert float(np.exp(-nll.sum(-1)).sum()) == pytest.approx(1.0, abs=1e-4)


def test_loss_is_its_nats_per_position(params):
    ids = np.array([[0, 4, 5, 4, 1, 3], [0, 5, 1, 3, 3, 3]])
    noise = schedule.make_schedule("logistic")
    options = {"cfg": CFG, "schedule": noise, "objective": "ar"}
    loss = jax.jit(lambda draws: losses.end_to_end(params, ids, draws, **options))
    wanted = _nll(params, ids).mean(-1)
    for seed in (0, 1):  # whatever is drawn
        draws = time_sampling.draw_noise(jax.random.key(seed), (2, 6, CFG.dim))
        assert np.allclose(loss(draws).total(), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("objective", "change"),
    [("ce", {}), ("ar", {"causal": False}), ("ar", {"self_cond": True})],
)
def test_objective_and_network_must_fit(objective, change):
    cfg = CFG.__class__(**{**CFG.__dict__, **change})
    with pytest.raises(UserError, match="'ar'"):
        losses.check_compatible(objective, cfg, schedule.make_schedule("logistic"))


def test_samples_have_the_probabilities_it_scores(params):
    """Every row of two free tokens, counted over many samples."""
    n = 20_000
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(n))
    draw = jax.jit(lambda keys: autoregressive.sample(keys, params, CFG, 3))
    ids = np.asarray(draw(keys))
    assert (ids[:, 0] == START).all()
    over = (ids[:, 1] == END) | (ids[:, 1] == PAD)
    assert over.any()
    assert (ids[over, 2] == PAD).all()
    rows = np.array([[START, a, b] for a in range(VOCAB) for b in range(VOCAB)])
    rows = rows[(rows[:, 1] != END) & (rows[:, 1] != PAD)]
    p = np.exp(-_nll(params, rows).sum(-1))
    found = np.array([(ids == row).all(-1).sum() for row in rows])
    error = np.sqrt(n * p * (1 - p))
    assert (np.abs(found - n * p) < 5 * error + 1).all()
    assert np.array_equal(draw(keys[:4]), ids[:4])


def test_features_ignore_padding(params):
    ids = np.array([[0, 4, 1, 3, 3, 3]])
    functions = autoregressive.trunk_output, autoregressive.features
    states, mean = jax.jit(lambda ids: [f(params, CFG, ids) for f in functions])(ids)
    assert np.allclose(mean, states[:, :3].mean(1), atol=1e-6)


def test_goes_on_from_a_prefix(params):
    prefix = np.array([[START, 4, PAD], [START, 5, 4]])
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(2))
    draw = jax.jit(lambda k: autoregressive.sample(k, params, CFG, 5, prefix=prefix))
    rows = np.stack([draw(jax.random.split(jax.random.key(i), 2)) for i in range(200)])
    assert draw(keys).shape == (2, 5)
    assert (rows[:, 0, :2] == [START, 4]).all()
    assert (rows[:, 1, :3] == [START, 5, 4]).all()
    assert len(np.unique(rows[:, 0, 2])) > 2
    alone = np.array([[START, 4, w] for w in range(VOCAB)])
    share = np.exp(-_nll(params, alone)[:, 2])
    found = np.bincount(rows[:, 0, 2], minlength=VOCAB) / 200
    assert np.abs(found - share).max() < 5 * np.sqrt(0.25 / 200)


def test_search_finds_the_likeliest(params):
    """As wide a beam as there are rows is exhaustive; a narrow one is no better."""
    prefix = np.array([[START, 4], [START, 5]])
    rows = np.array([[START, 4, a, b] for a in range(VOCAB) for b in range(VOCAB)])
    over = np.isin(rows[:, 2], (END, PAD))
    rows = rows[~over | (rows[:, 3] == PAD)]

    def best(first):
        here = rows.copy()
        here[:, 1] = first
        nll = np.array(_nll(params, here))
        nll[:, 3] = np.where(np.isin(here[:, 2], (END, PAD)), 0, nll[:, 3])
        nll[:, 1] = 0
        return nll.sum(-1).min(), here[np.argmin(nll.sum(-1))]

    wide = jax.jit(
        lambda: autoregressive.beam_search(params, CFG, 4, prefix=prefix, beams=36)
    )()
    for row, first in zip(np.asarray(wide), (4, 5), strict=True):
        assert row.tolist() == best(first)[1].tolist()
    one = jax.jit(
        lambda: autoregressive.beam_search(params, CFG, 4, prefix=prefix, beams=1)
    )()
    assert (np.asarray(one)[:, :2] == prefix).all()


def test_fudge_is_bayes_rule_on_the_next_token(params):
    """Of a condition that the second token decides, counted over many samples."""
    n, wanted = 4000, jnp.log(jnp.array([0.1, 0.9, 0.2, 0.3, 0.8, 0.05]))
    keys = jax.random.split(jax.random.key(0), n)

    def log_prob(ids):
        return wanted[ids[:, 1]]

    def draw(weight):
        run = jax.jit(
            lambda k: fudge.fudge(k, params, CFG, 3, log_prob, weight=weight, top=VOCAB)
        )
        return np.bincount(np.asarray(run(keys))[:, 1], minlength=VOCAB) / n

    rows = np.array([[START, w, PAD] for w in range(VOCAB)])
    p = np.exp(-_nll(params, rows)[:, 1])
    for weight in (0.0, 1.0, 2.0):
        exact = p * np.exp(weight * np.asarray(wanted))
        exact /= exact.sum()
        error = np.sqrt(exact * (1 - exact) / n)
        assert (np.abs(draw(weight) - exact) < 5 * error + 1e-3).all()
