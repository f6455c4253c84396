# SPDX-License-Identifier: Apache-2.0
"""Sequence to sequence: pairs of a source and a target."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm_jax
from dlm_jax.configs import grammar as grammar_config
from dlm_jax.data import corpus, grammar, pairs, sources
from dlm_jax.diffusion import losses, model, time_sampling
from dlm_jax.errors import UserError
from dlm_jax.evaluation import conditional
from dlm_jax.inference import loading, translation
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.training import loop
from dlm_jax.training.config import resolve_config
from dlm_jax.training.train_step import init_state, loss_fn, make_draws
from dlm_jax.types import END, PAD, START

LENGTH = 16
ANIMALS = {"cat": "mouse", "dog": "bone", "cow": "grass", "bird": "seed"}


def _config(variant="modern", **model_options):
    config = grammar_config.get_config(variant)
    config.model.update(
        dim=8, hidden_dim=32, layers=1, heads=2, mlp_dim=64, positions=LENGTH,
        known_length=False, known_source=True, **model_options,
    )  # fmt: skip
    config.data.update(
        length=LENGTH, source="csv", source_column="source", column="target"
    )
    config.loss.source_drop_prob = 0.1
    config.train.update(
        total_steps=2, batch=8, ckpt_steps=0, valid_steps=0, sample_steps=0
    )
    config.sample.update(num_steps=2, batch=8)
    return config


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Pairs whose target names the food of the animal in the source."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    names = list(ANIMALS)
    rng = np.random.default_rng(0)
    rows = ["source,target"]
    for _ in range(400):
        name, number = names[rng.integers(4)], rng.integers(1, 4)
        rows.append(f"{'big ' * number}{name},a {name} eats {ANIMALS[name]}")
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def _random_model(file, variant="modern", **options):
    config = _config(variant, **options)
    config.data.path = str(file)
    loaded = corpus.load_corpus(config)
    step_cfg = resolve_config(config)
    state = init_state(jax.random.key(0), step_cfg, loaded.tokenizer.vocab_size)
    record = json.loads(config.to_json_best_effort())
    params = jax.tree.map(
        lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), state.params
    )
    return loading.from_parts(step_cfg.cfg, params, loaded.tokenizer, record), loaded


@pytest.fixture(scope="module")
def lm(file):
    return _random_model(file)[0]


# --- data


def test_a_row_is_start_source_start_target_end(file):
    config = _config()
    config.data.path = str(file)
    loaded = corpus.load_corpus(config)
    first, pair = loaded.train[0], pairs.load_pairs(config.data, "train")[0]
    source, target = pairs.source_and_target(first)
    tok = loaded.tokenizer
    assert tok.decode(source) == pair.source
    assert tok.decode(target) == pair.target
    n, m = len(source), len(tok.encode(pair.target))
    assert first[0] == START
    assert first[n + 1] == START
    assert first[n + m + 2] == END
    assert np.all(first[n + m + 3 :] == PAD)


def test_the_grammars_fields_are_those_of_its_text():
    cfg = grammar_config.get_config().data
    with cfg.unlocked():
        cfg.update(size=20, valid_size=20, source_column="fields")
    for split in ("train", "valid"):
        made = pairs.load_pairs(cfg, split)
        assert [p.target for p in made] == sources.load_texts(cfg, split)
        for source, target in made:
            stated = dict(part.split(" : ") for part in source.split(" | "))
            assert stated == grammar.fields(target)


def test_e2e_gives_its_records(tmp_path):
    (tmp_path / "src1_train.txt").write_text(
        "name : The Eagle | food : French||The Eagle is French .\n", encoding="utf-8"
    )
    cfg = grammar_config.get_config().data
    with cfg.unlocked():
        cfg.update(source="e2e", path=str(tmp_path), source_column="fields")
    (pair,) = pairs.load_pairs(cfg, "train")
    assert pair == ("name : The Eagle | food : French", "The Eagle is French .")


@pytest.mark.parametrize("source", ["csv", "jsonl"])
@pytest.mark.parametrize("empty", ["source", "target"])
def test_a_pair_without_a_side_is_refused(tmp_path, source, empty):
    row = {"source": "a cat", "target": "it eats"} | {empty: " "}
    path = tmp_path / f"pairs.{source}"
    lines = {
        "csv": f"source,target\n{row['source']},{row['target']}\n",
        "jsonl": json.dumps(row),
    }
    path.write_text(lines[source], encoding="utf-8")
    config = _config()
    config.data.update(source=source, path=str(path))
    with pytest.raises(UserError, match=rf"line \d has nothing in column '{empty}'"):
        pairs.load_pairs(config.data, "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("name : Aromi|| \n", "line 2 has no text"),
        ("||a pub\n", "line 2 has no record"),
    ],
)
def test_a_record_or_a_text_alone_is_refused(tmp_path, line, message):
    (tmp_path / "src1_train.txt").write_text("a : b||c\n" + line, encoding="utf-8")
    config = _config()
    config.data.update(source="e2e", path=str(tmp_path), source_column="fields")
    with pytest.raises(UserError, match=f"{message}: a pair needs"):
        pairs.load_pairs(config.data, "train")


def test_a_column_that_stands_there_twice_is_no_source(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("source,target,source\na,b,c\nd,e,f\n", encoding="utf-8")
    config = _config()
    config.data.path = str(path)
    says = r"source_column to one of source \(column 1\), target, source \(column 3\)"
    with pytest.raises(UserError, match=says):
        pairs.load_pairs(config.data, "train")
    config.data.source_column = "source (column 3)"
    assert pairs.load_pairs(config.data, "train")[0] == ("c", "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "text"}, r"source_column=.* has no effect"),
        ({"source": "prepared"}, r"source_column=.* has no effect"),
        ({"source": "grammar", "path": ""}, r"set it to 'fields'"),
        ({"source_column": "nosuch"}, r"no column 'nosuch': set .*\.source_column to"),
    ],
)
def test_unfit_options_of_pairs_are_refused(file, changes, message):
    config = _config()
    config.data.update({"path": str(file)} | changes)
    with pytest.raises(UserError, match=message):
        pairs.load_pairs(config.data, "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.known_source": False, "loss.source_drop_prob": 0.0}, r"set both"),
        ({"data.source_column": ""}, r"set both"),
        ({"model.known_length": True}, r"known_length=False"),
        ({"loss.truncate_prob": 0.1}, r"truncate_prob=0"),
        ({"data.mode": "block"}, r"data\.mode=pad"),
        ({"loss.objective": "nelbo"}, r"objective 'ce' or 'ar'"),
    ],
)
def test_unfit_configs_are_refused(changes, message):
    config = _config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        resolve_config(config)


@pytest.mark.parametrize("too_long", ["error", "truncate", "drop"])
def test_a_source_without_room(file, too_long):
    config = _config()
    config.data.update(path=str(file), too_long=too_long, length=4)
    if too_long == "drop":  # only `big cat` would need 7
        with pytest.raises(UserError, match=r"fill no row|holds no"):
            corpus.load_corpus(config)
    else:
        with pytest.raises(UserError, match=r"pair 1 has|text 1 has"):
            corpus.load_corpus(config)


# --- training


def test_only_the_target_is_scored(file):
    lm, loaded = _random_model(file)
    ids = jnp.asarray(loaded.train[:4])
    draws = time_sampling.draw_noise(jax.random.key(0), (*ids.shape, lm.cfg.dim))
    known, outside = losses.known_tokens(ids, draws, lm.cfg)
    for row, mask in zip(np.asarray(ids), np.asarray(known), strict=True):
        second = np.flatnonzero(row == START)[1]
        assert mask[: second + 1].all()
        assert not mask[second + 1 :].any()
    assert outside is not None
    assert not np.any(outside)
    mask, _ = losses.scored_positions(ids, known, lm.cfg, False)
    np.testing.assert_array_equal(mask, 1.0 - known)


@pytest.mark.parametrize("variant", ["modern", "autoregressive"])
def test_the_loss_depends_on_the_source_and_not_on_predicting_it(file, variant):
    config = _config(variant)
    config.data.path = str(file)
    lm, loaded = _random_model(file, variant)
    step_cfg = resolve_config(config)
    ids = jnp.asarray(loaded.train[:4])
    draws = make_draws(jax.random.key(3), ids, step_cfg, 0, ())

    def loss(ids, head_bias=0.0):
        bias = lm.params.denoiser["head"]["bias"]
        head = lm.params.denoiser["head"] | {"bias": bias + head_bias}
        denoiser = lm.params.denoiser | {"head": head}
        return loss_fn(lm.params._replace(denoiser=denoiser), ids, draws, step_cfg)[0]

    big = loaded.tokenizer.encode("big")[0]
    swapped = jnp.where(model.source(ids) & (ids == big), END, ids)
    assert abs(loss(swapped) - loss(ids)) > 1e-6  # it reads the source
    only_in_source = 30.0 * jax.nn.one_hot(big, loaded.tokenizer.vocab_size)
    # `big` never occurs in a target, so making it unlikely cannot raise the loss
    assert loss(ids, -only_in_source) <= loss(ids) + 1e-6


def test_a_dropped_source_is_empty_and_rows_do_not_depend_on_devices(file):
    _, loaded = _random_model(file)
    ids = jnp.asarray(loaded.train[:64])
    dropped = time_sampling.drop_sources(jax.random.key(0), ids, 0.5, first=0)
    emptied = np.any(np.asarray(dropped != ids), -1)
    assert 15 < emptied.sum() < 49
    source = np.asarray(model.source(ids))
    assert np.all(np.asarray(dropped)[~source] == np.asarray(ids)[~source])
    words = source & (np.asarray(ids) != START)
    assert np.all(np.asarray(dropped)[emptied][words[emptied]] == PAD)
    part = time_sampling.drop_sources(jax.random.key(0), ids[32:], 0.5, first=32)
    np.testing.assert_array_equal(part, dropped[32:])


def test_a_network_is_shown_the_known_tokens_as_they_are():
    """What the noise of a known position was changes nothing."""
    cfg = DenoiserConfig(
        dim=4, hidden_dim=16, layers=1, heads=2, mlp_dim=16, positions=6, trunk="adaln",
        predicts="logits", self_cond=True, token_posterior_input=True,
        known_source=True, time_input="log_snr",
    )  # fmt: skip
    params = model.init(jax.random.key(0), cfg, 9)
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params
    )
    config = grammar_config.get_config().schedule
    noise = dlm_jax.schedule.make_schedule(**config)
    denoise = model.bind(params, cfg, schedule=noise)
    ids = jnp.array([[START, 5, START, 6, END, PAD]])
    given = model.given_tokens(ids, cfg)
    assert given is not None
    clean = params.table[ids]
    x_t = jax.random.normal(jax.random.key(2), clean.shape)
    t, known = jnp.array([0.7]), given[0]

    def run(x_t, x0_prev):
        return denoise(
            *model.insert_clean_tokens(clean, known, x_t, t, given[1]), x0_prev
        )

    base = run(x_t, 0 * x_t)
    moved = jnp.where(known[..., None], x_t + 3.0, x_t)
    np.testing.assert_allclose(run(moved, 0 * x_t), base, atol=1e-6)
    prev = jnp.where(known[..., None], 7.0, 0 * x_t)
    np.testing.assert_allclose(run(x_t, prev), base, atol=1e-6)
    assert np.abs(run(x_t, 0 * x_t + 1.0) - base).max() > 1e-3


# --- sampling


def test_translate_returns_a_text_per_source(lm):
    found = ["big cat", "big big dog", {"eats": "cow"}]
    one = lm.translate(found, seed=1)
    assert len(one) == 3
    assert all(isinstance(text, str) for text in one)
    many = lm.translate(found, n=3, seed=1)
    assert [len(texts) for texts in many] == [3, 3, 3]
    assert lm.translate("big cat", seed=1)[0] == one[0]
    assert len(lm.translate(found, mbr=4, seed=1)) == 3
    assert lm.translate(found, cfg_weight=300.0, seed=1) != one


def test_mbr_selects_among_the_candidates(lm):
    candidates = lm.translate("big cat", n=6, seed=2)[0]
    assert lm.translate("big cat", mbr=6, seed=2)[0] in candidates


def test_the_source_is_kept_and_the_target_follows_it(lm):
    rows = translation.encode_sources(lm.tokenizer, ["big cat", "big big dog"], LENGTH)
    given = translation.with_targets(rows, dlm_jax.inference.constraints.UNCONSTRAINED)
    made = lm.generate(2, constraints=given, seed=0)
    for row, source in zip(made.ids, ["big cat", "big big dog"], strict=True):
        assert lm.tokenizer.decode(pairs.source_and_target(row)[0]) == source


@pytest.mark.parametrize("source", ["big cat", "big big big cow"])
def test_constraints_hold_inside_the_target(lm, source):
    template = "a ___ eats [...]"
    for text in lm.translate(source, n=4, template=template, seed=3)[0]:
        words = text.split()
        assert words[0] == "a"
        assert words[2] == "eats"
        assert len(words) > 3
    for text in lm.translate(source, n=4, length=5, seed=3)[0]:
        assert len(text.split()) == 5
    assert lm.translate(source, contains="grass", lacks="seed", num_steps=2)


def test_a_phrase_in_the_source_does_not_count_for_the_target(lm):
    """The condition is on the target's tokens only."""
    from dlm_jax.diffusion import guidance
    from dlm_jax.inference.conditioning import _in_target

    cat = lm.tokenizer.encode("cat")
    ids = jnp.asarray(lm.encode(["a dog eats bone"], sources=["big cat"]))
    log_p = jnp.log(jax.nn.one_hot(ids, lm.tokenizer.vocab_size) + 1e-9)
    phrase = guidance.contains_phrase(jnp.array([cat]))
    assert phrase(log_p)[0] > -1e-3
    assert _in_target(phrase, ids)(log_p)[0] < -10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm.translate([]), r"sources: give one or more"),
        (lambda lm: lm.translate("  "), r"text 1 is empty"),
        (lambda lm: lm.translate(3), r"sources=3"),
        (lambda lm: lm.translate(["a", 3]), r"3 is no text"),
        (lambda lm: lm.translate({"name": 3}), r"3 is no text"),
        (lambda lm: lm.translate({"name": " "}), r"' ' in a record: .* not empty"),
        (lambda lm: lm.translate({"a": "b | c : d"}), r"in a record: .* no |"),
        (lambda lm: lm.translate("big " * 14), r"has 14 tokens, .* room for 12"),
        (lambda lm: lm.translate("big cat", n=0), r"n="),
        (lambda lm: lm.translate("big cat", mbr=0), r"mbr="),
        (lambda lm: lm.translate("big cat", nosuch=1), r"nosuch"),
        (lambda lm: lm.translate("big cat", pos=["NOUN"]), r"pos"),
        (lambda lm: lm.translate("big " * 9 + "cat", length=9), r"leaves 3 tokens"),
        (lambda lm: lm.sample(2), r"lm\.translate"),
        (lambda lm: lm.control(2, length=3), r"lm\.translate"),
        (lambda lm: lm.infill("a ___"), r"lm\.translate"),
        (lambda lm: lm.encode(["a cat"]), r"needs sources"),
        (lambda lm: lm.encode(["a"], sources=["b", "c"]), r"2 sources and 1 texts"),
        (lambda lm: lm.nll([[START, 5, END]]), r"not pairs"),
    ],
)
def test_bad_input_is_one_line(lm, call, message):
    with pytest.raises(UserError, match=message) as caught:
        call(lm)
    assert "\n" not in str(caught.value)


