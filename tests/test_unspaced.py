# SPDX-License-Identifier: Apache-2.0
"""Languages without spaces: what measures count, and constraints in pieces."""

import math

import jax
import numpy as np
import pytest
from conftest import untrained
from hypothesis import given
from hypothesis import strategies as st

from dlm_jax.data.tokenizer import train_sentencepiece
from dlm_jax.data.words import words
from dlm_jax.errors import UserError
from dlm_jax.evaluation import fonts, report, text_metrics
from dlm_jax.inference import constraints, mbr, pieces
from dlm_jax.types import END, START

# script -> characters of which texts are made
SCRIPTS = {
    "Chinese": "我爱你中国人大小天地山水火木土金日月星云风雨花草树鸟鱼马牛羊",
    "Japanese": "あいうえおかきくけこさしすせそたちつてとカキクケコ漢字日本語",
    "Thai": "กขคงจฉชซญดตถทนบปผพฟมยรลวสหอ",
    "Lao": "ກຂຄງຈສຊຍດຕຖທນບປຜຝພຟມຢຣລວຫອ",
    "Khmer": "កខគឃងចឆជឈញដឋឌឍណតថទធនបផពភមយរលវសហ",
    "Burmese": "ကခဂဃငစဆဇဈညဋဌဍဎဏတထဒဓနပဖဗဘမယရလ",
    "Tibetan": "ཀཁགངཅཆཇཉཏཐདནཔཕབམཙཚཛཝཞཟའཡརལཤསཧ",
    "Javanese": "ꦏꦐꦑꦒꦓꦔꦕꦖꦗꦘꦙꦚꦛꦜꦝꦞꦟꦠꦡꦢꦣꦤꦥ",
}
LENGTH = 32


def _texts(script, n, seed=0):
    rng = np.random.default_rng(seed)
    letters = list(SCRIPTS[script])
    return ["".join(rng.choice(letters, rng.integers(8, 13))) for _ in range(n)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_character_counts_in_scripts_without_spaces(script):
    text = _texts(script, 1)[0]
    assert words(text) == list(text)
    assert words(f"the cat {text} x") == ["the", "cat", *text, "x"]
    assert text_metrics.lengths([text * 3]) == [3 * len(text)]


def test_marks_belong_to_their_character():
    assert words("ที่นี่") == ["ที่", "นี่"]
    assert words("が" + "か\u3099") == ["が", "か\u3099"]


@given(st.lists(st.text("abcdefgh.,'é한국어Ωяع0", min_size=1, max_size=40)))
def test_words_between_spaces_are_words(units):
    assert words(" ".join(units)) == units


def test_a_long_stretch_is_no_word():
    assert words("ACGT" * 20) == list("ACGT" * 20)
    assert words("a " + "é" * 41) == ["a", *"é" * 41]


def _reference(texts):
    seen = frozenset(text_metrics.all_grams(texts))
    return report.Reference(frozenset(texts), seen, texts, None, False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_character_repeated_fails_the_measures(script):
    held_out, samples = _texts(script, 200), [SCRIPTS[script][0] * 40] * 100
    rows = report.compare([samples], held_out, _reference(held_out))
    flagged = {name for name, row in rows.items() if row.flag}
    assert flagged >= {
        "unigram entropy, nats", "distinct texts", "repetition within a text",
        "length distance, words", "4-grams of train",
    }  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_texts_like_those_held_out_pass_the_measures(script):
    rng, letters = np.random.default_rng(0), list(SCRIPTS[script])
    phrases = ["".join(rng.choice(letters, 4)) for _ in range(20)]
    texts = ["".join(rng.choice(phrases, 3)) for _ in range(400)]
    rows = report.compare([texts[:100]], texts[100:200], _reference(texts[200:]))
    assert not {name for name, row in rows.items() if row.flag}
    assert not math.isnan(rows["distinct-4"].samples.mean)


def test_the_text_most_like_the_others_without_spaces():
    texts = ["天地山水花草", "天地山水花鸟", "天地山水花鱼", "火木土金日月"]
    found = mbr.utilities(texts)
    assert found[3] < min(found[:3])
    assert len(set(found)) > 1


# --- constraints of models of pieces


def _model(texts, vocab_size):
    """An untrained model of pieces of these texts."""
    return untrained(train_sentencepiece(texts, vocab_size=vocab_size), LENGTH)


@pytest.fixture(scope="module", params=["Chinese", "Thai", "Khmer"])
def lm(request):
    return _model(_texts(request.param, 300), 90), SCRIPTS[request.param]


@pytest.fixture(scope="module")
def english():
    text = "the cat sees a tree and the dog sees the old house near a river"
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.permutation(text.split())) for _ in range(200)]
    return _model(lines, 30)


