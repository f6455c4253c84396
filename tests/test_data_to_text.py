# SPDX-License-Identifier: Apache-2.0
"""Data to text: records, references, slot errors, and that junk wins nothing."""

import sys
from pathlib import Path

import pytest

from dlm_jax.data import grammar
from dlm_jax.errors import UserError
from dlm_jax.evaluation import data_to_text, references, slot_patterns
from dlm_jax.evaluation.data_to_text import SlotErrors, slot_errors

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import e2e_systems

AROMI = {
    "name": "Aromi",
    "eatType": "coffee shop",
    "food": "Italian",
    "priceRange": "high",
    "customer rating": "1 out of 5",
    "area": "city centre",
    "familyFriendly": "no",
    "near": "The Bakers",
}
MILL = {"name": "The Mill", "eatType": "pub", "priceRange": "less than £20"}
RIGHT = (
    "Aromi is an expensive Italian coffee shop near The Bakers in the city centre. It is "
    "poorly rated and not for kids."
)
OFFICIAL = (
    '"mr","ref"\n'
    '"name[Aromi], eatType[pub], near[The Bakers]","Aromi, a pub, is near The Bakers."\n'
    '"name[The Mill], priceRange[£20-25]","The Mill costs £20-25."\n'
    '"name[Aromi], near[The Bakers], eatType[pub]","Aromi is a pub by The Bakers."\n'
)


# ---- records and references ----------------------------------------------------------


def test_both_notations_are_one_record():
    tokens = (
        "name : Aromi | Type : coffee shop | price : more than £ 30 | area : riverside"
    )
    official = (
        "name[Aromi], eatType[coffee shop], priceRange[more than £30], area[riverside]"
    )
    assert data_to_text.parse_record(tokens) == data_to_text.parse_record(official)
    assert data_to_text.parse_record("price : £ 20 - 25") == {"priceRange": "£20-25"}
    family = data_to_text.parse_record("family friendly : no | customer rating : low")
    assert family == {"familyFriendly": "no", "customer rating": "low"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "is no record"),
        ("a pub", "is no record"),
        ("name[Aromi], a pub", "is no record"),
        ("name[]", "is no record"),
        ("name[Aromi], colour[red]", "'colour' is unknown"),
        ("name : Aromi | name : Zizzi", "'name' stands there twice"),
    ],
)
def test_what_is_no_record_is_refused(line, message):
    with pytest.raises(UserError, match=message):
        data_to_text.parse_record(line)


def test_references_are_grouped_in_order_of_first_occurrence(tmp_path):
    (tmp_path / "refs.csv").write_text(OFFICIAL, encoding="utf-8")
    records, texts = data_to_text.read_references(tmp_path / "refs.csv")
    assert [record["name"] for record in records] == ["Aromi", "The Mill"]
    assert texts[0] == [
        "Aromi, a pub, is near The Bakers.",
        "Aromi is a pub by The Bakers.",
    ]
    lines = (
        "name : Aromi | Type : pub | near : The Bakers||Aromi , a pub , is near The Bakers . \n"
        "name : The Mill | price : £ 20 - 25||The Mill costs £ 20 - 25 . \n"
        "name : Aromi | Type : pub | near : The Bakers||Aromi is a pub by The Bakers . \n"
    )
    (tmp_path / "refs.txt").write_text(lines, encoding="utf-8")
    assert data_to_text.read_references(tmp_path / "refs.txt") == (records, texts)