def test_unknown_words_of_a_source_are_said(lm):
    with pytest.warns(UserWarning, match=r"1 of 2 sources .* first 'zebra' in text 2"):
        lm.translate(["big cat", "big zebra"])


def test_a_model_of_texts_takes_no_sources():
    plain = dlm_jax.load("grammar")
    with pytest.raises(UserError, match=r"was not trained on pairs"):
        plain.translate("a cat")
    with pytest.raises(UserError, match=r"another takes none"):
        plain.encode(["a"], sources=["b"])


# --- likelihood


def test_an_autoregressive_pair_scores_its_target_alone(file):
    lm, _ = _random_model(file, "autoregressive")
    ids = lm.encode(["a cat eats mouse"], sources=["big cat"])
    whole = dlm_jax.autoregressive.nll(lm.ema, lm.cfg, jnp.asarray(ids))
    target = np.asarray(whole)[0, 4:]
    np.testing.assert_allclose(lm.nll(ids).total()[0], target.sum(), rtol=1e-5)
    other = lm.encode(["a cat eats mouse"], sources=["big dog"])
    assert abs(lm.nll(other).total()[0] - lm.nll(ids).total()[0]) > 1e-6


def test_the_bound_of_a_target_does_not_pay_for_its_source(file):
    """A random network pays about log v for each open position, and only for these."""
    lm, _ = _random_model(file)
    ids = lm.encode(["a cat eats mouse"] * 8, sources=["big cat"] * 8)
    open_ = LENGTH - 4
    nats = float(lm.nll(ids, draws=64).total().mean())
    vocab = lm.tokenizer.vocab_size
    whole = loading.from_parts(
        lm.cfg.__class__(**{**lm.cfg.__dict__, "known_source": False}),
        lm.params._replace(denoiser=_without_flag(lm.params.denoiser)),
        lm.tokenizer,
        lm.config,
    )
    all_ = float(whole.nll(ids, draws=64).total().mean())
    assert nats < all_ * (open_ + 2) / LENGTH
    assert nats > 0.3 * open_ * np.log(vocab)


