# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks reckon with: splits, scores, keys of rows, ratios."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import anlg
import control_baselines
import control_table
import plan
import protocols
from lib import alternate


def test_windows_of_held_out_stories_are_of_no_training_story(tmp_path):
    stories = [
        " ".join(f"The cat {i} saw {j} dogs." for j in range(7)) for i in range(40)
    ]
    (tmp_path / "stories.txt").write_text("\n".join(stories), encoding="utf-8")
    train, held_out = anlg.windows(str(tmp_path / "stories.txt"))
    numbers = [{w[0].split()[2] for w in rows} for rows in (train, held_out)]
    assert numbers[1] == {"38", "39"}
    assert not numbers[0] & numbers[1]
    first = [w for w in held_out if w[0].split()[2] == "38"]
    assert [w[0].split()[4] for w in first] == ["0", "3"]  # no sentence twice
    assert [w[1].split()[4] for w in first] == ["1", "4"]


def test_scores_of_the_truth_and_of_junk():
    true = ["the cat saw a big dog today .", "a bird sang in the old tree ."]
    best = anlg.scores(true, true)
    assert best["BLEU-4"] == pytest.approx(100)
    assert best["ROUGE-L"] == pytest.approx(100)
    for junk in (["the"] * 2, [true[0]] * 2, true[::-1]):
        assert anlg.scores(junk, true)["ROUGE-L"] < 70
    assert anlg.scores([true[0]] * 2, true)["distinct"] == 0.5


def test_a_control_is_no_answer():
    bar = control_baselines.BAR
    assert control_baselines.answer(f"price : cheap {bar} A pub .") == "A pub ."
    assert control_baselines.answer(f"price : cheap {bar}") == ""


def test_rows_of_other_settings_stay_apart():
    row = {
        "task": "pos",
        "num_steps": 32,
        "model": 1,
        "sample": {},
        "control": {"n": 100},
    }
    row |= {"classifiers in use": {"pos": 3}}
    assert control_table.key(row) == control_table.key(dict(row))
    for change in ({"control": {"n": 16}}, {"classifiers in use": {"pos": 4}}):
        assert control_table.key(row | change) != control_table.key(row)


def test_a_baselines_row_is_kept_for_its_own_sizes():
    row = {"task": "pos", "method": "FUDGE", "targets": 9, "samples": 2, "seeds": 3}
    assert control_baselines._sizes(row) == ("pos", "FUDGE", 9, False, 2, 3, 2000)
    assert control_baselines._sizes(row | {"train_steps": 5})[-1] == 5
    published = row | {"n": 100, "published": True}  # fewer targets than asked for
    assert control_baselines._sizes(published)[2:4] == (100, True)


def test_constituents_become_the_words_of_their_tree():
    spans = [(0, 3, "S"), (0, 1, "NP"), (2, 3, "VP"), (3, 3, "NP::N")]
    words = control_baselines.tree_words(spans, ["D", "N", "V", "P"])
    assert words == "(S (NP (D * ) (N * ) ) (VP (V * ) (NP (N (P * ) ) ) ) )"


def test_ratios_are_taken_within_a_round():
    rows = {"a": {"all": [2.0, 20.0, 6.0]}, "b": {"all": [1.0, 10.0, 2.0]}}
    assert alternate.ratio(rows, "a", "b")["median"] == 2.0


def test_a_row_measured_again_replaces_its_own_only(tmp_path):
    pytest.importorskip("torch", reason="the peers need the extra `peer`")
    import speed

    row = {"case": "e2e", "job": "train", "batch": 1, "dtype": "mixed", "device": "cpu"}
    path = tmp_path / "speed.json"
    for new in (row | {"x": 1}, row | {"batch": 2, "x": 2}, row | {"x": 3}):
        speed.keep(path, new)
    assert [r["x"] for r in json.loads(path.read_text(encoding="utf-8"))] == [2, 3]


def test_bytes_of_shapes():
    assert plan._bytes("f32[3,4]{1,0}") == 48
    assert plan._bytes("(bf16[8]{0}, f32[])") == 20


def test_stand_ins_for_the_protocols_text():
    assert protocols.letters([" = A B = \n The <unk> cat, in 1920 ."]) == (
        " a b the cat in one nine two zero "
    )
    found = ["= A =\n= = B = =\none two three four . five six seven eight ?"]
    assert protocols.sentences(found) == [
        *("one two three four .", "five six seven eight ?"),
    ]


def test_entropy_of_a_row_is_that_of_its_tokens():
    rows = np.array([[0, 4, 5, 4, 5, 1, 3], [0, 6, 6, 6, 1, 3, 3]])
    assert protocols.row_entropy(rows) == pytest.approx(np.log(2) / 2)
