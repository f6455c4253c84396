# SPDX-License-Identifier: Apache-2.0
"""Models that are given the length: masks, batches by length, sampling, the bound."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_jax
from dlm_jax.configs import smoke
from dlm_jax.data import batching, encoding, grammar
from dlm_jax.diffusion import guidance, likelihood, losses, model, schedule
from dlm_jax.diffusion.time_sampling import draw_noise
from dlm_jax.errors import UserError
from dlm_jax.evaluation import exact
from dlm_jax.inference import constraints, loading
from dlm_jax.inference.guidance_config import GuidanceConfig
from dlm_jax.training import loop
from dlm_jax.training.config import resolve_config
from dlm_jax.training.trainer import Trainer, language_job
from dlm_jax.types import END, PAD, START

LENGTH = 32


def _config(**changes):
    config = smoke.get_config()
    config.data.size = 2000
    config.model.update(known_length=True, time_input="log_snr", layers=1)
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A run of the grammar that has not trained yet."""
    return Trainer(language_job(_config()), str(tmp_path_factory.mktemp("known") / "r"))


@pytest.fixture(scope="module")
def lm(trainer):
    """An untrained model, whose layers do something."""
    params = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape),
        trainer.state.params,
    )
    record = trainer.record
    return loading.from_parts(
        trainer.step_cfg.cfg,
        params,
        trainer.corpus.tokenizer,
        record,
        lengths=batching.count_lengths(trainer.corpus.train),
    )


def _rows(lm, texts, length=LENGTH):
    options = {"length": length, "mode": "pad", "too_long": "error"}
    return encoding.encode(texts, lm.tokenizer, **options)


def test_a_text_does_not_depend_on_its_padding(lm):
    """Loss and estimate are those of the row cut after its END."""
    texts = ["Aromi is a cheap pub .", "The Mill is a pub ."]
    wide, narrow = _rows(lm, texts), _rows(lm, texts, 12)
    draws = draw_noise(jax.random.key(0), (2, LENGTH, lm.cfg.dim), total=2)
    cut = draws._replace(eps_0=draws.eps_0[:, :12], eps_t=draws.eps_t[:, :12])
    options = {"cfg": lm.cfg, "schedule": lm.schedule, "objective": "ce"}
    a = losses.end_to_end(lm.ema, wide, draws, **options)
    b = losses.end_to_end(lm.ema, narrow, cut, **options)
    np.testing.assert_allclose(a.total(), b.total(), rtol=2e-5)


def test_the_frame_is_seen_and_not_scored(lm):
    """Noise on START, END and PAD changes nothing: they are known."""
    ids = jnp.asarray(_rows(lm, ["Aromi is a cheap pub ."]))
    draws = draw_noise(jax.random.key(0), (1, LENGTH, lm.cfg.dim), total=1)
    frame = model.frame(ids)
    assert int(frame.sum()) == LENGTH - 6
    noisy = draws._replace(eps_t=jnp.where(frame[..., None], 9.0, draws.eps_t))
    options = {"cfg": lm.cfg, "schedule": lm.schedule, "objective": "ce"}
    a, b = (losses.end_to_end(lm.ema, ids, d, **options) for d in (draws, noisy))
    np.testing.assert_array_equal(a.total(), b.total())


def test_length_reaches_the_network(lm):
    """The same noisy words under two lengths give two estimates."""
    x_t = jax.random.normal(jax.random.key(1), (2, LENGTH, lm.cfg.dim))
    x_t = x_t.at[1].set(x_t[0])
    place, end = jnp.arange(LENGTH), jnp.array([[8], [20]])
    t = jnp.where(place > end, model.AT_OUTSIDE, 0.5)
    t = jnp.where((place == 0) | (place == end), model.AT_KNOWN, t)
    raw = model.apply(lm.ema, lm.cfg, x_t, t, 0 * x_t, schedule=lm.schedule)
    assert float(jnp.max(jnp.abs(raw[0, 1:8] - raw[1, 1:8]))) > 1e-3