def _without_flag(denoiser):
    kernel = denoiser["trunk"]["in"]["kernel"]
    trunk = denoiser["trunk"] | {
        "in": denoiser["trunk"]["in"] | {"kernel": kernel[:-1]}
    }
    return denoiser | {"trunk": trunk}


# --- a run


@pytest.mark.slow
def test_a_run_learns_to_read_its_source(file, tmp_path):
    config = _config()
    config.data.path = str(file)
    config.train.total_steps = 600
    config.sample.num_steps = 16
    loop.train(config, str(tmp_path / "run"))
    lm = dlm_jax.load(tmp_path / "run")
    right = [
        f"a {name} eats {food}" in text
        for name, food in ANIMALS.items()
        for text in lm.translate(f"big big {name}", n=8, seed=4)[0]
    ]
    assert np.mean(right) > 0.9
    preview = (tmp_path / "run" / "samples" / "600.txt").read_text("utf-8")
    assert all(" || " in line for line in preview.splitlines())


# --- evaluation and the command


def _evaluated(lm, tmp_path, **options):
    lm.config["evaluate"] = lm.config["evaluate"] | {
        "n": 6, "seeds": 2, "mbr": 3, "nll_texts": 8, "draws": 2, "num_steps": (2, 4),
    } | options  # fmt: skip
    return conditional.evaluate(lm, str(tmp_path))


