# SPDX-License-Identifier: Apache-2.0
"""Control tasks: targets that were never trained on, scores that junk cannot win."""

import dataclasses
import json

import jax
import ml_collections
import numpy as np
import pytest
import test_pieces
from conftest import untrained
from test_pieces import TEXTS

from dlm_jax.configs import smoke
from dlm_jax.data import annotations, grammar, tokenizer
from dlm_jax.diffusion import classifier
from dlm_jax.errors import UserError
from dlm_jax.evaluation import control, control_targets, control_tasks
from dlm_jax.evaluation.control_tasks import CONTROL_TASKS
from dlm_jax.inference import constraints, loading
from dlm_jax.inference.constraints import GuidanceClassifier
from dlm_jax.inference.guidance_config import DEFAULT_GUIDANCE
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.runtime import checkpoint
from dlm_jax.training.trainer import Trainer, language_job

TEXT = "The Eagle is a cheap pub near Café Sicilia ."
OTHER = "Zizzi is an expensive restaurant in the city centre ."


@pytest.fixture(scope="module")
def config():
    config = smoke.get_config()
    config.control.update(n=2, samples=2, seeds=2, num_steps=(3,))
    return config


@pytest.fixture(scope="module")
def scorer(config):
    return control_targets.make_scorer(config, "pos", None)


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    """An untrained model of the grammar, saved."""
    folder = tmp_path_factory.mktemp("tasks") / "run"
    run = Trainer(language_job(config), str(folder))
    writer = checkpoint.manager(folder, keep=1)
    run.save(writer)
    writer.close()
    return folder


@pytest.fixture(scope="module")
def lm(config, workdir):
    """The model, and untrained classifiers of every task."""
    made, classifiers = loading.load(workdir), {}
    cfg = DenoiserConfig(
        dim=8, hidden_dim=16, layers=1, heads=2, mlp_dim=16, time_dim=8, trunk="adaln"
    )
    for task in ("semantic", "pos", "tree"):
        notes = [annotations.ANNOTATORS[task](t) for t in grammar.trees(0, 400)]
        vocab = annotations.build_label_vocab(task, notes, made.length)
        params = classifier.init(jax.random.key(0), cfg, vocab.head_spec)
        classifiers[task] = GuidanceClassifier(params, cfg, vocab)
    return dataclasses.replace(made, classifiers=classifiers)


def score(task, text, target, scorer):
    return next(iter(CONTROL_TASKS[task].score(text, target, scorer).values()))


@pytest.mark.parametrize("task", [name for name in CONTROL_TASKS if "+" not in name])
def test_a_target_is_met_by_its_own_text_and_missed_by_others(task, config, scorer):
    rng = np.random.default_rng(0)
    for sentence in control_targets.load_targets(config, task, 20):
        target = CONTROL_TASKS[task].target(sentence, rng)
        assert score(task, sentence.text, target, scorer) == 1
        assert score(task, "pub pub", target, scorer) < 0.3
        assert score(task, "", target, scorer) == 0


def test_scores_by_hand(scorer):
    assert score("semantic", TEXT, {"food": "Italian"}, scorer) == 0
    assert score("semantic", TEXT, {"name": "Eagle"}, scorer) == 1
    assert score("semantic", TEXT, {"price": "heap"}, scorer) == 0  # whole words
    tags = grammar.tags(TEXT)
    wrong = ["NOUN" if i == 0 else tag for i, tag in enumerate(tags)]
    assert score("pos", TEXT, wrong, scorer) == pytest.approx(1 - 1 / len(tags))
    assert score("pos", TEXT, [*tags, "NOUN"], scorer) == pytest.approx(
        len(tags) / (len(tags) + 1)
    )
    spans = grammar.spans_of(grammar.parse(TEXT))
    assert 0 < score("tree", OTHER, spans, scorer) < 1
    assert CONTROL_TASKS["length"].score(TEXT, 12, scorer) == {
        "exact length": 0,
        "length +-2": 1,
    }
    assert score(
        "infilling", TEXT, "The ___ is a cheap pub near Café Sicilia .", scorer
    )
    assert not score("infilling", OTHER, "The ___ is a [...]", scorer)
    assert not score(
        "infilling", TEXT + " .", "The ___ is a cheap pub near Café Sicilia .", scorer
    )


