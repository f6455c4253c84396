# SPDX-License-Identifier: Apache-2.0
"""Targets: held out, unchanging, with the notes that a task needs or one clear line."""

import json

import nltk
import pytest

from dlm_jax.configs import smoke
from dlm_jax.data import annotations, grammar, sources
from dlm_jax.errors import UserError
from dlm_jax.evaluation import control_targets

RECORD = "name : Aromi | food : Italian | area : riverside"


@pytest.fixture
def config():
    return smoke.get_config()


def test_targets_are_held_out_and_do_not_change(config):
    found = control_targets.load_targets(config, "semantic", 50)
    assert found == control_targets.load_targets(config, "semantic", 50)
    # the language is small: texts recur by chance, as among other held-out texts
    train_texts = set(sources.load_texts(config.data, "train"))
    by_chance = set(grammar.sample(5_000_003, 50))
    shared = [
        len(train_texts & texts) for texts in ({s.text for s in found}, by_chance)
    ]
    assert shared[0] <= shared[1] + 5
    assert all(grammar.accepts(s.text) for s in found)
    assert found[0].tags == grammar.tags(found[0].text)


def test_published_targets(tmp_path):
    (tmp_path / "target_attribute.json").write_text(
        '["customer", "rating", ":", "low"]\n', encoding="utf-8"
    )
    row = {
        "pos": ["START", "NOUN", "VERB", "INTJ", "END"],
        "words_": ["START", "dogs", "sleep", "\n", "END"],
    }
    (tmp_path / "target_pos.json").write_text(json.dumps(row), encoding="utf-8")
    spans = [[0, 1, "NP"], [1, 2, "VP"], [0, 2, "S"], [3, 3, "X"]]
    (tmp_path / "target_spans.json").write_text(
        json.dumps(row | {"spans": spans}), encoding="utf-8"
    )
    (span,) = control_targets.load_published(
        tmp_path, "span"
    )  # they may end with the line's end
    assert span.spans == [(0, 1, "NP"), (1, 1, "VP"), (0, 1, "S")]
    (semantic,) = control_targets.load_published(tmp_path, "semantic")
    assert semantic.fields == {"customer rating": "low"}
    (pos,) = control_targets.load_published(tmp_path, "pos")
    assert (pos.text, pos.tags) == ("dogs sleep", ["NOUN", "VERB"])
    sizes = [
        len(s.text.split()) for s in control_targets.load_published(tmp_path, "length")
    ]
    assert (min(sizes), max(sizes)) == (8, 38)
    with pytest.raises(UserError, match="targets for task tree; choose length"):
        control_targets.load_published(tmp_path, "tree")
    with pytest.raises(UserError, match=r"target_pos\.json"):
        control_targets.load_published(tmp_path / "nothing", "pos")


def test_the_published_files(data_folder):
    folder = data_folder / "control_target"
    assert len(control_targets.load_published(folder, "semantic")) == 79
    assert len(control_targets.load_published(folder, "pos")) == 200
    assert len(control_targets.load_published(folder, "span")) == 200
    both = control_targets.load_published(folder, "semantic+pos")[0]
    assert both.fields == {"food": "English"}
    assert both.tags[:3] == ["PROPN", "AUX", "DET"]


@pytest.fixture
def e2e(tmp_path, config):
    """E2E's validation split of one text, many times."""
    line = f"{RECORD}||Aromi serves Italian food by the river ."
    for split in ("train", "valid"):
        (tmp_path / f"src1_{split}.txt").write_text(f"{line}\n" * 30, encoding="utf-8")
    config.data.update(source="e2e", path=str(tmp_path))
    return config


def test_records_and_tags_of_e2e(e2e, tmp_path):
    (sentence, *_) = control_targets.load_targets(e2e, "semantic", 5)
    assert control_targets.fields_in_text(sentence) == {
        "name": "Aromi",
        "food": "Italian",
    }
    assert sentence.tags is None
    with pytest.raises(UserError, match=r"config\.classifier\.conllu=''"):
        control_targets.load_targets(e2e, "pos", 5)
    rows = [
        f"1\t{w}\t{w}\t{t}" + "\t_" * 6
        for w, t in (("Aromi", "PROPN"), ("food", "NOUN"))
    ]
    (tmp_path / "bank.conllu").write_text("\n\n".join(rows * 20), encoding="utf-8")
    e2e.classifier.conllu = str(tmp_path / "bank.conllu")
    tagged = control_targets.load_targets(e2e, "pos", 2)[0].tags
    assert tagged == control_targets.make_scorer(e2e, "pos", None).tags(sentence.text)
    assert tagged[0] == "PROPN"
    e2e.data.update(source="text", path=str(tmp_path / "src1_valid.txt"))
    with pytest.raises(UserError, match="has no records"):
        control_targets.load_targets(e2e, "semantic", 2)


class Parser:
    """Stands in for benepar."""

    def parse(self, words):
        return nltk.Tree("S", [nltk.Tree("X", [w]) for w in words])


def test_trees_of_e2e_need_a_parser(e2e, monkeypatch):
    with pytest.raises(UserError, match="needs the parser"):
        control_targets.load_targets(e2e, "tree", 5)
    monkeypatch.setattr(annotations, "load_parser", lambda name: Parser())
    found = control_targets.load_targets(e2e, "span", 3)[0]
    assert found.spans == [(0, 7, "S")]
    scorer = control_targets.make_scorer(e2e, "span", None)
    assert scorer.derived("a b") == {(0, 1, "S")}
    assert scorer.spans("") == []


def test_without_an_autoregressive_model_there_are_no_nats(e2e):
    scorer = control_targets.make_scorer(e2e, "length", None)
    assert not (scorer.nats(["a b"]) > 0).any()
