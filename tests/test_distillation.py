# SPDX-License-Identifier: Apache-2.0
"""Distillation: the target is the chain it replaces, and students are ordinary runs."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_jax
from dlm_jax.configs import distill as distill_config
from dlm_jax.configs import smoke
from dlm_jax.diffusion import distillation, model, samplers, schedule, time_sampling
from dlm_jax.errors import UserError
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.training import distill, loop
from dlm_jax.training.trainer import language_job

SCHEDULES = {
    "logistic": schedule.make_schedule("logistic", num_steps=0, mean=2.0, scale=1.2),
    "cosine": schedule.make_schedule("cosine", num_steps=0),
}
B, L, D, V = 3, 5, 4, 7


def linear(key):
    """A denoiser whose estimate is linear in its input: (x0_hat, log p)."""
    mix = 0.3 * jax.random.normal(key, (D, D))
    table = jax.random.normal(jax.random.fold_in(key, 1), (V, D))

    def denoise(x_t, t, x0_prev):
        return x_t @ mix + 0.1 * x0_prev, jax.nn.log_softmax(x_t @ table.T)

    return denoise


def chain_of(denoise, noise, x_t, times, gain=0.0):
    """DDIM without noise by the library's own step; returns (last latent, estimates)."""
    estimates = []

    def kept(x, t, prev):
        estimates.append(denoise(x, t, prev)[0])
        return estimates[-1]

    step = samplers.flow(kept, noise, gain=gain)
    state = samplers.State(x_t, jnp.zeros_like(x_t))
    keys = samplers.per_example_keys(jax.random.key(0), B)
    for now, after in itertools.pairwise(times):
        state = step(keys, state, samplers.Times(now, now, after))
    return state.x_t, estimates


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("gain", [0.0, 0.4])
def test_one_step_with_the_weighted_estimate_ends_where_the_chain_does(
    name, parts, gain
):
    noise, denoise = SCHEDULES[name], linear(jax.random.key(parts))
    x_t = jax.random.normal(jax.random.key(9), (B, L, D))
    times = np.linspace(0.8, 0.3, parts + 1)
    end, estimates = chain_of(denoise, noise, x_t, times, gain)
    rows = jnp.broadcast_to(jnp.asarray(times)[:, None], (parts + 1, B))
    weights = distillation.chain_weights(noise, rows, gain)
    assert weights.shape == (parts, B)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(jnp.sum(weights, 0), 1, atol=1e-6)
    mean = sum(w[:, None, None] * x for w, x in zip(weights, estimates, strict=True))
    one, _ = chain_of(lambda *_: (mean, None), noise, x_t, times[[0, -1]], gain)
    np.testing.assert_allclose(one, end, atol=2e-6)


def test_a_chain_that_ends_on_text_counts_its_last_estimate_alone():
    times = jnp.asarray([[0.5], [0.25], [-1.0]])
    weights = distillation.chain_weights(SCHEDULES["logistic"], times)
    np.testing.assert_array_equal(weights, [[0.0], [1.0]])


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_target_is_the_mixture_of_the_chains_distributions(num_steps):
    """Followed by hand through the library's own DDIM."""
    noise, denoise = SCHEDULES["logistic"], linear(jax.random.key(3))
    x_t = jax.random.normal(jax.random.key(4), (B, L, D))
    times, gain = distillation.step_times(jnp.full(B, 0.999), num_steps, 4), 0.25
    probs = distillation.chain_target(
        denoise, noise, x_t, times, jnp.zeros_like(x_t), gain=gain
    )
    np.testing.assert_allclose(jnp.sum(probs, -1), 1, atol=1e-5)
    wanted, state = jnp.zeros_like(probs), x_t
    prev = jnp.zeros_like(x_t)
    for i, weight in enumerate(distillation.chain_weights(noise, times, gain)):
        x0_hat, log_p = denoise(state, times[i], prev)
        wanted += weight[:, None, None] * jnp.exp(log_p)
        pair = np.array([times[i][0], times[i + 1][0]])
        state, _ = chain_of(lambda *_, x=x0_hat: (x, None), noise, state, pair, gain)
        prev = x0_hat
    np.testing.assert_allclose(probs, wanted, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 8])
