# SPDX-License-Identifier: Apache-2.0
"""The suite against samplers whose worth is known, and the command's bad inputs."""

import dataclasses
import json

import numpy as np
import pytest

import dlm_jax
from dlm_jax.configs import grammar as grammar_config
from dlm_jax.configs import smoke
from dlm_jax.data import grammar, tokenizer
from dlm_jax.errors import UserError
from dlm_jax.evaluation import report, text_metrics
from dlm_jax.training import loop

pytestmark = pytest.mark.slow

SEEDS, SIZE = 3, 100


@pytest.fixture(scope="module")
def ar_model(tmp_path_factory):
    """A small autoregressive model of the grammar, trained by the command's own loop."""
    workdir = tmp_path_factory.mktemp("ar_model") / "run"
    config = grammar_config.get_config("autoregressive")
    config.data.update(size=5000, valid_size=64)
    config.evaluate.n = 8
    config.model.update(
        dim=48, hidden_dim=48, layers=2, heads=4, mlp_dim=96, time_dim=16
    )
    config.train.update(total_steps=300, batch=32, valid_steps=0, sample_steps=0)
    loop.train(config, str(workdir))
    return str(workdir)


@pytest.fixture(scope="module")
def reference(ar_model):
    texts = grammar.sample(5, 5000)
    held_out = grammar.sample(6, 500)
    grams = frozenset(text_metrics.all_grams(texts))
    return report.Reference(
        frozenset(texts), grams, held_out, dlm_jax.load(ar_model), on_grammar=True
    )


def _junk(seed):
    """One short loop of frequent words, over and over."""
    return [" ".join(["The Mill is a cheap pub ."] * (1 + i % 3)) for i in range(SIZE)]


def _stuck(seed):
    """One sentence, always: the likeliest of many, by token."""
    texts = set(grammar.sample(1, 300))
    best = max(texts, key=lambda text: grammar.log_prob(text) / len(text.split()))
    return [best] * SIZE


def _unigram(seed):
    """Words by their frequency, lengths as they are."""
    rng, texts = np.random.default_rng(seed), grammar.sample(5, 2000)
    words = [word for text in texts for word in text.split()]
    sizes = [len(texts[i].split()) for i in rng.integers(0, len(texts), SIZE)]
    return [" ".join(rng.choice(words, n)) for n in sizes]


def _parrot(seed):
    texts = np.array(grammar.sample(5, 5000))
    return np.random.default_rng(seed).choice(texts, SIZE, replace=False).tolist()


def _real(seed):
    return grammar.sample(70 + seed, SIZE)


@pytest.fixture(scope="module")
def tables(reference):
    held_out = grammar.sample(8, SEEDS * SIZE)
    made = {"junk": _junk, "stuck": _stuck, "unigram": _unigram, "parrot": _parrot}
    made["real"] = _real
    return {
        name: report.compare([f(s) for s in range(SEEDS)], held_out, reference)
        for name, f in made.items()
    }


def _flags(table):
    return {name for name, row in table.items() if row.flag}


def test_every_measure_is_there_with_its_error(tables):
    for table in tables.values():
        assert list(table) == list(report.METRICS)
        for name, row in table.items():
            if row.note:
                assert name == "exact nats/token, accepted"
                assert "accepts" in row.note
            else:
                assert np.isfinite(row.samples).all(), name
                assert np.isfinite(row.held_out).all(), name


def test_flags_the_three_and_not_the_real(tables):
    assert _flags(tables["real"]) == set()
    assert _flags(tables["parrot"]) == {"texts copied from train"}
    assert {
        "unigram entropy, nats",
        "distinct texts",
        "repetition within a text",
        "energy distance",
    } <= _flags(tables["junk"])
    assert {
        "autoregressive nats/token",
        "accepted by the grammar",
        "4-grams of train",
    } <= (_flags(tables["unigram"]))


def test_likelihood_alone_can_be_won(tables):
    """A stuck sampler beats real text in it, and in validity: others flag it."""
    stuck, real = tables["stuck"], tables["real"]
    for name in ("autoregressive nats/token", "exact nats/token, accepted"):
        assert stuck[name].samples.mean < real[name].samples.mean
    assert stuck["accepted by the grammar"].samples.mean == 1.0
    assert {"unigram entropy, nats", "distinct texts"} <= _flags(stuck)


def test_order(tables):
    """The distance puts junk and unigrams far off, copies and real text at nothing."""
    rows = {name: table["energy distance"].samples for name, table in tables.items()}
    assert min(rows["junk"].mean, rows["stuck"].mean) > rows["unigram"].mean > 0.1
    for name in ("parrot", "real"):
        assert abs(rows[name].mean) < 5 * rows[name].stderr + 0.01
    worst_first = sorted(tables, key=lambda name: -len(_flags(tables[name])))
    assert worst_first[-2:] == ["parrot", "real"]


