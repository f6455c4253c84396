# SPDX-License-Identifier: Apache-2.0
"""Labels: the grammar's own, records, tags and trees of files, as arrays."""

import importlib.util
import json
import random
import unicodedata

import nltk
import numpy as np
import pytest

from dlm_jax.configs import classifier as classifier_config
from dlm_jax.data import annotations, grammar, sources
from dlm_jax.errors import UserError

TEXT = "The Eagle is a cheap pub near Café Sicilia ."
TREE = grammar.parse(TEXT)
LENGTH = 16
CONLLU = """# text = a cat sleeps
1\ta\ta\tDET\t_\t_\t2\tdet\t_\t_
2-3\tcat's\t_\t_\t_\t_\t_\t_\t_\t_
2\tcat\tcat\tNOUN\t_\t_\t3\tnsubj\t_\t_
3\tsleeps\tsleep\tVERB\t_\t_\t0\troot\t_\t_

1\tdogs\tdog\tNOUN\t_\t_\t2\tnsubj\t_\t_
2\tsleep\tsleep\tVERB\t_\t_\t0\troot\t_\t_
"""


def config_of(task, **values):
    config = classifier_config.get_config(task)
    config.data.update(size=60, valid_size=20, length=32)
    with config.unlocked():
        config.update_from_flattened_dict(values)
    return config


def label_vocab(task, note):
    return annotations.build_label_vocab(task, [note], LENGTH)


def test_fields_are_classes_and_silence_is_one():
    note = grammar.fields_of(TREE)
    known = annotations.build_label_vocab(
        "semantic", [note, {"food": "Italian"}], LENGTH
    )
    row = annotations.encode([note], known)[0]
    told = {f: known.classes[f][k] for f, k in zip(known.classes, row, strict=True)}
    assert told == note | {"food": annotations.NONE}
    assert known.head_spec == ("fields", (5,), 2)
    assert (
        annotations.encode([{"food": "Martian"}], known)[0][
            list(known.classes).index("food")
        ]
        == -1
    )


def test_tags_run_from_start_to_pad():
    note = grammar.tags_of(TREE)
    known = label_vocab("pos", note)
    told = [known.classes["pos"][k] for k in annotations.encode([note], known)[0]]
    assert told == ["START", *note, "END"] + ["PAD"] * (LENGTH - len(note) - 2)


def test_a_chart_holds_the_constituents_one_position_after_start():
    note = grammar.spans_of(TREE)
    known = label_vocab("tree", note)
    chart = annotations.encode([note], known).reshape(LENGTH, LENGTH)
    assert (chart[np.tril_indices(LENGTH, -1)] == -1).all()
    found = {
        (int(i) - 1, int(j) - 1, known.classes["tree"][chart[i, j]])
        for i, j in zip(*np.nonzero(chart > 0), strict=True)
    }
    assert found == set(note)
    one = annotations.TARGET_ENCODERS["span"](note[1], known)
    first, last, label = note[1]
    assert (one >= 0).sum() == 1
    assert known.classes["tree"][one[first + 1, last + 1]] == label


KNOWN = {
    "semantic": label_vocab("semantic", {"food": "Italian", "area": "riverside"}),
    "pos": label_vocab("pos", ["NOUN"]),
    "tree": label_vocab("tree", [(0, 1, "NP"), (0, 2, "S")]),
}


def encode_target(constraint, value):
    return annotations.TARGET_ENCODERS[constraint](
        value, KNOWN["tree" if constraint == "span" else constraint]
    )


def test_what_is_asked_and_no_more():
    assert encode_target("semantic", {"food": "Italian"}).tolist() == [-1, 1]
    row = encode_target("pos", ["NOUN", "NOUN"])
    assert [KNOWN["pos"].classes["pos"][k] for k in row[:5]] == [
        "START", "NOUN", "NOUN", "END", "PAD",
    ]  # fmt: skip
    chart = encode_target("tree", [(0, 1, "NP"), (0, 2, "S")])
    assert (chart > 0).sum() == 2
    assert (chart >= 0).sum() == LENGTH * (LENGTH + 1) // 2  # "none" is asked elsewhere