@pytest.mark.parametrize("parts", [1, 3])
def test_students_step_where_the_sampler_does(num_steps, parts):
    grid = samplers.schedule_timesteps(SCHEDULES["logistic"], num_steps)
    whole = samplers.schedule_timesteps(SCHEDULES["logistic"], num_steps * parts)
    u = (jnp.arange(num_steps) + 0.5) / num_steps
    times = distillation.step_times(u, num_steps, parts)
    np.testing.assert_allclose(times[0], grid.now[::-1], atol=1e-6)
    np.testing.assert_allclose(times[-1], grid.next[::-1], atol=1e-6)
    np.testing.assert_allclose(
        np.sort(np.ravel(times[:-1])), np.sort(whole.now), atol=1e-6
    )


@pytest.mark.parametrize("known_length", [False, True])
def test_a_teacher_has_nothing_to_teach_itself_in_its_own_steps(known_length):
    """The gradient vanishes there, and only there; the loss is the teacher's entropy."""
    cfg = DenoiserConfig(
        dim=8, hidden_dim=16, layers=1, heads=2, mlp_dim=16, time_dim=8, positions=6,
        trunk="adaln", predicts="logits", self_cond=True, token_posterior_input=True,
        known_length=known_length, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    params = model.init(jax.random.key(0), cfg, V)
    bent = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape),
        params.denoiser,
    )
    params = params._replace(denoiser=bent)
    ids = jnp.asarray([[1, 4, 5, 2, 0, 0], [1, 6, 4, 5, 6, 2]])
    draws = time_sampling.draw_noise(jax.random.key(2), (2, 6, 8), self_cond_prob=1.0)

    def total(own, teacher, parts):
        given = params._replace(denoiser=own)
        terms = distillation.loss(
            given, ids, draws, teacher=teacher, cfg=cfg, schedule=SCHEDULES["logistic"],
            num_steps=4, parts=parts,
        )  # fmt: skip
        return jnp.mean(terms.total())

    def size(own, parts):
        grads = jax.jit(jax.grad(total), static_argnums=2)(own, params, parts)
        return max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads))

    assert size(params.denoiser, 1) < 1e-6
    assert size(params.denoiser, 4) > 1e-4
    moved = jax.tree.map(lambda x: x * 1.1, params.denoiser)
    assert size(moved, 1) > 1e-4
    assert total(moved, params, 1) > total(params.denoiser, params, 1)


def test_a_guided_teacher_of_pairs_teaches_its_guided_words():
    """In the teacher's own steps: the cross-entropy of the student and the guided words."""
    cfg = DenoiserConfig(
        dim=8, hidden_dim=16, layers=1, heads=2, mlp_dim=16, time_dim=8, positions=6,
        trunk="adaln", predicts="logits", known_source=True, dropout=0.0,
        attention_dropout=0.0,
    )  # fmt: skip
    params = model.init(jax.random.key(0), cfg, V)
    bent = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape),
        params.denoiser,
    )
    params = params._replace(denoiser=bent)
    ids = jnp.asarray([[1, 4, 1, 5, 2, 0], [1, 6, 4, 1, 6, 2]])
    draws = time_sampling.draw_noise(jax.random.key(2), (2, 6, 8))
    logistic, n = SCHEDULES["logistic"], 4
    t = distillation.step_times(draws.t, n, 1)[0]
    x_t = schedule.add_noise(params.table[ids], t, draws.eps_t, logistic)

    def log_p(ids):
        known = model.source(ids)
        given = model.insert_clean_tokens(
            params.table[ids], known, x_t, t, jnp.zeros(ids.shape, bool)
        )
        zeros = jnp.zeros_like(x_t)
        return model.bind_logits(params, cfg, schedule=logistic)(*given, zeros)[1]

    free = log_p(model.empty_source(ids))
    for weight in (1.0, 2.5):
        p, q = jnp.exp(log_p(ids)), jnp.exp(free)
        guided = jnp.maximum(q + weight * (p - q), 0)
        guided /= jnp.sum(guided, -1, keepdims=True)
        each = -jnp.sum(guided * log_p(ids), -1)
        target = ~model.source(ids)
        wanted = jnp.sum(each * target, -1) / 6
        terms = distillation.loss(
            params, ids, draws, teacher=params, cfg=cfg, schedule=logistic,
            num_steps=n, parts=1, cfg_weight=weight,
        )  # fmt: skip
        np.testing.assert_allclose(terms.total(), wanted, rtol=1e-5)