def test_evaluate_leaves_out_what_training_drops(file, tmp_path):
    long = tmp_path / "long.csv"
    rows = [f"{'big ' * 20}cat,a cat eats mouse", f"big cat,{'a cat ' * 9}"]
    text = file.read_text("utf-8")
    long.write_text("\n".join([text, *rows]), encoding="utf-8")
    config = _config()
    config.data.update(path=str(long), too_long="drop")
    loaded = corpus.load_corpus(config)
    lm, _ = _random_model(file)
    lm.config["data"] |= {"path": str(long), "too_long": "drop"}
    record = _evaluated(lm, tmp_path, nll_texts=64)
    assert record["nats/token"]["mean"] > 0.5
    held_out = conditional._held_out(lm, config.data)
    np.testing.assert_array_equal(
        lm.encode(*map(list, zip(*[p[::-1] for p in held_out], strict=True))),
        loaded.valid,
    )
    lm.config["data"]["too_long"] = "error"


@pytest.mark.parametrize("variant", ["modern", "autoregressive"])
def test_evaluate_measures_rows_and_baselines(file, tmp_path, variant):
    lm, _ = _random_model(file, variant)
    record = _evaluated(lm, tmp_path)
    rows = record["measures"]
    model_rows = {"modern": {"2 steps", "MBR-3, 2 steps", "4 steps"}}
    expected = model_rows.get(variant, {"sampled", "MBR-3", "beam search, 4"})
    assert rows.keys() == expected | {"copy of the source"}
    assert record["nats/token"]["mean"] > 0.5
    assert rows["copy of the source"]["BLEU"]["mean"] < 10
    saved = json.loads((tmp_path / "evaluation.json").read_text("utf-8"))
    assert saved["sources"] == record["sources"] > 2


