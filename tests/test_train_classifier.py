# SPDX-License-Identifier: Apache-2.0
"""Classifiers by the command: they learn, resume exactly, and their push is felt."""

import json
import shutil

import jax
import numpy as np
import pytest
from scipy import stats

import dlm_jax
from dlm_jax.configs import classifier as classifier_config
from dlm_jax.configs import smoke
from dlm_jax.data import annotations
from dlm_jax.diffusion import classifier
from dlm_jax.errors import UserError
from dlm_jax.inference import conditioning
from dlm_jax.inference.constraints import Constraints
from dlm_jax.inference.guidance_config import GuidanceConfig
from dlm_jax.runtime import checkpoint, logging
from dlm_jax.training import loop, train_step
from dlm_jax.training import train_classifier as command
from dlm_jax.training.trainer import Trainer, language_job
from dlm_jax.types import PAD

pytestmark = pytest.mark.slow

LENGTH, STEPS = 8, 120
ANIMALS = {"land": ["cat", "dog", "cow"], "sea": ["cod", "eel", "ray"]}


def smoke_of(folder):
    """The model's config."""
    config = smoke.get_config()
    path = str(folder / "texts.jsonl")
    config.data.update(source="jsonl", path=path, length=LENGTH)
    config.model.update(layers=1, hidden_dim=32, mlp_dim=32, dim=8, positions=LENGTH)
    config.train.update(total_steps=60, batch=32, valid_steps=0, sample_steps=0)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of sentences whose label is the animals' home, trained for a moment."""
    folder, rng = tmp_path_factory.mktemp("classifier"), np.random.default_rng(0)
    rows = []
    for i in range(400):
        home = ["land", "sea"][i % 2]
        a, b = rng.choice(ANIMALS[home], 2)
        rows.append({"text": f"a {a} sees the {b} now", "label": home})
    path = folder / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    loop.train(smoke_of(folder), str(folder / "model"))
    return folder


def config_of(folder, **values):
    config = classifier_config.get_config("label")
    config.model.update(layers=1, hidden_dim=32, mlp_dim=32, heads=2, time_dim=16)
    config.train.update(
        total_steps=STEPS, batch=32, ckpt_steps=60, valid_steps=60, valid_batches=1
    )
    config.optim.ema = 0.9
    config.classifier.update(model=str(folder / "model"))
    config.update_from_flattened_dict(values)
    return config


@pytest.fixture(scope="module")
def trained(folder):
    command.train_classifier(config_of(folder), str(folder / "label"))
    return folder / "label"


def test_it_learns_what_the_words_say(trained):
    rows = logging.read(trained / "metrics.jsonl", "valid")
    assert (
        rows[-1]["nll"] < 0.5
    )  # of log 2 = 0.69 nats; at high noise nothing can be known
    assert rows[-1]["accuracy"] > 0.7


