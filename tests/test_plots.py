# SPDX-License-Identifier: Apache-2.0
"""Plots: the files are there, and their numbers are what they say."""

import dataclasses
import json
import struct

import jax
import numpy as np
import pytest

from dlm_jax.configs import smoke
from dlm_jax.data import sources, tokenizer
from dlm_jax.diffusion import embedding, losses, model, samplers, time_sampling
from dlm_jax.errors import UserError
from dlm_jax.evaluation import plots
from dlm_jax.inference import loading
from dlm_jax.nn.transformer import DenoiserConfig


def init(cfg, vocab):
    """Small random weights and a table on the sphere, without a compilation."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), cfg, vocab))
    params = jax.tree.map(
        lambda s: 0.1 * rng.standard_normal(s.shape, np.float32), shapes
    )
    rows = rng.standard_normal((vocab, cfg.dim), np.float32)
    return params._replace(table=np.asarray(embedding.unit_rows(rows)))


def build(**change):
    """A tiny untrained model on the grammar; change: of the config's parts."""
    config = smoke.get_config()
    config.data.update(size=50, valid_size=12)
    config.model.update(dim=6, hidden_dim=8, layers=1, heads=2, mlp_dim=8, time_dim=4)
    config.sample.update(num_steps=5)
    for part, values in change.items():
        config[part].update(values)
    record = json.loads(config.to_json_best_effort())
    tok = sources.train_tokenizer(config.data, sources.load_texts(config.data, "train"))
    cfg = DenoiserConfig(**record["model"])
    params = init(cfg, tok.vocab_size)
    return loading.from_parts(cfg, params, tok, record)


@pytest.fixture(scope="module")
def lm():
    return build()


def test_all_plots_are_png_files_of_a_sane_size(lm, tmp_path, capsys):
    rows = [
        {"step": step, "kind": kind, "loss": 4.0 - step}
        for step in (1, 2)
        for kind in ("train", "valid")
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines + "\n", encoding="utf-8")
    paths = plots.save_plots(lm, tmp_path)
    names = ["embedding.png", "film.png", "loss_over_t.png", "training.png"]
    assert [path.name for path in paths] == names
    for path in paths:
        raw = path.read_bytes()
        assert raw[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", raw[16:24])
        assert 500 < width < 3000
        assert 200 < height < 3000
        assert len(raw) > 8000
    assert "same part of speech" in capsys.readouterr().out


def with_data(lm, **change):
    """The same model, with its compiled chains, under other data."""
    config = lm.config | {"data": lm.config["data"] | change}
    return dataclasses.replace(lm, config=config)


def test_what_cannot_be_drawn_is_left_out_with_a_line(lm, tmp_path, capsys):
    missing = str(tmp_path / "gone.txt")
    lm = with_data(lm, source="text", path=missing)
    names = [path.name for path in plots.save_plots(lm, tmp_path)]
    assert names == ["embedding.png", "film.png"]
    assert f"no plot of the loss over t: {missing}" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "ki', encoding="utf-8")
    assert plots.training(tmp_path / "metrics.jsonl") is None
    assert "has no complete row" in capsys.readouterr().out
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="file/plots"):
        plots.save_plots(lm, tmp_path / "file")


def test_neighbour_agreement_of_clusters_is_one():
    rng = np.random.default_rng(0)
    tags = [tag for tag in "abcd" for _ in range(10)]
    centres = np.repeat(np.eye(4), 10, 0)
    # lengths do not count: words are compared by angle
    lengths = rng.uniform(0.1, 10.0, (40, 1))
    table = lengths * (centres + 0.01 * rng.standard_normal((40, 4)))
    assert plots.neighbour_agreement(table, tags) == 1.0
    assert plots.neighbour_agreement(table, tags[1:] + tags[:1]) < 1.0


def test_neighbour_agreement_of_a_random_table_is_chance():
    tags = ["a"] * 30 + ["b"] * 20 + ["c"] * 10
    want = (30 * 29 + 20 * 19 + 10 * 9) / (60 * 59)
    np.testing.assert_allclose(plots.chance_agreement(tags), want, rtol=1e-12)
    rng = np.random.default_rng(1)
    found = [
        plots.neighbour_agreement(rng.standard_normal((60, 8)), tags)
        for _ in range(200)
    ]
    error = np.std(found, ddof=1) / len(found) ** 0.5
    assert abs(np.mean(found) - want) < 5 * error


def test_principal_components_of_a_plane():
    rng = np.random.default_rng(2)
    plane = rng.standard_normal((30, 2))
    basis, _ = np.linalg.qr(rng.standard_normal((5, 2)))
    points, share = plots.principal(plane @ basis.T)
    np.testing.assert_allclose(share, 1.0, rtol=1e-12)

    def distances(x):
        return np.linalg.norm(x[:, None] - x[None], axis=-1)

    np.testing.assert_allclose(distances(points), distances(plane), atol=1e-12)


def test_spread_parts_labels_and_leaves_the_others():
    centres = np.array([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [100.0, 100.0]])
    boxes = np.tile([[20.0, 10.0]], (4, 1))
    moved = plots.spread(centres, boxes)
    gaps = np.abs(moved[:, None] - moved[None]) - boxes[0]
    apart = np.max(gaps, -1) > -1.0
    assert np.all(apart | np.eye(4, dtype=bool))
    np.testing.assert_array_equal(moved[3], centres[3])


