# SPDX-License-Identifier: Apache-2.0
"""Schedules that follow the loss: they find a known law and stay valid ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.configs import smoke
from dlm_jax.diffusion import adaptive, samplers, schedule
from dlm_jax.errors import UserError
from dlm_jax.inference import loading
from dlm_jax.runtime import checkpoint
from dlm_jax.training import loop
from dlm_jax.training.config import resolve_config
from dlm_jax.training.trainer import Trainer, language_job

START = schedule.logistic(2.0, 2.0)


def _seen(curve, rounds=300):
    """The state after losses that follow `curve`, at times of its own schedule."""
    state = adaptive.init(START)

    @jax.jit
    def one(state, key):
        noise = adaptive.warp(state)
        u = -noise.log_snr(jax.random.uniform(key, (256,)))
        return adaptive.update(state, u, curve(u), rate=0.95)

    for key in jax.random.split(jax.random.key(0), rounds):
        state = one(state, key)
    return state


def _gumbel_curve(mean, scale):
    return lambda u: 3.0 * jnp.exp(-jnp.exp(-(u - mean) / scale))


@pytest.mark.parametrize("name", adaptive.ADAPTIVE_SCHEDULES)
def test_is_a_schedule(name):
    """alpha_bar falls, the warp's from nearly 1 to nearly 0, whatever was seen.

    The Gumbel law ends where its lower tail does, with the words decided, not clean.
    """
    for state in (adaptive.init(START), _seen(_gumbel_curve(1.0, 0.5), 30)):
        noise = adaptive.ADAPTIVE_SCHEDULES[name](state)
        t = jnp.linspace(0, 1, 200)
        alpha = noise.alpha_bar(t)
        assert (jnp.diff(alpha) <= 1e-6).all()
        assert alpha[0] > (0.9 if name == "warp" else 0.5)
        assert alpha[-1] < 0.1


@pytest.mark.parametrize(("mean", "scale"), [(1.0, 0.5), (4.0, 1.0)])
def test_gumbel_is_found(mean, scale):
    found = adaptive.fit_gumbel(_seen(_gumbel_curve(mean, scale)))
    t = jnp.linspace(0.05, 0.95, 19)
    wanted = schedule.gumbel(mean, scale)
    assert np.allclose(found.log_snr(t), wanted.log_snr(t), atol=0.4)


def test_warp_makes_the_loss_linear_in_time():
    """But for the share that stays with the start's law."""
    curve = _gumbel_curve(1.0, 0.6)
    noise = adaptive.warp(_seen(curve))
    t = jnp.linspace(0.0, 1.0, 21)
    loss = curve(-noise.log_snr(t)) / 3.0
    assert np.abs(loss - t).max() < adaptive.FLOOR + 0.03
    before = curve(-START.log_snr(t)) / 3.0
    assert np.abs(before - t).max() > 0.25


def test_start_is_kept_where_nothing_was_seen():
    noise = adaptive.warp(adaptive.init(START))
    t = jnp.linspace(0.05, 0.95, 19)
    assert np.allclose(noise.log_snr(t), START.log_snr(t), atol=0.4)


@pytest.mark.parametrize("name", adaptive.ADAPTIVE_SCHEDULES)
def test_forgets_without_breaking(name):
    """A bin that is not seen for 50,000 steps is no 0/0, and its old loss is gone."""
    state = _seen(_gumbel_curve(1.0, 0.5), 30)
    low = jnp.full(64, -5.0)

    @jax.jit
    def many(state):
        body = lambda _, s: adaptive.update(s, low, jnp.zeros(64))  # noqa: E731
        return jax.lax.fori_loop(0, 50_000, body, state)

    noise = adaptive.ADAPTIVE_SCHEDULES[name](many(state))
    alpha = noise.alpha_bar(jnp.linspace(0, 1, 50))
    assert jnp.isfinite(alpha).all()
    assert alpha[0] > 0.9
    assert alpha[-1] < 0.1


