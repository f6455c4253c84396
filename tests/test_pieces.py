# SPDX-License-Identifier: Apache-2.0
"""Templates and phrases in the pieces of every tokenizer: words come back as words."""

import base64
import io
import json
import re

import pytest
import sentencepiece
from conftest import untrained

from dlm_jax.data.tokenizer import from_dict, train_sentencepiece, train_word
from dlm_jax.errors import UserError
from dlm_jax.inference import constraints, pieces

TEXTS = ["the cat sees a tree", "a dog sees the cat .", "the old, old tree is old"] * 20
LENGTH = 32


def _sentencepiece(**options):
    writer = io.BytesIO()
    special = {"bos_id": 0, "eos_id": 1, "unk_id": 2, "pad_id": 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=writer,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **special,
        **options,
    )
    model = base64.b64encode(writer.getvalue()).decode("ascii")
    return from_dict({"kind": "sentencepiece", "model": model})


def hf(kind):
    """A tokenizer of Hugging Face's package, as of GPT-2, BERT, T5, Llama or CLIP."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers
    from tokenizers import trainers as t

    letters = sorted(set("".join(TEXTS)))
    if kind.startswith("GPT-2"):
        tok = tokenizers.Tokenizer(models.BPE())
        prefix = kind.endswith("prefix")
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        tok.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = t.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    elif kind.startswith("BERT"):
        tok = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tok.normalizer = normalizers.BertNormalizer(lowercase=kind.endswith("uncased"))
        tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tok.decoder = decoders.WordPiece()
        both = letters + [f"##{letter}" for letter in letters if letter.isalpha()]
        trainer = t.WordPieceTrainer(
            vocab_size=90, special_tokens=["[UNK]", *both, "你", "好"]
        )
    elif kind == "T5":
        tok = tokenizers.Tokenizer(models.Unigram())
        tok.pre_tokenizer = pre_tokenizers.Metaspace()
        tok.decoder = decoders.Metaspace()
        trainer = t.UnigramTrainer(
            vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>"
        )
    elif kind == "Llama":
        tok = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tok.normalizer = normalizers.Sequence(steps)
        tok.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tok.decoder = decoders.Sequence(steps)
        trainer = t.BpeTrainer(vocab_size=60, special_tokens=["<unk>"])
    elif kind == "CLIP":
        tok = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        tok.pre_tokenizer = pre_tokenizers.Whitespace()
        tok.decoder = decoders.BPEDecoder()
        trainer = t.BpeTrainer(vocab_size=90, end_of_word_suffix="</w>")
    else:
        tok = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = t.WordLevelTrainer(special_tokens=["<unk>"])
    tok.train_from_iterator(TEXTS, trainer)
    record = json.loads(tok.to_str())
    record["added_tokens"] = []  # the letters above are no special tokens
    return from_dict({"kind": "hf", "model": json.dumps(record)})


OURS = {
    "ours": lambda: train_sentencepiece(TEXTS, vocab_size=23),
    "bytes": lambda: train_sentencepiece(TEXTS, vocab_size=279, byte_fallback=True),
    "SentencePiece BPE": lambda: _sentencepiece(model_type="bpe"),
    "no space at the start": lambda: _sentencepiece(add_dummy_prefix=False),
    "across words": lambda: _sentencepiece(split_by_whitespace=False),
}
HF = ("GPT-2", "GPT-2 prefix", "BERT cased", "BERT uncased", "T5", "Llama", "words")
KINDS = (*OURS, *HF)


@pytest.fixture(scope="module", params=KINDS)
def lm(request):
    kind = request.param
    return untrained(OURS[kind]() if kind in OURS else hf(kind), LENGTH)


@pytest.mark.parametrize(
    "template",
    [
        "the ___ sees a tree",
        "___ sees the old tree",
        "the cat [...] tree",
        "the old ___",
        "[...] cat [...]",
        "the ___ ___ cat",
    ],
)
def test_the_words_of_a_template_come_back_as_words(lm, template):
    pattern = re.escape(template).replace("___", r"\S+").replace(r"\[\.\.\.\]", ".+")
    for text in lm.infill(template, n=6, seed=0):
        assert re.fullmatch(pattern, text, re.DOTALL)


@pytest.mark.parametrize("phrase", ["cat", "the old tree", "sees"])
def test_a_phrase_is_encoded_as_inside_of_a_text(lm, phrase):
    tok = lm.tokenizer
    asked = pieces.encode_phrase(tok, phrase, "contains")
    whole = tok.encode(f"the dog {phrase}")
    assert whole[-len(asked) :] == asked
    assert tok.decode([*tok.encode("the dog"), *asked]) == f"the dog {phrase}"


def test_a_text_in_the_middle_of_a_word(lm):
    if "old," in lm.tokenizer.tokens():  # they are words
        with pytest.raises(UserError, match="a space before"):
            lm.infill("the ___tree")
        return
    for text in lm.infill("the ___ee is", n=6, seed=0):
        assert text.startswith("the ")
        assert text.endswith("ee is")
        assert text[-6] != " "


@pytest.mark.parametrize("kind", ["ours", "GPT-2", "BERT cased", "words"])
def test_line_breaks_are_kept_or_refused(kind):
    texts = [f"{text}\n{text}" for text in TEXTS]
    tok = train_sentencepiece(texts, vocab_size=25) if kind == "ours" else hf(kind)
    kept = kind in ("ours", "GPT-2")
    assert kept == (tok.decode(tok.encode("cat\nsees")) == "cat\nsees")
    made = untrained(tok, LENGTH)
    for template in ("the cat\nsees ___", "the cat\n___"):
        if kept:
            known = template.removesuffix("___")
            assert all(t.startswith(known) for t in made.infill(template, n=2, seed=0))
        else:
            with pytest.raises(UserError, match="has a line break"):
                made.infill(template)
    assert made.infill("the ___ sees\n", n=1)  # as a line of a file ends


def test_line_breaks_are_refused_by_words():
    made = untrained(train_word(TEXTS), LENGTH)
    for template in ("the\n___", "the cat\nsees ___"):
        with pytest.raises(UserError, match="has a line break"):
            made.infill(template)
    with pytest.raises(UserError, match="contains has a line break"):
        made.control(1, contains="the\ncat")
    assert made.infill("the ___\n", n=1)


@pytest.mark.parametrize("kind", ["suffix", "CLIP"])
def test_a_space_that_belongs_to_the_word_before_it(kind):
    """Such a model has phrases and no templates."""
    if kind == "suffix":
        tok = _sentencepiece(treat_whitespace_as_suffix=True)
    else:
        tok = hf(kind)
    asked = pieces.encode_phrase(tok, "cat", "contains")
    assert tok.decode([*tok.encode("the"), *asked, *tok.encode("sees")]).split() == [
        "the", "cat", "sees",
    ]  # fmt: skip
    with pytest.raises(UserError, match="hold the space after a word"):
        untrained(tok, LENGTH).infill("the ___ sees")


def test_what_a_tokenizer_sets_the_same_everywhere():
    """BERT sets no space before a dot, and one before every Chinese character."""
    tok = hf("BERT cased")
    for text in (".", "你好"):
        for starts in (True, False):
            part = pieces.Part(text, starts)
            assert pieces.encode_part(tok, part, "it") == tok.encode(text)
    allowed = pieces.first(tok, pieces.Part("___", False))
    assert allowed is not None
    assert allowed[tok.encode("你")].all()
    assert not allowed[tok.encode("the")].any()


def test_a_word_to_avoid_is_avoided_at_the_start_of_a_text_too():
    tok = hf("GPT-2")
    asked = constraints.parse_constraints(tok, LENGTH, {}, lacks="cat")
    ids = {i for i in asked.excluded.ravel().tolist() if i >= 0}
    assert ids == {*tok.encode("cat"), *tok.encode(" cat")}
    assert len(ids) == 2