def test_a_template_of_the_length_is_the_frame_of_the_text(lm):
    """What sampling knows of a text is what training showed of it."""
    ids = jnp.asarray(_rows(lm, grammar.sample(1, 3)))
    known = model.frame(ids)
    words = jnp.sum(~known, -1)
    template, mask = guidance.length_template(words, LENGTH)
    np.testing.assert_array_equal(mask, known)
    denoise = model.bind(lm.ema, lm.cfg, schedule=lm.schedule)
    x_t = jax.random.normal(jax.random.key(2), (3, LENGTH, lm.cfg.dim))
    x_t = x_t.at[0, 1].set(0.3)
    a, b = (
        guidance.condition_on_tokens(
            denoise, lm.ema.table, i, mask, outside=(i == PAD) & mask
        )(x_t, jnp.full(3, 0.5), 0 * x_t)
        for i in (ids, template)
    )
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("hosts", [1, 2])
def test_batches_have_similar_lengths_and_every_row_once(hosts):
    lengths = np.random.default_rng(0).integers(5, 30, 8 * 16 * 4)
    steps = [
        np.concatenate(
            [
                batching.batch_index(
                    len(lengths),
                    seed=3,
                    step=step,
                    batch=8,
                    host=host,
                    hosts=hosts,
                    lengths=lengths,
                )
                for host in range(hosts)
            ]
        )
        for step in range(64)
    ]
    assert sorted(np.concatenate(steps)) == list(range(len(lengths)))
    spread = [np.ptp(lengths[rows]) for rows in steps]
    assert np.mean(spread) < 4 < np.ptp(lengths)
    means = [lengths[rows].mean() for rows in steps]
    assert np.any(np.diff(means) < -2)  # the order of lengths is random
    again = batching.batch_index(len(lengths), seed=3, step=9, batch=8, lengths=lengths)
    assert sorted(again) == sorted(steps[9])


def test_a_batch_is_cut_to_a_few_widths(trainer):
    assert trainer.widths[-1] == LENGTH
    assert len(trainer.widths) <= 3
    shapes = set()
    for step in range(16):
        rows = np.asarray(trainer.batch(step)).reshape(
            -1, trainer.batch(step).shape[-1]
        )
        shapes.add(rows.shape[1])
        whole = trainer.corpus.train[trainer.row_index(step, hosts=1).ravel()]
        np.testing.assert_array_equal(rows, whole[:, : rows.shape[1]])
        assert np.all(whole[:, rows.shape[1] :] == PAD)
    assert len(shapes) > 1
    assert shapes <= set(trainer.widths)


def test_samples_have_the_lengths_of_the_training_texts(lm):
    out = lm.generate(200, seed=0, num_steps=2)
    sizes = np.array([len(text.split()) for text in out.texts])
    frame = (out.ids == END).argmax(-1) - 1
    np.testing.assert_array_equal(sizes, frame)
    assert np.all(out.ids[:, 0] == START)
    share = np.array(lm.lengths) / sum(lm.lengths)
    mean = share @ np.arange(len(share)) - 2
    assert abs(sizes.mean() - mean) < 5 * sizes.std() / np.sqrt(200)
    assert lm.sample(3, seed=0, num_steps=2) == out.texts[:3]
    assert np.ptp(sizes) > 5
    ids, known = map(np.asarray, guidance.length_template(sizes[:8], LENGTH))
    allowed = constraints.allowed_tokens(ids, known, lm.tokenizer.vocab_size)
    rows = constraints.Constraints(ids, known, allowed)
    own = lm.generate(8, seed=0, num_steps=2, constraints=rows)
    assert own.texts == out.texts[:8]  # as under that length


def test_constraints_of_every_kind(lm):
    found = lm.infill("The ___ is a [...] pub [...]", n=4, seed=0, num_steps=2)
    assert all(text.startswith("The ") and " is a " in text for text in found)
    assert len({len(text.split()) for text in found}) > 1
    assert all(lm.lengths[len(text.split()) + 2] for text in found)
    (fixed,) = lm.infill("The ___ is a pub .", n=1, num_steps=2)
    assert len(fixed.split()) == 6
    for text in lm.control(3, length=9, contains="cheap pub", num_steps=2):
        assert len(text.split()) == 9
    assert len(lm.control(2, lacks="cheap", num_steps=2)) == 2
    for guided in (
        GuidanceConfig(token_time_floor=0.5),
        GuidanceConfig(cfg_weight=2.0),
    ):
        with pytest.raises(UserError, match=r"token_time_floor|cfg_weight"):
            lm.control(1, length=9, guidance=guided)
    with pytest.raises(UserError, match="the template needs"):
        lm.infill("[...] " + "pub " * 40, n=1)


def test_the_bound_counts_the_length(lm):
    """The shares of all lengths sum to one, and the frame costs nothing else."""
    texts = grammar.sample(0, 3)
    ids = _rows(lm, texts)
    terms = lm.nll(ids)
    share = np.array(lm.lengths) / sum(lm.lengths)
    sizes = [len(text.split()) + 2 for text in texts]
    np.testing.assert_allclose(terms.length, -np.log(share[sizes]), rtol=0.02)
    np.testing.assert_allclose(
        terms.total(), sum(np.asarray(x) for x in terms), rtol=1e-6
    )


