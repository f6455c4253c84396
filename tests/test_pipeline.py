# SPDX-License-Identifier: Apache-2.0
"""Models: text i follows from (seed, i), a setting compiles once, mistakes are named."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import dlm_jax
from dlm_jax.configs import smoke
from dlm_jax.data.tokenizer import SPECIALS, WordTokenizer
from dlm_jax.diffusion import samplers
from dlm_jax.errors import UserError
from dlm_jax.inference import loading
from dlm_jax.inference.sampling_config import SamplingConfig, default_section
from dlm_jax.runtime import checkpoint
from dlm_jax.training.trainer import Trainer, language_job

LENGTH, DIM, T = 6, 8, 20


def _config(folder):
    path = folder / "texts.txt"
    path.write_text(
        "".join(f"w{i % 7} and w{i % 5}\n" for i in range(32)), encoding="utf-8"
    )
    config = smoke.get_config()
    config.data.update(source="text", path=str(path), length=LENGTH)
    config.model.update(layers=1, hidden_dim=16, mlp_dim=16, dim=DIM, positions=LENGTH)
    config.schedule.update(name="sqrt", num_steps=T, mean=0.0, scale=0.0, adaptive="")
    config.model.time_input = "t"
    config.sample.update(n=3, batch=4, num_steps=4)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run's directory with one checkpoint, whose average differs from the weights."""
    folder = tmp_path_factory.mktemp("generate")
    run = Trainer(language_job(_config(folder)), str(folder / "run"))
    ema = jax.tree.map(lambda x: x + 0.1, run.state.ema)
    run.state = run.state._replace(step=run.state.step + 7, ema=ema)
    writer = checkpoint.manager(folder / "run", keep=1)
    run.save(writer)
    writer.close()
    return folder / "run"


@pytest.fixture(scope="module")
def lm(workdir):
    return dlm_jax.load(workdir)


def test_load(workdir, lm):
    assert lm.step == 7
    assert lm.length == LENGTH
    assert lm.config["train"]["batch"] == 16
    difference = lm.ema.table - lm.params.table
    np.testing.assert_allclose(difference, 0.1, atol=1e-6)
    again = dlm_jax.load(str(workdir), step=7)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (lm.ema, again.ema))))


def test_texts_hold_no_specials(lm):
    texts = lm.sample(9, seed=3)
    assert len(texts) == 9
    assert len(set(texts)) > 1
    words = {word for text in texts for word in text.split()}
    assert words
    assert words <= set(lm.tokenizer.words)
    assert not words & set(SPECIALS)


def test_a_text_depends_on_its_seed_and_number(lm):
    """Not on how many are drawn, nor on the batch they are drawn in."""
    whole = lm.generate(8, seed=0, batch=8)
    for n, batch in ((3, 4), (8, 3), (1, 4)):
        part = lm.generate(n, seed=0, batch=batch)
        np.testing.assert_array_equal(part.ids, whole.ids[:n])
        np.testing.assert_allclose(part.latents, whole.latents[:n], atol=1e-4)
        assert part.texts == whole.texts[:n]
    assert len(set(whole.texts)) > 4
    assert lm.sample(8, seed=1, batch=8) != whole.texts


def test_samples_from_the_average(lm):
    mine = lm.generate(4, seed=0).latents
    swapped = dataclasses.replace(lm, ema=lm.params, params=lm.ema)
    assert not np.allclose(mine, swapped.generate(4, seed=0).latents, atol=1e-3)


def test_shapes_and_trajectory(lm):
    plain, traced = (
        lm.generate(3, num_steps=5, trajectory=wanted) for wanted in (False, True)
    )
    assert plain.ids.shape == (3, LENGTH)
    assert plain.latents.shape == (3, LENGTH, DIM)
    assert plain.trajectory is None
    assert traced.trajectory.shape == (3, 5, LENGTH)
    np.testing.assert_array_equal(traced.trajectory[:, -1], plain.ids)


def test_compiles_once_for_each_batch_and_setting(workdir):
    lm = dlm_jax.load(workdir)

    def compilations():
        return sum(run._cache_size() for run in lm.compiled.values())

    for seed in range(3):
        lm.sample(4, seed=seed)
        lm.sample(7, seed=seed)  # two batches of four
    assert compilations() == 1
    lm.sample(2)
    assert compilations() == 2
    lm.sample(4, num_steps=5)
    assert compilations() == 3


@pytest.mark.parametrize("solver", samplers.SOLVERS)
def test_every_solver_ends_on_finite_latents(solver, lm):
    found = lm.generate(
        2, solver=solver, clamp=solver == "marginal", rounding="nearest"
    )
    assert np.isfinite(found.latents).all()
    assert samplers.solver_options(solver).keys() <= default_section().keys()


def test_clamp_ends_on_word_vectors(lm):
    """The last estimate is a row of the table, unless the clamp is off."""
    table = np.asarray(lm.ema.table)
    for clamp, snapped in ((True, True), (0.0, True), (False, False)):
        found = lm.generate(2, clamp=clamp, rounding="nearest")
        assert np.array_equal(found.latents, table[found.ids]) is snapped


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n": 0}, "n=0"),
        ({"n": -1}, "n=-1"),
        ({"num_steps": 0}, "num_steps=0"),
        (
            {"num_steps": T + 1},
            f"num_steps={T + 1}: this model's schedule has only {T} steps",
        ),
        ({"batch": 0}, "batch=0"),
        ({"solver": "euler"}, "solver='euler': choose one of ancestral"),
        ({"solver": "ancestral", "sigma": "huge"}, "sigma='huge'"),
        ({"sigma": "small"}, "sigma: solver 'marginal' does not take it"),
        ({"rounding": "up"}, "rounding='up'"),
    ],
)
def test_wrong_settings(settings, says, lm):
    with pytest.raises(UserError, match=says) as caught:
        lm.sample(**({"n": 2} | settings))
    assert "\n" not in str(caught.value)


# --- loading what cannot be loaded


def _fails(says, *args):
    with pytest.raises(UserError, match=says) as caught:
        dlm_jax.load(*args)
    assert "\n" not in str(caught.value)


def test_load_of_nothing(tmp_path, workdir):
    _fails("no checkpoint", tmp_path)
    _fails("no checkpoint", tmp_path / "none")
    _fails(r"no step 3; choose one of \[7\]", workdir, 3)
    assert not list(tmp_path.iterdir())


def test_tokenizer_of_another_run(tmp_path, workdir, lm):
    """Whether it is exchanged in the checkpoint or handed over."""
    other = WordTokenizer((*lm.tokenizer.words, "more"))
    with pytest.raises(UserError, match="not of one checkpoint"):
        loading.from_parts(lm.cfg, lm.params, other, lm.config)
    copy = shutil.copytree(workdir, tmp_path / "run")
    path = checkpoint.folder(copy) / "7" / "tokenizer" / "metadata"
    path.write_text(json.dumps(other.to_dict()), encoding="utf-8")
    _fails("checkpoints/7: damaged", copy)


def test_a_config_sets_no_option_of_another_solver():
    """Nothing that a user sets is ignored silently; defaults may stay."""
    section = default_section() | {"solver": "marginal"}
    assert SamplingConfig.from_config(section).solver_options == ()
    for option in ({"eta": 0.5}, {"top_p": 0.5}, {"sigma": "large"}):
        (name,) = option
        with pytest.raises(UserError, match=f"{name}: solver 'marginal' does not take"):
            SamplingConfig.from_config(section | option)
        # another solver for one call leaves the config as it is
        SamplingConfig.from_config(section | option, solver="dpmpp_2m")