def test_measure_without_its_ar_model_says_so(reference):
    alone = reference._replace(ar_model=None, on_grammar=False)
    held_out = grammar.sample(8, 2 * SIZE)
    table = report.compare([_real(0), _real(1)], held_out, alone)
    for name in ("autoregressive nats/token", "energy distance"):
        assert "config.evaluate.ar_model" in table[name].note
    assert "grammar" in table["accepted by the grammar"].note
    assert not table["distinct-1"].note


@pytest.mark.parametrize(("sizes", "held"), [((1, 1), 10), ((5, 5), 9)])
def test_too_few_texts(sizes, held, reference):
    samples = [grammar.sample(i, n) for i, n in enumerate(sizes)]
    with pytest.raises(UserError, match="held-out texts"):
        report.compare(samples, grammar.sample(8, held), reference)


# --- the command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("model") / "run"
    config = smoke.get_config()
    config.model.layers = 1
    config.train.update(sample_steps=0, valid_steps=0)
    loop.train(config, str(workdir))
    return workdir


def _run(workdir, **options):
    lm = dlm_jax.load(workdir)
    lm.config["evaluate"] |= options
    return report.evaluate(lm, str(workdir))


def test_writes_what_it_prints(trained, ar_model, capsys):
    record = _run(trained, ar_model=ar_model)
    saved = json.loads((trained / "evaluation.json").read_text(encoding="utf-8"))
    assert (trained / "plots" / "frontier.png").stat().st_size > 1000
    bound = saved["likelihood"]
    assert bound["nats/token"]["mean"] == record["likelihood"]["nats/token"]["mean"]
    parts = [
        bound[f"{n}, nats/token"]["mean"] for n in ("prior", "diffusion", "rounding")
    ]
    assert sum(parts) == pytest.approx(bound["nats/token"]["mean"])
    assert bound["bits/token"]["mean"] == pytest.approx(sum(parts) / np.log(2))
    # hardly trained: far above the language, and above the autoregressive model
    assert bound["above the language, nats/token"]["mean"] > 0.5
    assert bound["autoregressive, nats/token"]["mean"] < bound["nats/token"]["mean"]
    assert [p["num_steps"] for p in saved["frontier"]] == [2, 4]
    out = capsys.readouterr().out
    assert all(name in out for name in report.METRICS)
    assert "worse than held-out text" in out


def test_autoregressive_model_comes_near_the_language(ar_model):
    texts = grammar.sample(11, 500)
    gap = report.likelihood_rows(dlm_jax.load(ar_model), texts, 1)[
        "above the language, nats/token"
    ]
    assert 0 < gap.mean < 0.6
    assert gap.mean > 5 * gap.stderr


def test_evaluates_a_file_of_texts(trained, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(grammar.sample(3, 20)), encoding="utf-8")
    (trained / "evaluation.json").write_text("mine", encoding="utf-8")
    record = _run(trained, texts=str(path))
    assert (trained / "evaluation.json").read_text(encoding="utf-8") == "mine"
    assert record["samples"] == "2 x 10"
    assert record["measures"]["accepted by the grammar"]["samples"].mean == 1.0
    path.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="holds 0 texts"):
        _run(trained, texts=str(path))
    with pytest.raises(UserError, match="nothing"):
        _run(trained, texts=str(tmp_path / "nothing.txt"))


def test_ar_model_must_be_one_and_of_this_text(trained, ar_model):
    with pytest.raises(UserError, match="not of objective 'ar'"):
        _run(trained, ar_model=str(trained))
    words = tokenizer.train_word(["wholly other words"] * 9, min_count=0)
    other = dataclasses.replace(dlm_jax.load(trained), tokenizer=words)
    other.config["evaluate"]["ar_model"] = ar_model
    with pytest.raises(UserError, match="other text"):
        report.evaluate(other, str(trained))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seeds": 0}, "seeds=0"),
        ({"n": 1}, "n=1"),
        ({"draws": 0}, "draws=0"),
        ({"num_steps": [4, 0]}, "num_steps=0"),
        ({"seeds": 20}, "held-out texts are too few"),
    ],
)
def test_bad_settings_end_before_sampling(options, says, trained, monkeypatch):
    monkeypatch.setattr(report, "_samples", lambda *a: pytest.fail("sampled"))
    with pytest.raises(UserError, match=says):
        _run(trained, **options)