@pytest.mark.parametrize(
    "shape", ["{a}___{b}", "___{a}", "{a}___", "{a}[...]{b}", "{a}[...]"]
)
def test_infilling_keeps_the_known_text(lm, shape):
    lm, letters = lm
    a, b = letters[0] + letters[3], letters[5]
    for text in lm.infill(shape.format(a=a, b=b), n=4, seed=0):
        first, _, last = shape.partition("___" if "___" in shape else "[...]")
        first, last = first.format(a=a), last.format(a=a, b=b)
        assert text.startswith(first)
        assert text.endswith(last)
        assert " " not in text or "[...]" in shape  # an untrained model sets any piece
        assert len(text) > len(first + last)


@pytest.mark.parametrize(
    "template",
    ["the ___ sees a tree", "___ sees the dog", "the cat [...] house", "the [...]"],
)
def test_infilling_keeps_the_known_words(english, template):
    known = template.replace("[...]", "___").split("___")
    for text in english.infill(template, n=6, seed=1):
        assert text.startswith(known[0])
        assert text.endswith(known[1])
        inner = text[len(known[0]) : len(text) - len(known[1])]
        assert inner.strip()


def test_a_blank_inside_a_word(english):
    for text in english.infill("the ho___ sees", n=6, seed=0):
        assert text.startswith("the ho")
        assert text[6] != " "
        assert text.endswith(" sees")


@pytest.mark.parametrize("length", [1, 5, LENGTH - 2])
def test_a_length_counts_pieces(lm, english, length):
    for made in (lm[0], english):
        tok = made.tokenizer
        asked = constraints.parse_constraints(tok, LENGTH, {}, length=np.int64(length))
        rows = jax.tree.map(lambda x: np.repeat(x, 3, 0), asked)
        ids = made.generate(3, seed=0, constraints=rows).ids
        assert (ids[:, 0] == START).all()
        assert (np.argmax(ids == END, -1) == length + 1).all()
        assert len(made.control(2, length=length, seed=0)) == 2
        with pytest.raises(UserError, match="length="):
            made.control(1, length=LENGTH - 1)


def test_a_phrase_is_asked_for_as_it_stands_in_a_text(lm, english):
    lm, letters = lm
    tok = lm.tokenizer
    phrase = letters[2] + letters[4]
    asked = pieces.encode_phrase(tok, phrase, "contains")
    assert not any(tok.tokens()[i].startswith("\u2581") for i in asked)
    assert tok.decode(asked) == phrase
    tok = english.tokenizer
    assert pieces.encode_phrase(tok, "cat", "contains") == tok.encode("cat")


def test_words_of_pieces_take_no_tags(lm):
    with pytest.raises(UserError, match=r"classifier|one word per token"):
        lm[0].control(1, pos=["NOUN"])


def test_templates_are_split_at_blanks():
    found = pieces.split_template(" the ho___ [...]x ___")
    assert [tuple(p) for p in found] == [
        ("the ho", None), ("___", False), ("[...]", True), ("x", False), ("___", True),
    ]  # fmt: skip
    assert [p.text for p in pieces.split_words("a b ___ c")] == ["a b", "___", "c"]


# --- plots


def test_a_character_without_a_glyph_is_a_box_and_is_named_once(capsys):
    strange = "\U000f1234"  # of a private use area: no font has it
    assert fonts.shown(f"cat {strange}é") == f"cat {fonts.BOX}é"
    fonts.warn_of_missing(["cat", strange, f"a{strange}"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "no installed font has 1 of the characters" in out
    fonts.warn_of_missing(["cat", "é"])
    assert not capsys.readouterr().out


def test_families_cover_what_a_font_lacks(monkeypatch):
    monkeypatch.setattr(
        fonts, "_characters", lambda path: {"b"} if "X" in path else {"a"}
    )
    monkeypatch.setattr(fonts, "_font_of", lambda c: {"a": "A", "b": "X"}.get(c, ""))
    assert fonts.families(["a"], "monospace") == ["monospace"]
    assert fonts.families(["abc"], "monospace") == ["monospace", "X"]


def test_wide_characters_take_two_columns():
    assert fonts.columns("cat") == 3
    assert fonts.columns("漢字") == 4
    assert fonts.columns("e\u0301") == 1