def test_files_without_references_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("mr,text\nname[Aromi],x\n", encoding="utf-8")
    with pytest.raises(UserError, match="no columns mr and ref"):
        data_to_text.read_references(tmp_path / "a.csv")
    for name, text in (
        ("b.csv", "mr,ref\nname[Aromi],\n"),
        ("b.txt", "name : Aromi\n"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="has no text"):
            data_to_text.read_references(tmp_path / name)


def test_a_quote_that_is_not_closed_loses_no_reference(tmp_path):
    path = tmp_path / "refs.csv"
    path.write_text(OFFICIAL + 'name[Aromi],"a pub\n' + OFFICIAL, encoding="utf-8")
    with pytest.raises(UserError, match=r"refs\.csv line \d+ opens a quote"):
        data_to_text.read_references(path)


def test_tokens_become_ordinary_text():
    tokens = (
        "It 's a family - friendly pub , is n't it ? Less than £ 20 , or £ 20 - 25 ."
    )
    text = "It's a family-friendly pub, isn't it? Less than £20, or £20-25."
    assert data_to_text.detokenize(tokens) == text
    assert data_to_text.detokenize(text) == text
    assert data_to_text.detokenize("a ' cheap ' pub") == "a 'cheap' pub"


# ---- slot errors ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        (RIGHT, (0, 0, 0)),
        (RIGHT.replace("Italian ", ""), (1, 0, 0)),
        (RIGHT.replace(" near The Bakers", ""), (1, 0, 0)),
        (RIGHT.replace("The Bakers", "Burger King"), (0, 0, 1)),
        (RIGHT.replace("Aromi", "Zizzi"), (0, 0, 1)),
        (RIGHT.replace("near", "near Zizzi and"), (0, 1, 0)),
        (RIGHT.replace("n expensive", " cheap"), (0, 0, 1)),
        (RIGHT.replace("coffee shop", "pub"), (0, 0, 1)),
        (RIGHT.replace("coffee shop", "restaurant"), (0, 0, 1)),
        (RIGHT.replace("coffee shop", "coffee shop and restaurant"), (0, 0, 0)),
        (RIGHT.replace("city centre", "riverside area"), (0, 0, 1)),
        (RIGHT.replace("poorly", "highly"), (0, 0, 1)),
        (RIGHT.replace("poorly rated", "rated 5 out of 5"), (0, 0, 1)),
        (RIGHT.replace("not for kids", "for kids"), (0, 0, 1)),
        (RIGHT.replace(" and not for kids", ""), (1, 0, 0)),
        ("", (8, 0, 0)),
    ],
)
def test_missing_added_and_wrong_slots_are_told_apart(text, errors):
    assert slot_errors(AROMI, text) == errors


def test_what_a_record_lacks_is_added():
    assert slot_errors(MILL, "The Mill is a cheap pub.") == (0, 0, 0)
    text = (
        "The Mill is a cheap, kid friendly French pub with high ratings by the river."
    )
    assert slot_errors(MILL, text) == SlotErrors(missing=0, added=4, wrong=0)


@pytest.mark.parametrize(
    ("value", "said", "right"),
    [
        ("less than £20", "It is cheap.", True),
        ("cheap", "It costs less than £20.", False),  # a number that nobody gave
        ("£20-25", "Prices are moderate.", True),
        ("£20-25", "It costs £ 20 - £ 25.", True),
        ("more than £30", "It costs £50.", False),
        ("moderate", "It is mid-priced.", True),
        ("high", "The price range is high with an average customer rating.", True),
        ("moderate", "The price range is high with an average customer rating.", False),
    ],
)
def test_words_of_a_level_express_its_numbers(value, said, right):
    values = slot_patterns.stated(said)["priceRange"]
    assert values
    assert all(slot_patterns.expresses(v, value) for v in values) == right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It welcomes families.", {"yes"}),
        ("It is not cheap and is family-friendly.", {"yes"}),
        ("A family pub not far from the river.", {"yes"}),
        ("A place for children and adults.", {"yes"}),
        ("It isn't really a place for kids.", {"no"}),
        ("Children are not allowed.", {"no"}),
        ("An adults-only pub.", {"no"}),
        ("A pub for adults.", {"no"}),
        ("It is for adults and is near a pub.", {"no"}),
        ("A place for adults and their kids.", {"yes"}),
        ("A pub.", set()),
    ],
)
def test_family_friendly_or_not(text, answer):
    assert slot_patterns.stated(text)["familyFriendly"] == answer