def test_a_stopped_run_goes_on_to_the_same_weights(folder, trained):
    config, other = config_of(folder), str(folder / "again")
    config.train.ckpt_steps = 60
    halved = Trainer(command.classifier_job(config), other)
    step_fn = halved.layout.step(
        lambda key, state, rows: train_step.train_step(
            key, state, rows, step_cfg=halved.step_cfg, axis=halved.layout.axis
        ),
        halved.state,
    )
    for step in range(60):
        halved.state, _ = step_fn(
            jax.random.key(config.seed), halved.state, halved.batch(step)
        )
    writer = checkpoint.manager(other, keep=2)
    halved.save(writer)
    writer.close()
    command.train_classifier(config_of(folder), other)
    lm = dlm_jax.load(folder / "model")
    one, two = (
        conditioning.load_classifier(path, lm.ema.table).params
        for path in (trained, other)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_cut_text_keeps_its_labels(folder, tmp_path):
    """Classifiers of prefixes (FUDGE): the ids end early, the labels stand."""
    config = config_of(folder, **{"loss.truncate_prob": 1.0})
    run = Trainer(command.classifier_job(config), str(tmp_path))
    seen = []

    def terms(key, params, rows, draws, step_cfg):
        seen.append(rows)
        return run.step_cfg.task.terms(key, params, rows, draws, step_cfg)

    step_cfg = run.step_cfg._replace(task=run.step_cfg.task._replace(terms=terms))
    rows = np.asarray(run.batch(0))[0]
    with jax.disable_jit():
        train_step.train_step(jax.random.key(0), run.state, rows, step_cfg=step_cfg)
    got = np.asarray(seen[0])
    assert (got[:, LENGTH:] == rows[:, LENGTH:]).all()
    cut = got[:, :LENGTH] != rows[:, :LENGTH]
    assert cut.any()
    assert (got[:, :LENGTH][cut] == PAD).all()


def log_probs(lm, wanted, guidance, n=64):
    """log p(label | text) of each of n texts, at the least noise, and the texts."""
    params, cfg, vocab = lm.classifiers["label"]
    row = annotations.TARGET_ENCODERS["label"]({"label": wanted}, vocab)
    labels = np.repeat(row[None], n, 0)
    drawn = lm.generate(
        n,
        seed=0,
        num_steps=16,
        batch=n,
        constraints=Constraints(labels={"label": labels}),
        guidance=guidance,
    )
    of = classifier.log_prob(params, cfg, vocab.head_spec, labels, lm.schedule)
    clean = lm.ema.table[drawn.ids]
    return np.asarray(of(clean, np.zeros(n, np.float32))), drawn.texts


@pytest.mark.parametrize("home", ["land", "sea"])
def test_guidance_raises_the_log_probability(folder, trained, home):
    lm = dlm_jax.load(folder / "model").with_classifier(trained)
    free, weak, usual = (
        log_probs(lm, home, GuidanceConfig(lr=lr))[0]
        for lr in (0.0, 0.1, GuidanceConfig().lr)
    )
    assert free.mean() < weak.mean() < usual.mean()
    for low, high in ((free, weak), (free, usual)):  # the same seeds: paired
        assert stats.ttest_rel(high, low, alternative="greater").pvalue < 1e-3
    texts = lm.control(32, label={"label": home}, seed=4, num_steps=16)
    words = [word for text in texts for word in text.split()]
    mine, other = (
        sum(w in ANIMALS[h] for w in words)
        for h in (home, {"land": "sea", "sea": "land"}[home])
    )
    assert mine > 2 * other


def test_bad_beginnings(folder, trained, tmp_path):
    with pytest.raises(UserError, match=r"config\.classifier\.model: name the run"):
        command.train_classifier(
            config_of(folder, **{"classifier.model": ""}), str(tmp_path)
        )
    for change, message in (
        ({"classifier.task": "semantic"}, "records"),
        ({"loss.time_sampler": "importance"}, "importance"),
        ({"model.self_cond": True}, "take --config classifier"),
        ({"data.path": "nothing.csv", "data.source": "csv"}, r"nothing\.csv"),
        ({"classifier.texts": -1}, r"config\.classifier\.texts=-1"),
    ):
        with pytest.raises(UserError, match=message):
            command.train_classifier(config_of(folder, **change), str(tmp_path))
    with pytest.raises(UserError, match=r"was begun with config\.model\.hidden_dim=32"):
        command.train_classifier(
            config_of(folder, **{"model.hidden_dim": 64}), str(trained)
        )


def test_labels_of_other_text_than_the_model_was_trained_on(folder, tmp_path):
    path = tmp_path / "own.csv"
    path.write_text(
        "text,label\n" + "a cat sees the dog now,x\na cod sees now,y\n" * 9,
        encoding="utf-8",
    )
    changes = {"data.source": "csv", "data.path": str(path), "train.total_steps": 2}
    command.train_classifier(config_of(folder, **changes), str(tmp_path / "run"))
    found = conditioning.load_classifier(
        tmp_path / "run", dlm_jax.load(folder / "model").ema.table
    )
    assert found.vocab.classes == {"label": ["x", "y"]}


def test_a_path_alone_moves_the_models_own_text(folder):
    """It is read as the model's text was, although the default source has no path."""
    lm = dlm_jax.load(folder / "model")
    own = lm.config["data"]["source"]
    assert own != "grammar"
    config = config_of(folder, **{"data.path": "elsewhere"})
    config.data.source = "grammar"
    config = command.with_base_settings(config, lm)
    assert (config.data.source, config.data.path) == (own, "elsewhere")


def test_a_model_that_moved_on_is_noticed(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    changes = {"classifier.model": str(model), "train.total_steps": 2}
    command.train_classifier(config_of(folder, **changes), str(tmp_path / "run"))
    run = Trainer(language_job(smoke_of(folder)), str(model))
    moved = jax.tree.map(lambda x: x + 1, (run.state.params, run.state.ema))
    step = run.state.step + 1
    run.state = run.state._replace(step=step, params=moved[0], ema=moved[1])
    writer = checkpoint.manager(model, keep=2)
    run.save(writer)
    writer.close()
    with pytest.raises(
        UserError, match=r"config\.classifier\.model: its embedding is not the one"
    ):
        command.train_classifier(config_of(folder, **changes), str(tmp_path / "run"))


def test_of_another_table_or_no_classifier(folder, trained):
    lm = dlm_jax.load(folder / "model")
    with pytest.raises(UserError, match="holds a diffusion model: train a classifier"):
        lm.with_classifier(folder / "model")
    with pytest.raises(UserError, match="another embedding table"):
        conditioning.load_classifier(trained, lm.ema.table + 1)
    with pytest.raises(UserError, match="a classifier"):
        dlm_jax.load(trained)


IGNORED = {
    "data.length": 9,
    "data.size": 50,
    "data.tokenizer": "sentencepiece",
    "data.valid_fraction": 0.5,
    "schedule.name": "cosine",
    "model.dim": 4,
    "model.positions": 9,
    "model.known_length": True,
    "loss.objective": "ce",
    "embedding.path": "table.npy",
    "sample.n": 4,
    "distill.teacher": "grammar",
}


@pytest.mark.parametrize("name", IGNORED)
def test_a_flag_that_the_model_decides_is_refused(name, tmp_path):
    config = classifier_config.get_config("pos")
    given = {name: IGNORED[name], "classifier.model": "grammar", "model.layers": 1}
    config.update_from_flattened_dict(given)
    with pytest.raises(UserError, match=rf"config\.{name}=.*no effect"):
        command.train_classifier(config, str(tmp_path), given=given)


def test_flags_that_a_classifier_reads_are_taken(folder, tmp_path):
    """Those of its network and labels, the place of its texts, and the model's own."""
    path = tmp_path / "own.csv"
    rows = "a cat sees the dog now;x\na cod sees now;y\n" * 9
    path.write_text("text;home\n" + rows, encoding="utf-8")
    given = {
        "data.source": "csv",
        "data.path": str(path),
        "data.delimiter": ";",
        "data.valid_fraction": 0.2,
        "data.length": LENGTH,
        "classifier.column": "home",
        "model.layers": 1,
        "train.total_steps": 2,
    }
    config = config_of(folder, **given)
    command.train_classifier(config, str(tmp_path / "run"), given=given)


def test_a_model_of_pairs_takes_no_classifier(tmp_path):
    config = classifier_config.get_config("pos")
    config.classifier.model = "e2e_mr"
    with pytest.raises(UserError, match="e2e_mr: a model of pairs"):
        command.train_classifier(config, str(tmp_path))