@pytest.mark.parametrize("num_steps", [0, 20])
def test_the_last_line_of_the_film_is_the_text(lm, num_steps):
    if num_steps:
        lm = build(schedule={"name": "sqrt", "num_steps": num_steps, "scale": 0.0})
    frames = plots.frames(lm, seed=3)
    assert "".join(frames[-1].words).strip() == lm.sample(1, seed=3)[0]
    assert frames[-1].words
    assert all(frames[-1].final)
    assert not all(frames[0].final)
    t = [frame.t for frame in frames]
    times = samplers.schedule_timesteps(lm.schedule, 5)
    np.testing.assert_array_equal(t, times.now)


def test_a_frame_ends_at_end_and_leaves_start_and_padding_out(lm):
    tokens = lm.tokenizer.tokens()
    ids, last = np.array([0, 4, 3, 5, 6, 1, 7]), np.array([0, 4, 3, 9, 6, 1, 7])
    frame = plots._frame(lm, 0.5, ids, last)
    assert frame.words == [" " + tokens[i] for i in (4, 5, 6)]
    assert frame.final == [True, False, True]
    assert plots._frame(lm, 0.5, np.array([1, 4]), last[:2]).words == []


def test_the_words_of_pieces_join_to_the_text(lm):
    texts = ["the cat sat on the mat ."] * 9
    tok = tokenizer.train_sentencepiece(texts, vocab_size=16)
    ids = np.array([0, *tok.encode(texts[0]), 1, 3, 3])
    pieces = dataclasses.replace(lm, tokenizer=tok)
    frame = plots._frame(pieces, 0.5, ids, ids)
    assert "".join(frame.words).strip() == tok.decode(ids) == texts[0]


def test_wrap_fills_lines_and_no_more():
    words = [" word"] * 50
    at = plots._wrap(words)
    ends = [column + 5 for _, column in at]
    assert max(ends) == plots.WRAP // 5 * 5
    assert at == sorted(at)


def test_words_shown_are_the_grammar_s_or_the_frequent(lm):
    ids, tags = plots._chosen(lm, None)
    assert tags is not None
    assert len(ids) == len(tags) > 20
    rows = np.array([[0, 9, 9, 9, 7, 7, 1, 3, 3, 3]])
    ids, tags = plots._chosen(with_data(lm, source="text"), rows)
    assert tags is None
    assert ids[:2] == [9, 7]
    assert min(ids) == 4


def test_loss_curve_goes_from_certain_to_blind(lm):
    """Untrained, it knows the word of a clean position alone, and nothing of noise."""
    curve = plots.loss_curve(lm, plots._held_out(lm))
    assert curve.t[0] == 0.0
    assert curve.t[-1] == 1.0
    assert curve.mean[0] < 0.1
    assert curve.mean[-1] > 0.8 * np.log(lm.tokenizer.vocab_size)
    assert np.all(curve.error >= 0)


def test_loss_curve_is_the_objective_under_other_noise(lm):
    ids = plots._held_out(lm)

    @jax.jit
    def objective(params, draws):
        return losses.end_to_end(
            params,
            ids,
            draws,
            cfg=lm.cfg,
            schedule=lm.schedule,
            objective="ce",
            normalize=True,
        ).diffusion

    draws = time_sampling.draw_noise(jax.random.key(5), (*ids.shape, lm.cfg.dim))
    curves = [plots.loss_curve(lm, ids, feed=feed) for feed in (False, True)]
    i = len(curves[0].t) // 4
    for feed, curve in enumerate(curves):
        t = np.full(len(ids), curve.t[i], np.float32)
        fed = np.full(len(ids), feed, np.float32)
        values = objective(lm.ema, draws._replace(t=t, self_cond=fed))
        error = np.std(values, ddof=1) / len(ids) ** 0.5
        np.testing.assert_allclose(curve.error[i], error, rtol=1.0)
        both = np.hypot(error, curve.error[i])
        assert abs(np.mean(values) - curve.mean[i]) < 5 * both
    assert np.max(np.abs(curves[0].mean - curves[1].mean)) > 1e-4


def test_times_of_a_table_are_its_indices():
    t = plots.times(2000)
    np.testing.assert_allclose(t * 2000, np.round(t * 2000), atol=1e-9)
    assert t[0] == 1 / 2000
    assert t[-1] == 1999 / 2000
    assert plots.times(4).tolist() == [0.25, 0.5, 0.75]


def test_a_discretised_run_has_its_curve_too():
    parts = {
        "schedule": {"name": "sqrt", "num_steps": 20, "scale": 0.0},
        "loss": {"objective": "x0", "self_cond_prob": 0.0},
        "model": {"predicts": "x0", "self_cond": False, "token_posterior_input": False},
    }
    lm = build(**parts)
    curve = plots.loss_curve(lm, plots._held_out(lm))
    assert len(curve.t) == 19
    assert np.all(np.isfinite(curve.mean))
    # an untrained x0_hat, near 0, misses all of x_0: E_v ~ N(0, 1)
    assert 0.3 < curve.mean[-1] < 3.0