def test_numbers_that_nobody_gave_are_values_of_their_own():
    said = slot_patterns.stated("It is cheap, £50, and rated 1 out of 5 stars.")
    assert said["priceRange"] == {"low", "£50"}
    assert said["customer rating"] == {"1 out of 5"}


@pytest.mark.parametrize(
    "text",
    ["It is rated as 'average'.", "An average, kid friendly pub.", "Rated average."],
)
def test_an_average_rating(text):
    assert slot_patterns.stated(text)["customer rating"] == {"average"}


def test_the_name_of_a_venue_states_no_food_or_type():
    text = "Cotto is near Raja Indian Cuisine, Café Rouge and All Bar One."
    said = slot_patterns.stated(text)
    assert said["food"] == said["eatType"] == set()
    assert len(said["venue"]) == 4


def test_records_that_are_not_of_e2e_are_refused():
    for record in ({}, {"colour": "red"}, {"food": "Thai"}):
        with pytest.raises(
            UserError, match=r"(give fields|choose one) of (name|Chinese)"
        ):
            slot_errors(record, "A pub.")


def test_the_template_states_every_slot():
    for record in (AROMI, MILL, {"food": "English"}, AROMI | {"familyFriendly": "yes"}):
        text = data_to_text.template(record)
        assert sum(slot_errors(record, text)) == 0, text


# ---- the measures together -----------------------------------------------------------


def cases():
    """Twelve records with two references each."""
    foods = ("Italian", "Chinese", "French")
    areas, names = ("riverside", "city centre"), ("Aromi", "Zizzi")
    records = [
        {"name": n, "eatType": "pub", "food": f, "area": a}
        for n in names
        for f in foods
        for a in areas
    ]
    texts = [
        [
            f"{r['name']} is a pub in the {r['area']} that serves {r['food']} food.",
            f"There is a {r['food']} pub in the {r['area']} called {r['name']}.",
        ]
        for r in records
    ]
    return records, texts


def test_junk_wins_nothing():
    records, texts = cases()
    best = data_to_text.scores([x[1] for x in texts], records, texts)
    for name in ("BLEU", "chrF", "ROUGE-L", "distinct"):
        assert best[name] == pytest.approx(100)
    assert best["slot error rate"] == 0
    copies = [", ".join(f"{k}[{v}]" for k, v in r.items()) for r in records]
    junk = {
        "empty": [""] * 12,
        "copy of the record": copies,
        "the same for all": [texts[0][0]] * 12,
    }
    rows = {n: data_to_text.scores(x, records, texts) for n, x in junk.items()}
    assert rows["empty"]["slot error rate"] == pytest.approx(100)
    assert rows["the same for all"]["slot error rate"] > 30
    assert rows["the same for all"]["distinct"] == pytest.approx(100 / 12)
    assert (
        rows["copy of the record"]["BLEU"] < 15
    )  # it states all slots, but is no text
    for row in rows.values():
        for name in ("BLEU", "chrF", "ROUGE-L"):
            assert row[name] < 85


def test_an_output_is_compared_with_all_references_of_its_own_record():
    texts = [
        ["a cheap pub in the city ."],
        ["a bad bar near it .", "the old inn is here ."],
    ]
    outputs = ["A cheap pub in the city.", "The old inn is here."]
    assert references.bleu(outputs, texts) == pytest.approx(100)  # 13a, lower case
    assert references.rouge_l(outputs, texts) == pytest.approx(100)
    assert references.bleu(outputs[::-1], texts) < 20
    assert references.chrf(outputs[::-1], texts) < 40
    assert references.distinct(["a", "a", "b", "c"]) == 0.75


