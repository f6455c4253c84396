# SPDX-License-Identifier: Apache-2.0
"""Control tasks: targets that were never trained on, scores that junk cannot win."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import smoke
from dlm_jax.data import annotations, grammar, tokenizer
from dlm_jax.diffusion import classifier
from dlm_jax.errors import UserError
from dlm_jax.evaluation import control_targets, control_tasks
from dlm_jax.evaluation.control_tasks import TASKS
from dlm_jax.inference import constraints, loading
from dlm_jax.inference.constraints import Guide
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.runtime import checkpoint
from dlm_jax.training import trainer

pytestmark = pytest.mark.usefixtures("compile_quickly")

TEXT = "The Eagle is a cheap pub near Café Sicilia ."
OTHER = "Zizzi is an expensive restaurant in the city centre ."


@pytest.fixture(scope="module")
def config():
    config = smoke.get_config()
    config.control.update(n=2, samples=2, seeds=2, calls=(3,))
    return config


@pytest.fixture(scope="module")
def judge(config):
    return control_targets.judge_of(config, "pos", None)


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    """An untrained model of the grammar, saved."""
    folder = tmp_path_factory.mktemp("tasks") / "run"
    run = trainer.Run(config, str(folder))
    writer = checkpoint.manager(folder, keep=1)
    run.save(writer)
    writer.close()
    return folder


@pytest.fixture(scope="module")
def bundle(config, workdir):
    """The model, and untrained classifiers of every task."""
    made, guides = loading.load(workdir), {}
    cfg = DenoiserConfig(
        dim=8, width=16, layers=1, heads=2, ff=16, time_dim=8, trunk="adaln"
    )
    for task in ("semantic", "pos", "tree"):
        notes = [annotations.NOTES[task](t) for t in grammar.trees(0, 400)]
        names = annotations.names_of(task, notes, made.length)
        params = classifier.init(jax.random.key(0), cfg, names.layout)
        guides[task] = Guide(params, cfg, names)
    made.guides.update(guides)
    return made


def score(task, text, target, judge):
    return next(iter(TASKS[task].score(text, target, judge).values()))


@pytest.mark.parametrize("task", [name for name in TASKS if "+" not in name])
def test_a_target_is_met_by_its_own_text_and_missed_by_others(task, config, judge):
    rng = np.random.default_rng(0)
    for sentence in control_targets.sentences(config, task, 20):
        target = TASKS[task].target(sentence, rng)
        assert score(task, sentence.text, target, judge) == 1
        assert score(task, "pub pub", target, judge) < 0.3
        assert score(task, "", target, judge) == 0


def test_scores_by_hand(judge):
    assert score("semantic", TEXT, {"food": "Italian"}, judge) == 0
    assert score("semantic", TEXT, {"name": "Eagle"}, judge) == 1
    assert score("semantic", TEXT, {"price": "heap"}, judge) == 0  # whole words
    tags = grammar.tags(TEXT)
    wrong = ["NOUN" if i == 0 else tag for i, tag in enumerate(tags)]
    assert score("pos", TEXT, wrong, judge) == pytest.approx(1 - 1 / len(tags))
    assert score("pos", TEXT, [*tags, "NOUN"], judge) == pytest.approx(
        len(tags) / (len(tags) + 1)
    )
    spans = grammar.spans_of(grammar.parse(TEXT))
    assert 0 < score("tree", OTHER, spans, judge) < 1
    assert TASKS["length"].score(TEXT, 12, judge) == {
        "exact length": 0,
        "length +-2": 1,
    }
    assert score("infilling", TEXT, "The ___ is a cheap pub near Café Sicilia .", judge)
    assert not score("infilling", OTHER, "The ___ is a [...]", judge)
    assert not score(
        "infilling", TEXT + " .", "The ___ is a cheap pub near Café Sicilia .", judge
    )


def test_a_span_counts_in_its_place_also_without_a_parse(judge):
    broken = TEXT.replace("near", "near near")
    assert not grammar.accepts(broken)
    there, gone = (3, 5, "Adj"), (6, 8, "Near")
    assert TASKS["span"].score(TEXT, there, judge)["span"] == 1
    found = TASKS["span"].score(broken, there, judge)
    assert found == {"span": 1, "span in a parse": 0}
    assert TASKS["span"].score(broken, gone, judge)["span"] == 0
    assert TASKS["span"].score(TEXT, (3, 4, "Adj"), judge)["span"] == 0


def test_two_tasks_score_apart(judge):
    task = TASKS["semantic+pos"]
    target = ({"food": "Italian"}, grammar.tags(TEXT))
    found = task.score(TEXT, target, judge)
    assert (found["value"], found["tags"]) == (0, 1)


def test_a_field_is_wished_by_classifier_and_by_word(bundle):
    tok = bundle.tokenizer
    near, cheap = {"near": "Café Sicilia"}, {"price": "cheap"}
    rows = [TASKS["semantic"].wish(target, bundle) for target in (near, cheap)]
    both = constraints.stack(rows)
    (phrase,) = both.phrases
    assert phrase.tolist() == [tok.encode("Café Sicilia"), [*tok.encode("cheap"), -1]]
    assert both.labels["semantic"].shape[0] == 2
    assert (both.labels["semantic"] == rows[1].labels["semantic"]).all(1).tolist() == [
        False,
        True,
    ]
    few = tok.to_dict() | {"words": [w for w in tok.to_dict()["words"] if w != "cheap"]}
    ignorant = dataclasses.replace(bundle, tokenizer=tokenizer.from_dict(few))
    assert TASKS["semantic"].wish(cheap, ignorant).phrases[0].tolist() == [[-1]]
    composed = TASKS["semantic+pos"].wish((cheap, ["NOUN"]), bundle)
    assert set(composed.labels) == {"semantic", "pos"}
    assert len(composed.phrases) == 1


def test_every_task_runs_and_a_row_is_measured_once(bundle, workdir, config, capsys):
    judge = control_targets.judge_of(config, "pos", None)
    for name, task in TASKS.items():
        rng = np.random.default_rng(0)
        wanted = [
            task.target(s, rng) for s in control_targets.sentences(config, name, 2)
        ]
        plan = control_tasks.PLANS["tuned"][name]
        row = control_tasks.measure(
            bundle, task, wanted, judge, plan, samples=2, seeds=2, calls=3
        )
        assert len(row["success"]) >= 1
        assert all(0 <= mean <= 1 for mean, _ in row["success"].values())
        assert row["classifier calls"] == 3 * plan.updates * len(task.needs)
    assert row["texts"]


def test_the_command_writes_and_keeps_its_rows(config, workdir, capsys):
    bundle = loading.load(workdir)
    bundle.config["control"].update(task="length", n=2, samples=2, seeds=2, calls=[3])
    rows = control_tasks.run(bundle, str(workdir))
    assert rows[0]["success"]["exact length"][0] == 1
    assert "| length | 3 | exact length 100.0" in capsys.readouterr().out
    (path,) = (workdir / "control").glob("*.json")
    written = json.loads(path.read_text())
    assert written["config"]["seed"] == config.seed
    assert written["step"] == bundle.step
    path.write_text(json.dumps(written | {"accepted": 0.123}))
    assert control_tasks.run(bundle, str(workdir))[0]["accepted"] == 0.123
    for section, change in (("control", {"n": 3}), ("sample", {"clamp": -1.0})):
        bundle.config[section].update(change)  # another experiment is another row
        assert control_tasks.run(bundle, str(workdir))[0]["accepted"] != 0.123
    assert len(list((workdir / "control").glob("*.json"))) == 3


def test_a_row_names_its_classifiers(bundle):
    about = control_tasks._about(bundle, "span", 3, None)
    assert set(about["classifiers in use"]) == {"tree"}
    tree = bundle.guides["tree"]
    moved = tree._replace(params=jax.tree.map(lambda x: x + 1, tree.params))
    other = dataclasses.replace(bundle, guides={**bundle.guides, "tree": moved})
    assert control_tasks._about(other, "span", 3, None) != about
    assert control_tasks._about(other, "pos", 3, None) == control_tasks._about(
        bundle, "pos", 3, None
    )


def test_a_row_names_the_text_of_its_tagger_and_its_targets(bundle, tmp_path):
    file = tmp_path / "target_pos.json"
    file.write_text("one")
    data = bundle.config["data"] | {"source": "e2e"}
    options = bundle.config["control"] | {"targets": str(tmp_path)}
    labels = bundle.config["classifier"] | {"conllu": str(file)}
    config = bundle.config | {"data": data, "control": options, "classifier": labels}
    other = dataclasses.replace(bundle, config=config)
    before = control_tasks._about(other, "pos", 3, None)
    file.write_text("two")
    after = control_tasks._about(other, "pos", 3, None)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"target files", "tagger's text"}


def test_targets_that_have_no_place_are_left_out(bundle):
    words = " ".join(["pub"] * (bundle.length - 1))
    assert not control_tasks._can_say(bundle, "length", control_targets.Sentence(words))
    assert control_tasks._can_say(bundle, "unguided", control_targets.Sentence(words))
    flat = control_targets.Sentence("a pub", spans=[(0, 1, "S")])
    assert not control_tasks._can_say(bundle, "span", flat)
    assert control_tasks._can_say(bundle, "tree", flat)


def test_nothing_can_be_said_of_texts_outside_the_language(judge):
    assert control_tasks.fluency(["pub pub", "a a"], judge)["nats/token"] is None
    silent = judge._replace(nats=lambda texts: np.full(len(texts), np.nan), exact=False)
    assert control_tasks.fluency([TEXT], silent)["nats/token"] is None
    heard = judge._replace(nats=lambda texts: np.ones(len(texts)), exact=False)
    assert control_tasks.fluency(["pub pub"], heard)["accepted"] is None
    assert control_tasks.fluency(["pub pub"], heard)["nats/token"] == pytest.approx(
        1 / 3
    )
    known = control_tasks.fluency([TEXT, "pub pub"], judge)
    assert known["accepted"] == 0.5
    exact = -grammar.log_prob(TEXT) / (len(TEXT.split()) + 1)
    assert known["nats/token"] == pytest.approx(exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "length", "calls": [0]}, r"config\.control\.calls: 0 must be 1"),
        ({"task": "mood"}, r"config\.control\.task='mood': choose all"),
        ({"task": "tree"}, r"config\.control\.classifiers: none of task tree"),
        ({"preset": "best"}, r"config\.control\.preset='best'"),
        ({"task": "length", "n": 0}, r"config\.control\.n=0: must be 1 or more"),
        ({"task": "length", "teacher": "SELF"}, "control.teacher=.*not of objective"),
    ],
)
def test_bad_options(workdir, change, message):
    bundle = loading.load(workdir)
    own = {k: str(workdir) if v == "SELF" else v for k, v in change.items()}
    bundle.config["control"].update(own)
    with pytest.raises(UserError, match=message):
        control_tasks.run(bundle, str(workdir))