# --- the command


def _teacher_config(**model_changes):
    config = smoke.get_config()
    config.model.update(known_length=True, time_input="log_snr", **model_changes)
    config.schedule.adaptive = "warp"
    config.data.update(size=200, valid_size=32)
    config.train.update(total_steps=3, ckpt_steps=3, valid_steps=0, sample_steps=0)
    return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation") / "teacher"
    loop.train(_teacher_config(), str(folder))
    return folder


def config_of(teacher, **changes):
    config = distill_config.get_config()
    config.distill.update(
        teacher=str(teacher), num_steps=(4, 2), teacher_steps=8, **changes
    )
    config.train.update(total_steps=2, batch=8, ckpt_steps=1, valid_steps=0)
    config.train.sample_steps = 0
    return config


@pytest.mark.slow
def test_students_are_runs_that_know_their_steps(teacher, tmp_path):
    distill.distill(config_of(teacher), str(tmp_path))
    old = dlm_jax.load(teacher)
    for n in (4, 2):
        lm = dlm_jax.load(tmp_path / f"{n}_steps")
        assert lm.distilled_steps == n
        assert lm.config["sample"]["num_steps"] == n
        np.testing.assert_array_equal(lm.ema.table, old.ema.table)
        for a, b in zip(lm.schedule_state, old.schedule_state, strict=True):
            np.testing.assert_array_equal(a, b)
        moved = jax.tree.map(
            lambda a, b: float(np.abs(a - b).max()), lm.ema.denoiser, old.ema.denoiser
        )
        assert max(jax.tree.leaves(moved)) > 0
        assert lm.sample(2) == lm.sample(2, num_steps=n)
        with pytest.raises(UserError, match=f"num_steps=3: .* distilled for {n} steps"):
            lm.sample(2, num_steps=3)
    assert old.distilled_steps is None
    # a shared copy keeps the number
    lm.save_pretrained(tmp_path / "shared")
    assert dlm_jax.load(tmp_path / "shared").distilled_steps == 2


@pytest.mark.slow
def test_an_interrupted_student_goes_on_to_the_same_bits(
    teacher, tmp_path, monkeypatch
):
    distill.distill(config_of(teacher), str(tmp_path / "whole"))
    steps = []

    class Stop(Exception):
        pass

    save = distill.loop.Trainer.save

    def stopping(self, writer):
        save(self, writer)
        steps.append(int(self.state.step))
        if len(steps) == 3:  # in the second student, after its first step
            distill.checkpoint.wait(writer)
            raise Stop

    monkeypatch.setattr(distill.loop.Trainer, "save", stopping)
    with pytest.raises(Stop):
        distill.distill(config_of(teacher), str(tmp_path / "parts"))
    monkeypatch.setattr(distill.loop.Trainer, "save", save)
    distill.distill(config_of(teacher), str(tmp_path / "parts"))
    for n in (4, 2):
        one, two = (
            dlm_jax.load(tmp_path / name / f"{n}_steps") for name in ("whole", "parts")
        )
        for a, b in zip(
            jax.tree.leaves(one.ema), jax.tree.leaves(two.ema), strict=True
        ):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_another_teacher_is_refused_on_resume(teacher, tmp_path):
    distill.distill(config_of(teacher), str(tmp_path / "run"))
    other = _teacher_config()
    other.seed = 9
    loop.train(other, str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"config\.distill\.teacher: its weights"):
        distill.distill(config_of(tmp_path / "other"), str(tmp_path / "run"))