@pytest.mark.slow
def test_the_bound_of_the_exact_denoiser_given_the_length(lm):
    """-log p(length) and the bound of the words make -log p(text)."""
    schedule_ = schedule.logistic(3.4, 0.7)
    rows = jax.random.normal(jax.random.key(0), (lm.tokenizer.vocab_size, 32))
    table = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True) * np.sqrt(32)
    texts = grammar.sample(5, 96)
    predict = exact.exact_predictor(table, schedule_, lm.tokenizer)
    ids, key = jnp.asarray(_rows(lm, texts)), jax.random.key(1)
    options = {"draws": 24, "given": model.given_tokens(ids, lm.cfg)}
    terms, _ = likelihood.bound(key, ids, table, predict, schedule_, **options)
    sizes = np.array([len(t.split()) for t in grammar.sample(6, 50_000)])
    length = np.array([-np.log(np.mean(sizes == len(t.split()))) for t in texts])
    nats = -np.array([grammar.log_prob(text) for text in texts])
    excess = np.asarray(terms.total()) + length - nats
    error = excess.std(ddof=1) / np.sqrt(len(texts))
    assert abs(excess.mean()) < 5 * error
    assert error < 0.04 * nats.mean()


def test_what_it_cannot_be_combined_with():
    for changes, says in (
        ({"data.mode": "block"}, "mode=pad"),
        ({"loss.objective": "nelbo"}, "objective 'ce'"),
    ):
        with pytest.raises(UserError, match=says):
            resolve_config(_config(**changes))
    with pytest.raises(UserError, match="in memory"):
        batching.row_lengths(object())


@pytest.mark.slow
def test_trains_resumes_and_samples(tmp_path):
    """A run in two halves has the bits of a whole one; what is loaded samples alike."""
    texts = []
    for name, steps in (("whole", (12,)), ("halves", (6, 12))):
        for total in steps:
            config = _config(**{"train.total_steps": total, "optim.decay": "constant"})
            config.train.update(ckpt_steps=6, valid_steps=0, sample_steps=0)
            loop.train(config, str(tmp_path / name))
        model_ = dlm_jax.load(tmp_path / name)
        texts.append(model_.sample(4, seed=1, num_steps=4))
    assert texts[0] == texts[1]
    ids = _rows(model_, grammar.sample(3, 8))
    rows = exact.gap_rows(model_, ids, np.full(8, 18))
    assert all(0 < row.mean < 10 for row in rows.values())
    assert len(rows) == 6


def test_tags_and_trees_give_their_length(lm):
    """Only to a network that is given lengths; another learns them from the labels."""
    tree = {"tree": [(0, 1, "NP"), (0, 6, "S")]}
    assert constraints.give_length({"pos": ["NOUN"] * 7}, lm.cfg)["length"] == 7
    assert constraints.give_length(tree, lm.cfg)["length"] == 7
    assert constraints.give_length({"lacks": ["pub"]}, lm.cfg) == {"lacks": ["pub"]}
    without = dataclasses.replace(lm.cfg, known_length=False)
    assert constraints.give_length(tree, without) == tree


def test_allowed_tokens_stay_if_the_length_is_drawn(lm):
    """They were overwritten by the mask of any word."""
    vocab = lm.tokenizer.vocab_size
    allowed = np.ones((4, lm.length, vocab), bool)
    allowed[:, 1] = np.arange(vocab) == 7
    out = lm.generate(
        4, constraints=constraints.Constraints(allowed=allowed), num_steps=2
    )
    assert (out.ids[:, 1] == 7).all()


def test_drawn_lengths_have_room_for_phrases_and_constituents(lm):
    chart = np.full((2, LENGTH, LENGTH), -1)
    chart[1, 3, 21] = 5  # a constituent that ends with word 21
    phrases = (np.array([[7, 8, 9, -1], [7, -1, -1, -1]]),)
    rows = constraints.Constraints(phrases=phrases, labels={"tree": chart})
    least = constraints.least_words(rows, 2)
    np.testing.assert_array_equal(least, [3, 21])
    least = np.repeat([20, 1], 50)
    drawn = constraints.draw_word_counts(lm.lengths, 100, 0, range(1, 31), least)
    free = constraints.draw_word_counts(lm.lengths, 100, 0, range(1, 31))
    assert min(drawn[:50]) >= 20 > min(free[:50])
    assert drawn[50:] == free[50:]
    with pytest.raises(UserError, match="no training text has 31 to 30 words"):
        constraints.draw_word_counts(lm.lengths, 1, 0, range(1, 31), [31])