def test_a_span_counts_in_its_place_also_without_a_parse(scorer):
    broken = TEXT.replace("near", "near near")
    assert not grammar.accepts(broken)
    there, gone = (3, 5, "Adj"), (6, 8, "Near")
    assert CONTROL_TASKS["span"].score(TEXT, there, scorer)["span"] == 1
    found = CONTROL_TASKS["span"].score(broken, there, scorer)
    assert found == {"span": 1, "span in a parse": 0}
    assert CONTROL_TASKS["span"].score(broken, gone, scorer)["span"] == 0
    assert CONTROL_TASKS["span"].score(TEXT, (3, 4, "Adj"), scorer)["span"] == 0


def test_two_tasks_score_apart(scorer):
    task = CONTROL_TASKS["semantic+pos"]
    target = ({"food": "Italian"}, grammar.tags(TEXT))
    found = task.score(TEXT, target, scorer)
    assert (found["value"], found["tags"]) == (0, 1)


def test_a_field_is_asked_for_by_classifier_and_by_word(lm):
    tok = lm.tokenizer
    near, cheap = {"near": "Café Sicilia"}, {"price": "cheap"}
    rows = [CONTROL_TASKS["semantic"].constrain(target, lm) for target in (near, cheap)]
    both = constraints.batch_constraints(rows)
    (phrase,) = both.phrases
    assert phrase.tolist() == [tok.encode("Café Sicilia"), [*tok.encode("cheap"), -1]]
    assert both.labels["semantic"].shape[0] == 2
    assert (both.labels["semantic"] == rows[1].labels["semantic"]).all(1).tolist() == [
        False,
        True,
    ]
    few = tok.to_dict() | {"words": [w for w in tok.to_dict()["words"] if w != "cheap"]}
    ignorant = dataclasses.replace(lm, tokenizer=tokenizer.from_dict(few))
    assert CONTROL_TASKS["semantic"].constrain(cheap, ignorant).phrases[0].tolist() == [
        [-1]
    ]
    composed = CONTROL_TASKS["semantic+pos"].constrain((cheap, ["NOUN"]), lm)
    assert set(composed.labels) == {"semantic", "pos"}
    assert len(composed.phrases) == 1


def test_every_preset_has_settings_of_every_task(config):
    """Also from a saved config, whose tuples are lists."""
    record = json.loads(config.to_json_best_effort())
    for preset in config.control.presets:
        record["control"]["preset"] = preset
        record["control"]["presets"][preset]["tree"]["t_range"] = [0.1, 0.9]
        saved = ml_collections.ConfigDict(record)
        found = {n: control.guidance_of(saved, n) for n in CONTROL_TASKS}
        assert found["tree"].t_range == (0.1, 0.9)
        assert found["tree"].mean_over_labels == (preset == "published")
        assert control.guidance_of(saved, "unguided") == DEFAULT_GUIDANCE


@pytest.mark.slow
def test_every_task_runs_and_a_row_is_measured_once(lm, workdir, config, capsys):
    scorer = control_targets.make_scorer(config, "pos", None)
    for name, task in CONTROL_TASKS.items():
        rng = np.random.default_rng(0)
        wanted = [
            task.target(s, rng) for s in control_targets.load_targets(config, name, 2)
        ]
        guidance = control.guidance_of(config, name)
        row = control.run_task(
            lm, task, wanted, scorer, guidance, samples=2, seeds=2, num_steps=3
        )
        assert len(row["success"]) >= 1
        assert all(0 <= mean <= 1 for mean, _ in row["success"].values())
        assert row["classifier calls"] == 3 * guidance.num_updates * len(task.needs)
    assert row["texts"]