def test_an_ordinary_run_is_no_student():
    config = _teacher_config()
    config.distill.student = 4
    with pytest.raises(UserError, match=r"config\.distill\.student=4: only --mode"):
        language_job(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": ""}, r"config\.distill\.teacher: name the model"),
        ({"teacher": "nowhere"}, "nowhere: no such folder"),
        ({"num_steps": (3,)}, r"3 steps do not divide the teacher's 8"),
        ({"num_steps": (8,)}, r"8 steps do not divide"),
        ({"num_steps": (2, 4)}, "give falling numbers"),
        ({"num_steps": ()}, "give falling numbers"),
        ({"num_steps": (0,)}, r"num_steps=0: must be 1 or more"),
        ({"teacher_steps": 1}, r"teacher_steps=1: must be 2 or more"),
    ],
)
def test_what_cannot_be_distilled(teacher, tmp_path, change, message):
    config = config_of(teacher)
    config.distill.update(change)
    with pytest.raises(UserError, match=message):
        distill.distill(config, str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cfg": DenoiserConfig()}, "only a diffusion model that predicts logits"),
        ({"cfg": DenoiserConfig(predicts="logits", causal=True)}, "only a diffusion"),
        ({"schedule": schedule.make_schedule("sqrt", num_steps=50)}, "are discrete"),
    ],
)
def test_teachers_of_another_kind(monkeypatch, change, message):
    lm = dataclasses.replace(dlm_jax.load("grammar"), **change)
    monkeypatch.setattr(distill.loading, "load", lambda _: lm)
    with pytest.raises(UserError, match=message):
        distill.load_teacher(config_of("grammar"))


@pytest.mark.slow
def test_a_student_has_its_teachers_table_also_if_that_began_with_a_file(tmp_path):
    config, folder = _teacher_config(), tmp_path / "teacher"
    path = tmp_path / "table.npy"
    loop.train(config, str(folder))
    words = dlm_jax.load(folder).tokenizer.vocab_size
    np.save(path, np.random.default_rng(0).normal(size=(words, config.model.dim)))
    config.embedding.path = str(path)
    loop.train(config, str(tmp_path / "with_a_file"))
    distill.distill(config_of(tmp_path / "with_a_file"), str(tmp_path / "students"))
    old, new = (
        dlm_jax.load(tmp_path / name) for name in ("with_a_file", "students/2_steps")
    )
    np.testing.assert_array_equal(old.ema.table, new.ema.table)


IGNORED = {
    "data.length": 9,
    "data.column": "story",
    "model.layers": 5,
    "schedule.name": "cosine",
    "embedding.frozen": False,
    "sample.num_steps": 4,
    "sample.solver": "ddim",
    "loss.mask_pad": True,
    "loss.objective": "x0",
    "classifier.task": "pos",
    "distill.student": 4,
}


@pytest.mark.parametrize("name", IGNORED)
def test_a_flag_that_the_teacher_decides_is_refused(name, tmp_path):
    config = config_of("grammar")
    given = {name: IGNORED[name], "distill.num_steps": (4, 2), "train.batch": 8}
    config.update_from_flattened_dict(given)
    with pytest.raises(UserError, match=rf"config\.{name}=.*no effect"):
        distill.distill(config, str(tmp_path), given=given)


def test_flags_that_a_student_reads_and_those_of_its_teacher_are_taken(monkeypatch):
    monkeypatch.setattr(distill, "student_steps", lambda config: [])
    lm = dlm_jax.load("grammar")
    given = {
        "model.layers": lm.cfg.layers,
        "train.batch": 4,
        "optim.lr": 1e-4,
        "loss.time_sampler": "uniform",
        "evaluate.n": 8,
        "data.path": "",
    }
    config = config_of("grammar")
    config.update_from_flattened_dict(given)
    distill.distill(config, "unused", given=given)


@pytest.mark.parametrize("mode", ["distill", "train_classifier"])
def test_a_run_without_its_mode_is_refused(mode):
    """Its config alone would train a model of the built-in grammar, in silence."""
    config = _teacher_config()
    section, option = {"distill": ("distill", "teacher")}.get(
        mode, ("classifier", "model")
    )
    config[section][option] = "grammar"
    with pytest.raises(UserError, match=f"{option}=grammar: only --mode {mode} reads"):
        language_job(config)