@pytest.mark.parametrize("objective", ["nelbo", "ar"])
def test_refuses_losses_that_are_no_function_of_the_noise(objective):
    config = smoke.get_config()
    config.schedule.adaptive = "warp"
    config.model.update(
        self_cond=False, token_posterior_input=False, causal=objective == "ar"
    )
    config.loss.update(objective=objective, self_cond_prob=0.0)
    with pytest.raises(UserError, match="not a function of the noise"):
        resolve_config(config)


def _config(name, **model):
    config = smoke.get_config()
    config.schedule.adaptive = name
    config.model.update(time_input="log_snr", layers=1, **model)
    config.train.update(total_steps=12, ckpt_steps=6, sample_steps=0, valid_steps=0)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("name", adaptive.ADAPTIVE_SCHEDULES)
def test_trains_resumes_and_samples_with_it(name, tmp_path):
    """What it knows is part of the state: halves are the same as the whole."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    loop.train(_config(name), str(whole))
    loop.train(_config(name), str(halves))
    newest = checkpoint.folder(halves) / "12"
    newest.rename(tmp_path / "moved")
    loop.train(_config(name), str(halves))
    job = language_job(_config(name))
    states = [Trainer(job, str(w)).state for w in (whole, halves)]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.array_equal(a, b)
    seen = states[0].schedule_state
    assert 0 < jnp.sum(seen.counts) <= 12 * 16
    lm = loading.load(whole)
    t = np.linspace(0.1, 0.9, 9)
    wanted = adaptive.ADAPTIVE_SCHEDULES[name](seen).log_snr(jnp.asarray(t))
    assert np.allclose(lm.schedule.log_snr(t), wanted, rtol=1e-4, atol=1e-4)
    assert len(lm.sample(2, num_steps=4)) == 2
    start = adaptive.init(resolve_config(_config(name)).schedule)
    start = jax.tree.map(
        lambda a, b: jax.device_put(b, a.sharding), lm.schedule_state, start
    )
    latents = [
        dataclasses.replace(lm, schedule_state=s).generate(2, num_steps=4).latents
        for s in (lm.schedule_state, start)
    ]
    assert not np.array_equal(*latents)  # what is known is read, without compiling
    assert sum(run._cache_size() for run in lm.compiled.values()) == 1
    assert np.isfinite(lm.nll(lm.encode(["The Mill ."])).total()).all()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["x0", "eps"])
def test_regression_follows_it_too(objective, tmp_path):
    """Whose x_0 is noisy: its sigma_0 is that of the schedule as it now is."""
    config = _config(
        "warp", predicts="x0", self_cond=False, token_posterior_input=False
    )
    config.loss.update(objective=objective, self_cond_prob=0.0)
    config.train.update(total_steps=2, ckpt_steps=2)
    loop.train(config, str(tmp_path))
    lm = loading.load(tmp_path)
    assert isinstance(lm.schedule.sigma_0, float)
    assert np.isfinite(lm.nll(lm.encode(["The Mill ."])).total()).all()


def test_needs_a_curve():
    with pytest.raises(UserError, match="adaptive='warp' needs num_steps=0"):
        schedule.make_schedule("sqrt", 100, adaptive="warp")
    config = smoke.get_config()
    config.schedule.adaptive = "wrap"
    with pytest.raises(UserError, match="choose one of warp, gumbel"):
        resolve_config(config)


@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_every_solver_runs_on_a_traced_schedule(solver):
    """What is known may be an argument of the compiled chain, as in `generate`."""
    start = adaptive.init(schedule.make_schedule("logistic"))
    x = np.ones((2, 3, 4), np.float32)

    @jax.jit
    def run(noise):
        curve = adaptive.ADAPTIVE_SCHEDULES["warp"](noise)
        step = samplers.SOLVERS[solver](lambda x, t, p: 0.5 * x, curve)
        times = samplers.schedule_timesteps(curve, 4)
        return samplers.sample(jax.random.key(0), step, x, times)[0].x_t

    on_host = samplers.SOLVERS[solver](
        lambda x, t, p: 0.5 * x,
        jax.device_get(adaptive.ADAPTIVE_SCHEDULES["warp"](start)),
    )
    times = samplers.timesteps(4, start=1.0, stop=0.25)
    wanted = samplers.sample(jax.random.key(0), on_host, x, times)[0].x_t
    np.testing.assert_allclose(run(start), wanted, atol=1e-4)