@pytest.mark.parametrize(
    ("constraint", "value", "message"),
    [
        ("semantic", {"food": "Greek"}, r"food 'Greek': not seen.*none, Italian"),
        ("semantic", {"fod": "Italian"}, r"'fod'.*knows only area, food"),
        ("semantic", "Italian", r"semantic='Italian': give \{field: value\}"),
        ("pos", ["XYZ"], r"pos 'XYZ': not seen"),
        ("pos", ["PAD"], r"pos 'PAD': give only the tags of the words"),
        ("pos", ["NOUN"] * 20, r"pos: 20 words; the model has 16"),
        ("pos", [], r"pos: 0 words"),
        ("tree", [(0, 1, "QP")], r"tree 'QP': not seen"),
        ("tree", [], r"tree: 0 words"),
        ("tree", [(0, 1, "NP"), (0, 1, "S")], r"two labels for one"),
        ("tree", [(0, 1, "NP"), (1, 2, "S")], r"\(0, 1\) and \(1, 2\) cross"),
        ("span", (-3, 2, "NP"), r"give \(first, last, label\)"),
        ("span", (2, 1, "NP"), r"give \(first, last, label\)"),
        ("span", (0, 1, "none"), r"'none' is not a constituent label"),
        ("span", (0, 15, "NP"), r"span: 16 words"),
    ],
)
def test_what_cannot_be_asked(constraint, value, message):
    with pytest.raises(UserError, match=message):
        encode_target(constraint, value)


@pytest.mark.parametrize("task", ["semantic", "pos", "tree"])
def test_the_grammar_annotates_its_training_texts(task):
    config = config_of(task, **{"classifier.texts": 40})
    texts, notes = annotations.load_annotated(config, task, "train")
    assert texts == grammar.sample(config.data.seed, 40)
    exact = {"semantic": grammar.fields, "pos": grammar.tags}.get(task)
    if exact:
        assert notes[:5] == [exact(text) for text in texts[:5]]
    held_out, _ = annotations.load_annotated(config, task, "valid")
    assert held_out == sources.load_texts(config.data, "valid")


def test_records_of_e2e(tmp_path):
    path = tmp_path / "src1_train.txt"
    path.write_text(
        "name : Aromi | area : city centre||Aromi is central .\n" * 4, encoding="utf-8"
    )
    config = config_of("semantic", **{"data.source": "e2e", "data.path": str(path)})
    texts, notes = annotations.load_annotated(config, "semantic", "train")
    assert texts == ["Aromi is central ."] * 3
    assert notes[0] == {"name": "Aromi", "area": "city centre"}
    config.data.source = "text"
    with pytest.raises(UserError, match="has no records"):
        annotations.load_annotated(config, "semantic", "train")
    with pytest.raises(UserError, match=r"classifier\.task='mood': choose one of"):
        annotations.load_annotated(config, "mood", "train")