def test_the_command_writes_and_keeps_its_rows(config, workdir, capsys):
    lm = loading.load(workdir)
    lm.config["control"].update(task="length", n=2, samples=2, seeds=2, num_steps=[3])
    rows = control.evaluate_control(lm, str(workdir))
    assert rows[0]["success"]["exact length"][0] == 1
    assert "| length | 3 | exact length 100.0" in capsys.readouterr().out
    (path,) = (workdir / "control").glob("*.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["config"]["seed"] == config.seed
    assert written["step"] == lm.step
    path.write_text(json.dumps(written | {"accepted": 0.123}), encoding="utf-8")
    assert control.evaluate_control(lm, str(workdir))[0]["accepted"] == 0.123
    for section, change in (("control", {"n": 3}), ("sample", {"clamp": -1.0})):
        lm.config[section].update(change)  # another experiment is another row
        assert control.evaluate_control(lm, str(workdir))[0]["accepted"] != 0.123
    assert len(list((workdir / "control").glob("*.json"))) == 3


CHINESE = "我爱你中国人大小天地山水火木土金日月星云风雨花草树鸟鱼马牛羊"
PIECES = {
    "SentencePiece": lambda: (TEXTS, test_pieces.OURS["ours"]()),
    "BERT": lambda: (["The Cat sees a tree ."] * 20, test_pieces.hf("BERT uncased")),
    "Chinese": lambda: (
        [CHINESE[i : i + 9] for i in range(20)],
        tokenizer.train_sentencepiece(list(CHINESE) * 9, vocab_size=len(CHINESE) + 5),
    ),
}


@pytest.mark.parametrize("kind", PIECES)
def test_lengths_and_infilling_in_pieces(kind, scorer, tmp_path):
    """The known text comes back; lengths are those of the text, encoded again."""
    texts, tok = PIECES[kind]()
    (tmp_path / "t").write_text("\n".join(texts), encoding="utf-8")
    made = untrained(tok, 32)
    made.config["data"].update(
        source="text", path=str(tmp_path / "t"), valid_fraction=0.5
    )
    made.config["control"].update(n=4, samples=2, seeds=1, num_steps=[3])
    for task in ("infilling", "length"):
        made.config["control"].update(task=task)
        (row,) = control.evaluate_control(made, str(tmp_path))
        if task == "infilling":
            assert row["success"]["known kept"][0] == 1
        else:
            assert row["success"].keys() == {
                "exact length in pieces", "length +-2 in pieces",
            }  # fmt: skip
            sizes = [len(tok.encode(text)) for text in row["texts"]]
            assert all(0 < size <= 30 for size in sizes)
    length, text = control_tasks.task_of("length", made), texts[-1]
    target = length.target(control_targets.Sentence(text), None)
    assert target == len(tok.encode(text))
    assert set(length.score(text, target, scorer).values()) == {1}
    assert set(length.score(text, target + 3, scorer).values()) == {0}


def test_a_middle_without_spaces_has_a_blank_for_each_character(scorer):
    tok = tokenizer.train_sentencepiece(
        ["the cat sees old", CHINESE] * 9, vocab_size=45
    )
    infilling = control_tasks.task_of("infilling", untrained(tok, 32))
    for text, target in {
        "我爱你中国人": "我爱______国人",
        "the cat sees": "the ___ sees",
        "the cat sees the old  cat": "the cat ___ ___ old cat",
        "cat": "___",
    }.items():
        assert infilling.target(control_targets.Sentence(text), None) == target
        filled = target.replace("___", "x")
        assert infilling.score(filled, target, scorer)["known kept"]
        assert not infilling.score(f"x {filled}", target, scorer)["known kept"]
    of_words = CONTROL_TASKS["infilling"].target
    assert of_words(control_targets.Sentence("我爱 你中 国人"), None) == "我爱 ___ 国人"


def identity(lm, task):
    config = ml_collections.ConfigDict(lm.config)
    return control._identity(lm, config, task, 3, None)


def test_a_row_names_its_classifiers(lm):
    mine = identity(lm, "span")
    assert set(mine["classifiers in use"]) == {"tree"}
    tree = lm.classifiers["tree"]
    moved = tree._replace(params=jax.tree.map(lambda x: x + 1, tree.params))
    other = dataclasses.replace(lm, classifiers={**lm.classifiers, "tree": moved})
    assert identity(other, "span") != mine
    assert identity(other, "pos") == identity(lm, "pos")


def test_a_row_names_the_text_of_its_tagger_and_its_targets(lm, tmp_path):
    file = tmp_path / "target_pos.json"
    file.write_text("one", encoding="utf-8")
    data = lm.config["data"] | {"source": "e2e"}
    options = lm.config["control"] | {"targets": str(tmp_path)}
    labels = lm.config["classifier"] | {"conllu": str(file)}
    config = lm.config | {"data": data, "control": options, "classifier": labels}
    other = dataclasses.replace(lm, config=config)
    before = identity(other, "pos")
    file.write_text("two", encoding="utf-8")
    after = identity(other, "pos")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"target files", "tagger's text"}