def test_evaluate_of_the_grammars_fields(tmp_path):
    """The targets themselves are valid and exact, and a copy of the source is neither."""
    config = _config()
    config.data.update(source="grammar", source_column="fields", size=9, valid_size=9)
    held_out = pairs.load_pairs(config.data, "valid")
    task = conditional.TASKS["grammar"](config, held_out, 9)
    score = task.score([pair.target for pair in held_out])
    assert (score["valid"], score["exact"]) == (100, 100)
    turned = [pair.target for pair in held_out][::-1]
    assert task.score(turned)["exact"] < 50
    assert task.score(task.baselines["copy of the source"])["valid"] == 0


def test_evaluate_of_e2e_groups_references(tmp_path):
    record = "name : Aromi | Type : pub | price : more than £ 30"
    texts = ["Aromi is a pub for more than £ 30 .", "The pub Aromi is over £ 30 ."]
    lines = "".join(f"{record}||{text}\n" for text in texts)
    (tmp_path / "src1_valid.txt").write_text(lines, encoding="utf-8")
    config = _config()
    config.data.update(source="e2e", path=str(tmp_path), source_column="fields")
    held_out = pairs.load_pairs(config.data, "valid")
    task = conditional.TASKS["e2e"](config, held_out, 9)
    assert task.sources == [record]
    good, bad = task.score(texts[:1]), task.score(["Aromi is a coffee shop ."])
    assert (good["slot error rate"], good["BLEU"]) == (0, pytest.approx(100))
    assert bad["slot error rate"] > 50


