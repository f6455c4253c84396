# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: reserved ids, training rules, round trips and damaged records."""

import json
import os
import pickle
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_jax.data import tokenizer
from dlm_jax.data.tokenizer import END, PAD, START, UNK, WordTokenizer, from_dict
from dlm_jax.errors import UserError

TEXTS = ["the cat sat on the mat", "a dog sat by the river", "END of the café tale"] * 8


@pytest.fixture(params=["word", "sentencepiece"])
def tok(request):
    option = {"word": {"min_count": 0}, "sentencepiece": {"vocab_size": 32}}
    return tokenizer.TRAINERS[request.param](TEXTS, **option[request.param])


def test_interface(tok):
    assert (START, END, UNK, PAD) == (0, 1, 2, 3)
    assert tok.tokens()[:4] == ["START", "END", "UNK", "PAD"]
    assert len(tok.tokens()) == tok.vocab_size
    for text in TEXTS[:3]:
        ids = tok.encode(text)
        assert all(isinstance(i, int) and i >= 4 for i in ids)
        assert tok.decode(ids) == text
        padded = np.array([START, *ids, END, *ids, PAD], np.int32)
        assert tok.decode(padded) == text
    assert UNK in tok.encode("the xylophone é_§")
    assert tok.encode("") == []
    assert tok.decode([]) == ""


def test_records_and_pickles_round_trip(tok):
    copy = from_dict(json.loads(json.dumps(tok.to_dict())))
    assert copy == tok
    assert copy.tokens() == tok.tokens()
    assert [copy.encode(t) for t in TEXTS] == [tok.encode(t) for t in TEXTS]
    assert pickle.loads(pickle.dumps(tok)).encode(TEXTS[0]) == tok.encode(TEXTS[0])


@pytest.mark.parametrize("bad", [-1, 10_000])
def test_an_id_outside_the_vocabulary_is_refused(tok, bad):
    with pytest.raises(UserError, match=f"id {bad} "):
        tok.decode([4, bad])


def test_words_occur_strictly_more_than_min_count_in_order_of_appearance():
    texts = ["z b b", "z b a", "z  b a a", "rare"]
    assert tokenizer.train_word(texts, min_count=2).tokens()[4:] == ["z", "b", "a"]
    assert tokenizer.train_word(texts, min_count=3).tokens()[4:] == ["b"]
    assert tokenizer.train_word(["w"] * 11).words == ("w",)
    with pytest.raises(UserError, match="min_count=10"):
        tokenizer.train_word(["w"] * 10)


def test_special_names_are_ordinary_words():
    tok = WordTokenizer(("cat",))
    assert tok.encode("START END UNK PAD cat") == [UNK, UNK, UNK, UNK, 4]
    assert tok.decode([UNK, 4]) == "UNK cat"
    tok = tokenizer.train_word(["END PAD"], min_count=0)
    assert tok.encode("END PAD") == [4, 5]
    assert tok.decode([4, 5, END, 4]) == "END PAD"
    piece = tokenizer.train_sentencepiece(TEXTS, vocab_size=32)
    ids = piece.encode("START END <s> </s> <unk> <pad>")
    assert not {START, END, PAD} & set(ids)


# --- nothing is lost

SCRIPTS = {
    "Latin": "naïve Ångström ﬁre, ẞ x\u0323\u0307",
    "Greek": "Ἀρχὴ ἥμισυ παντός",
    "Cyrillic": "Всё, что ёлка",
    "Arabic": "اَلْقِطُّ عَلَى \u200fالسَّجَّادَةِ ۱۲",  # noqa: RUF001
    "Hebrew": "הֶחָתוּל בַּבַּיִת",
    "Devanagari": "बिल्ली क्षेत्र में",
    "Thai": "แมวนั่งอยู่บนเสื่อ",
    "Chinese": "龍天地玄黃宇宙洪荒𠮷",
    "Korean": "고양이 한글",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈 🇫🇷 🦜",
    "controls": "a\u200bb\u2028c\x85d\x1ce\nf\rg\x7fh",
    "strange": "\ufffd \ufdd0 \U0010ffff \ue000\ue001 \ufeffa",
}
RESERVED = {
    "PTB": "the <unk> is N <unk>",
    "HTML": "<s> old </s> <pad> <b>",
    "names": "START END UNK PAD ⁇",
    "blocks": "▁▂▃▅▇ ▁the ▅",
    "tab": "two\tcolumns",
    "bytes": "<0x41> <0x0A>",
    "BERT": "[CLS] [SEP] [UNK] [MASK] ##s",
    "GPT": "<|endoftext|> Ġthe",
    "spaces": "one  two   three",
}


def _pieces(texts, **options):
    """A sentencepiece model of any size that the texts allow."""
    size = 400
    for _ in range(3):
        try:
            return tokenizer.train_sentencepiece(texts, vocab_size=size, **options)
        except UserError as error:
            sizes = re.findall(r"vocab_size=(\d+) or", str(error))
            if not sizes:
                raise
            size = int(sizes[-1])
    raise AssertionError(f"no size is right, not even {size}")


def _exact(tok, texts):
    for text in texts:
        ids = tok.encode(text)
        assert UNK not in ids
        assert tok.decode(ids) == text