def test_targets_that_have_no_place_are_left_out(lm):
    words = " ".join(["pub"] * (lm.length - 1))
    assert not control_tasks.is_feasible(lm, "length", control_targets.Sentence(words))
    assert control_tasks.is_feasible(lm, "unguided", control_targets.Sentence(words))
    flat = control_targets.Sentence("a pub", spans=[(0, 1, "S")])
    assert not control_tasks.is_feasible(lm, "span", flat)
    assert control_tasks.is_feasible(lm, "tree", flat)


def test_targets_of_unknown_labels_are_left_out(lm, config, monkeypatch, capfd):
    known, *_ = control_targets.load_targets(config, "pos", 1)
    alien = control_targets.Sentence("a pub", tags=["Det", "NoSuchTag"])
    monkeypatch.setattr(control, "load_targets", lambda *_: [alien, known])
    row = control._row(lm, config, "pos", 3, None, lambda: None)
    assert (row["targets"], row["left out"]) == (1, 1)
    assert "pos: 1 of 2 sentences cannot be used as targets" in "".join(
        capfd.readouterr()
    )


def test_nothing_can_be_said_of_texts_outside_the_language(scorer):
    assert control.fluency(["pub pub", "a a"], scorer)["nats/token"] is None
    silent = scorer._replace(
        nats=lambda texts: np.full(len(texts), np.nan), exact=False
    )
    assert control.fluency([TEXT], silent)["nats/token"] is None
    heard = scorer._replace(nats=lambda texts: np.ones(len(texts)), exact=False)
    assert control.fluency(["pub pub"], heard)["accepted"] is None
    assert control.fluency(["pub pub"], heard)["nats/token"] == pytest.approx(1 / 3)
    known = control.fluency([TEXT, "pub pub"], scorer)
    assert known["accepted"] == 0.5
    exact = -grammar.log_prob(TEXT) / (len(TEXT.split()) + 1)
    assert known["nats/token"] == pytest.approx(exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"task": "length", "num_steps": [0]},
            r"num_steps=0: must be 1",
        ),
        ({"task": "mood"}, r"config\.control\.task='mood': choose all"),
        ({"task": "tree"}, r"config\.control\.classifiers: no classifier of task tree"),
        ({"preset": "best"}, r"config\.control\.preset='best'"),
        ({"task": "length", "n": 0}, r"config\.control\.n=0: must be 1 or more"),
        ({"task": "length", "ar_model": "SELF"}, "control.ar_model=.*not of objective"),
    ],
)
def test_bad_options(workdir, change, message):
    lm = loading.load(workdir)
    own = {k: str(workdir) if v == "SELF" else v for k, v in change.items()}
    lm.config["control"].update(own)
    with pytest.raises(UserError, match=message):
        control.evaluate_control(lm, str(workdir))
