# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: reserved ids, training rules, round trips and damaged records."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

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