@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize("repeat", [1, 150], ids=["short", "long"])
@pytest.mark.parametrize("text", [*SCRIPTS.values(), *RESERVED.values()])
def test_sentencepiece_decodes_what_it_was_trained_on(text, repeat, byte_fallback):
    """Also texts above sentencepiece's 4,192 bytes, with and without spaces."""
    text = unicodedata.normalize("NFC", text)
    texts = ["the cat sees a tree"] * 20
    texts += [text * repeat, (f"{text} " * repeat).strip()]
    _exact(_pieces(texts, byte_fallback=byte_fallback), texts)


@pytest.mark.parametrize("text", [*SCRIPTS.values(), *RESERVED.values()])
def test_words_decode_what_they_were_trained_on(text):
    text = " ".join(unicodedata.normalize("NFC", text).split())
    _exact(tokenizer.train_word([text], min_count=0), [text])


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.text().filter(str.strip), min_size=1, max_size=5))
def test_any_text_is_decoded_exactly(texts):
    texts = [unicodedata.normalize("NFC", t.strip().replace("\0", "")) for t in texts]
    if all(map(str.strip, texts)):
        _exact(_pieces(texts), texts)


@pytest.mark.parametrize("text", [*SCRIPTS.values(), *RESERVED.values()])
def test_bytes_spell_unseen_characters_where_asked(text):
    text, texts = unicodedata.normalize("NFC", text), ["zzz zz z", "zz zzz z"] * 9
    _exact(_pieces(texts, byte_fallback=True), [text])
    assert UNK in _pieces(texts).encode(text)


def test_a_text_without_spaces_is_trained_on_in_time():
    """sentencepiece alone takes minutes: its time is quadratic in this length."""
    text = "龍天地玄黃宇宙洪荒" * 30_000
    _exact(_pieces([text]), [text])


TRAIN = {
    "word": lambda texts: tokenizer.train_word(texts, min_count=0),
    "sentencepiece": _pieces,
}


@pytest.mark.parametrize("bad", ["\ud83d", "\0"])
@pytest.mark.parametrize("kind", TRAIN)
def test_what_no_file_holds_is_refused_with_its_place(kind, bad):
    with pytest.raises(UserError, match="text 3 holds"):
        TRAIN[kind](["the cat", "a dog", f"the {bad} cat"])
    with pytest.raises(UserError, match="the text holds"):
        TRAIN[kind](TEXTS).encode(f"the {bad}")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("trained_on", ["NFC", "NFD"])
@pytest.mark.parametrize("kind", TRAIN)
def test_unicode_forms_are_one_text(kind, trained_on, form):
    texts = [text for name, text in SCRIPTS.items() if name != "strange"]
    tok = TRAIN[kind]([unicodedata.normalize(trained_on, text) for text in texts])
    for text in texts:
        composed = unicodedata.normalize("NFC", text)
        assert tok.encode(unicodedata.normalize(form, text)) == tok.encode(composed)
        assert UNK not in tok.encode(composed)


def test_a_vocabulary_in_another_form_knows_its_words():
    tok = WordTokenizer(("cafe\u0301", "the"))
    assert tok.encode("the caf\u00e9") == tok.encode("the cafe\u0301") == [5, 4]


def test_sentencepiece_is_deterministic_and_of_the_size_asked():
    one, two = (tokenizer.train_sentencepiece(TEXTS, vocab_size=30) for _ in range(2))
    assert one.model == two.model
    assert one.vocab_size == 30


@pytest.mark.parametrize(
    ("texts", "size", "says"),
    [
        (TEXTS, 5000, r"too large .* config\.data\.vocab_size=\d+ or less"),
        (TEXTS, 6, r"too small .* config\.data\.vocab_size=\d+ or more"),
        (TEXTS, -3, r"config\.data\.vocab_size=-3"),
        ([], 40, "no text"),
        (["  "], 40, "no text"),
    ],
)
def test_sentencepiece_failures_are_one_line(texts, size, says):
    with pytest.raises(UserError, match=says) as caught:
        tokenizer.train_sentencepiece(texts, vocab_size=size)
    assert "\n" not in str(caught.value)


def test_the_size_named_by_the_remedy_works():
    with pytest.raises(UserError) as caught:
        tokenizer.train_sentencepiece(TEXTS, vocab_size=5000)
    size = int(str(caught.value).split("vocab_size=")[2].split()[0])
    assert tokenizer.train_sentencepiece(TEXTS, vocab_size=size).vocab_size == size


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {},
        {"kind": ["word"]},
        {"kind": "byte"},
        {"kind": "word"},
        {"kind": "word", "words": "cat"},
        {"kind": "word", "words": []},
        {"kind": "word", "words": ["a", 1]},
        {"kind": "word", "words": ["a", "a"]},
        {"kind": "sentencepiece"},
        {"kind": "sentencepiece", "model": ""},
        {"kind": "sentencepiece", "model": 7},
        {"kind": "sentencepiece", "model": "?not base64?"},
        {"kind": "sentencepiece", "model": "anVuaw=="},
    ],
)
def test_damaged_records_are_refused_in_one_line(record):
    with pytest.raises(UserError) as caught:
        from_dict(record)
    assert "\n" not in str(caught.value)


def test_e2e_has_the_published_vocabulary_of_821():
    """arXiv:2205.14217, section 5.1: |V| = 821 on E2E."""
    if "DLM_DATA" not in os.environ:
        pytest.skip("set DLM_DATA to the folder that holds e2e/src1_train.txt")
    path = Path(os.environ["DLM_DATA"]) / "e2e" / "src1_train.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    tok = tokenizer.train_word([line.split("||")[1] for line in lines])
    assert tok.vocab_size == 821
    assert tok.tokens()[4:9] == ["The", "Vaults", "pub", "near", "Café"]