def test_another_number_of_outputs_is_refused():
    records, texts = cases()
    with pytest.raises(UserError, match="11 outputs for 12 records"):
        data_to_text.scores(["A pub."] * 11, records, texts)
    with pytest.raises(UserError, match="record 2 has no references"):
        references.bleu(["a", "b"], [["a"], []])


def test_rouge_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r"pip install 'dlm_jax\[evaluate\]'"):
        references.rouge_l(["a"], [["a"]])


@pytest.mark.parametrize(
    "rows",
    [
        '"name[Aromi]"\tA pub.\n',
        "name[Aromi]\tA pub.\r\n",
        'name[Aromi]\t"A pub."\r\r\n',
    ],
)
def test_outputs_are_read_in_every_quoting(tmp_path, rows):
    path = tmp_path / "a.tsv"
    path.write_text(f"MR\toutput\n{rows}", encoding="utf-8", newline="")
    assert e2e_systems.read_outputs(path, [{"name": "Aromi"}]) == ["A pub."]
    with pytest.raises(UserError, match="its records are not those"):
        e2e_systems.read_outputs(path, [{"name": "Zizzi"}])


# ---- the grammar ---------------------------------------------------------------------


def test_grammar_outputs_are_exact_or_not():
    texts = grammar.sample(0, 20)
    wanted = [grammar.fields(text) for text in texts]
    assert len(set(texts)) == 20
    assert data_to_text.grammar_scores(wanted, texts) == {
        "valid": 100,
        "exact": 100,
        "exact of valid": 100,
        "distinct": 100,
    }
    shifted = data_to_text.grammar_scores(wanted, texts[1:] + texts[:1])
    assert (shifted["valid"], shifted["exact"]) == (100, 0)
    more = [{**wanted[0], "price": "cheap", "food": "French", "near": "Avalon"}]
    assert data_to_text.grammar_scores(more, texts[:1])["exact"] == 0  # one is missing
    fewer = [{"name": wanted[0]["name"]}]
    assert data_to_text.grammar_scores(fewer, texts[:1])["exact"] == 0  # others added
    same = data_to_text.grammar_scores(wanted, texts[:1] * 20)
    assert same["exact"] == same["distinct"] == 5
    junk = data_to_text.grammar_scores(wanted, [text + " pub" for text in texts])
    assert junk["valid"] == junk["exact"] == 0


def test_unknown_fields_of_the_grammar_are_refused():
    with pytest.raises(UserError, match="'colour' is unknown"):
        data_to_text.grammar_scores([{"colour": "red"}], ["A pub ."])
    with pytest.raises(UserError, match="0 outputs for 1 records"):
        data_to_text.grammar_scores([{"name": "Aromi"}], [])


SENTENCES = {  # one is right, the other has another word
    "English": ("the cat eats the fish", "the cat eats the bone"),
    "Chinese": ("猫喜欢吃很多新鲜的鱼。", "猫喜欢吃很多新鲜的肉。"),
    "Thai": ("แมวชอบกินปลาสด", "แมวชอบกินเนื้อ"),
    "Arabic": ("القطة تأكل السمك في البيت", "القطة تأكل السمك في الشارع"),
    "Greek": ("η γάτα τρώει το ψάρι", "η γάτα τρώει το κρέας"),
    "Hindi": ("बिल्ली घर में मछली खाती है", "बिल्ली घर में रोटी खाती है"),
}


@pytest.mark.parametrize("script", SENTENCES)
def test_measures_count_in_every_script(script):
    """ROUGE-L was 0 outside of a to z, and BLEU 0 or 100 without spaces."""
    right, other = SENTENCES[script]
    whole = references.measures([right], [[right]])
    assert whole["BLEU"] == pytest.approx(100)
    assert whole["ROUGE-L"] == pytest.approx(100)
    part = references.measures([other], [[right]])
    assert 20 < part["BLEU"] < 95
    assert 50 < part["ROUGE-L"] < 95
    assert part["words"] > 4