def test_texts_are_drawn_from_all_of_a_sorted_file(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"text {i}", "label": "abc"[i // 100]} for i in range(300)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    changes = {"data.source": "jsonl", "data.path": str(path), "classifier.texts": 60}
    config = config_of("label", **changes)
    texts, notes = annotations.load_annotated(config, "label", "train")
    assert len(texts) == 60
    assert texts == sorted(texts, key=lambda text: int(text.split()[1]))
    assert {n["label"] for n in notes} == {"a", "b", "c"}
    for text, note in zip(texts, notes, strict=True):  # still each other's
        assert note["label"] == "abc"[int(text.split()[1]) // 100]
    assert annotations.load_annotated(config, "label", "train") == (texts, notes)


def test_any_label_from_a_column(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    changes = {"data.source": "jsonl", "data.path": str(path)}
    config = config_of("label", **changes)
    texts, notes = annotations.load_annotated(config, "label", "train")
    assert notes[:2] == [{"label": "a"}, {"label": "b"}]
    assert len(texts) == len(notes) == 9
    assert annotations.build_label_vocab("label", notes, LENGTH).classes == {
        "label": ["a", "b"]
    }
    rows[3]["label"], rows[8]["text"] = "", ""  # as many of each: they must not shift
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(UserError, match=r"line 4 has no config\.classifier\.column"):
        annotations.load_annotated(config, "label", "train")
    rows[3]["label"] = 0
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    texts, notes = annotations.load_annotated(config, "label", "train")
    assert (texts[3], notes[3]) == ("text 3", {"label": "0"})
    assert [n["label"] for n in notes] == list("aba0abab")
    config.data.source = "text"
    with pytest.raises(UserError, match="has no columns"):
        annotations.load_annotated(config, "label", "train")


@pytest.mark.parametrize("asked", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_a_column_of_labels_is_known_in_any_form(written, asked, tmp_path):
    column, field = (unicodedata.normalize(form, "goût") for form in (written, asked))
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"text {i}", column: "ab"[i % 2]} for i in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    changes = {"data.source": "jsonl", "data.path": str(path)}
    config = config_of("label", **changes, **{"classifier.column": column})
    _, notes = annotations.load_annotated(config, "label", "train")
    vocab = annotations.build_label_vocab("label", notes, LENGTH)
    target = annotations.TARGET_ENCODERS["label"]({field: "b"}, vocab)
    assert target.tolist() == [1]


@pytest.mark.parametrize("content", [None, "no treebank"])
def test_a_tagger_leaves_the_random_numbers_of_the_process(content, tmp_path):
    path = tmp_path / "bank.conllu"
    if content:
        path.write_text(content, encoding="utf-8")
    random.seed(len(str(path)))
    before = random.getstate()
    with pytest.raises(UserError):
        annotations.train_tagger(path)
    assert random.getstate() == before


def test_a_tagger_learns_from_a_treebank(tmp_path):
    path = tmp_path / "bank.conllu"
    path.write_text(CONLLU * 20, encoding="utf-8")
    assert annotations.read_conllu(path)[0] == [
        ("a", "DET"),
        ("cat", "NOUN"),
        ("sleeps", "VERB"),
    ]
    tagger = annotations.train_tagger(path)
    assert annotations.tags_of(tagger, "dogs sleep") == ["NOUN", "VERB"]
    weights = tagger.model.weights
    annotations.train_tagger.cache_clear()
    assert annotations.train_tagger(path).model.weights == weights  # whatever was drawn
    path.write_text("no columns\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no sentence"):
        annotations.read_conllu(path)
    with pytest.raises(UserError, match=r"config\.classifier\.conllu=''"):
        annotations.read_conllu("")


def test_the_tagger_on_a_treebank_it_never_saw(data_folder):
    folder = data_folder / "ud_english_ewt"
    tagger = annotations.train_tagger(folder / "en_ewt-ud-dev.conllu")
    test = annotations.read_conllu(folder / "en_ewt-ud-test.conllu")
    right = [
        found == tag
        for sentence in test
        for found, (_, tag) in zip(
            annotations.tags_of(
                tagger, " ".join(w.replace(" ", "_") for w, _ in sentence)
            ),
            sentence,
            strict=True,
        )
    ]
    assert np.mean(right) > 0.88  # a tag a word, its commonest: 0.80 to 0.85


class Parser:
    """Stands in for benepar: parse(words) gives a tree under TOP."""

    def parse(self, words):
        assert words == ["a", "cat", "sleeps"]
        return nltk.Tree.fromstring("(TOP (S (NP (DT a) (NN cat)) (VP (VBZ sleeps))))")


def test_trees_of_a_parser():
    found = annotations.parse_spans(Parser(), "a cat sleeps")
    assert set(found) == {(0, 2, "S"), (0, 1, "NP"), (2, 2, "VP")}
    if not importlib.util.find_spec("benepar"):
        with pytest.raises(UserError, match="needs the parser"):
            annotations.load_parser("benepar_en3")