@pytest.mark.parametrize("source", ["e2e", "csv"])
def test_a_file_of_sources_is_read_whole(lm, tmp_path, monkeypatch, source):
    """Only E2E's lines hold targets, too; each output stands in its source's line."""
    path, read = tmp_path / "sources.txt", []
    monkeypatch.setattr(type(lm), "translate", lambda lm, x: read.extend(x) or x)
    monkeypatch.setitem(lm.config["data"], "source", source)
    path.write_text("\ufeffbig cat\r\nbig || dog\u2028 cow\n", encoding="utf-8")
    translation.translate_file(lm, str(path))
    rest = {"e2e": "big", "csv": "big || dog\u2028 cow"}
    assert read == ["big cat", rest[source]]
    for text in ("big cat\n\nbig dog\n", "big cat\n \nbig dog", "big cat\n\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"sources\.txt line 2 holds no source"):
            translation.translate_file(lm, str(path))


@pytest.mark.slow
def test_the_command_translates_a_file(file, tmp_path):
    """Train, then sample from a file of sources into a file, which is never replaced."""
    run, sources_, out = (tmp_path / n for n in ("run", "sources.txt", "out.txt"))
    config = _config()
    config.data.path = str(file)
    loop.train(config, str(run))
    sources_.write_text("big cat\nbig dog || ignored\n", encoding="utf-8")
    text = (
        "from tests.test_translation import _config\n"
        "def get_config():\n    return _config()\n"
    )
    (tmp_path / "config.py").write_text(text, encoding="utf-8")
    command = [
        sys.executable, "-m", "dlm_jax.main", "--mode", "sample", "--workdir", str(run),
        "--config", str(tmp_path / "config.py"), f"--config.sample.sources={sources_}",
        f"--config.sample.out={out}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert len(out.read_text("utf-8").splitlines()) == 2
    again = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert again.returncode == 2
    assert "out.txt exists: remove it" in again.stderr
