# SPDX-License-Identifier: Apache-2.0
"""Tokenizers brought along: special tokens mapped, saved with the model, refusals."""

import io
import json
import pickle
import sys

import numpy as np
import pytest
import sentencepiece

from dlm_jax.configs import smoke
from dlm_jax.data import array_record, corpus, prepare, sources, tokenizer_files
from dlm_jax.data.tokenizer import END, PAD, SPECIALS, START, UNK, from_dict
from dlm_jax.errors import UserError
from dlm_jax.inference import loading
from dlm_jax.runtime import checkpoint
from dlm_jax.training.trainer import Trainer, language_job

TEXTS = ["the cat sees a tree", "a dog sees the cat", "the tree is old"] * 10
HF = ("wordpiece", "bytes", "unigram", "wordlevel")


def _sentencepiece(path, kind, **options):
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=writer,
        model_type=kind,
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(writer.getvalue())


def _hf(path, kind):
    """A tokenizer.json as of BERT, GPT-2, T5 or a list of words."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import trainers as t

    if kind == "wordpiece":
        tok = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tok.normalizer = normalizers.BertNormalizer(lowercase=True)
        tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tok.decoder = decoders.WordPiece()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = t.WordPieceTrainer(vocab_size=60, special_tokens=special)
    elif kind == "bytes":
        tok = tokenizers.Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<|endoftext|>"]
        trainer = t.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet
        )
    elif kind == "unigram":
        tok = tokenizers.Tokenizer(models.Unigram())
        tok.pre_tokenizer = pre_tokenizers.Metaspace()
        tok.decoder = decoders.Metaspace()
        special = ["<pad>", "</s>", "<unk>"]
        trainer = t.UnigramTrainer(
            vocab_size=60, special_tokens=special, unk_token="<unk>"
        )
    else:
        tok = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = ["<unk>", "<s>"]
        trainer = t.WordLevelTrainer(special_tokens=special)
    tok.train_from_iterator(TEXTS, trainer)
    first, last = special[0], special[-1]
    ids = [(name, tok.token_to_id(name)) for name in {first, last}]
    tok.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=ids
    )
    tok.enable_truncation(3)
    tok.enable_padding(length=16)
    tok.save(str(path))


FILES = {
    "words": ("word", lambda p: p.write_text("\ufeff" + "\n".join(_words()), "utf-8")),
    "SentencePiece unigram": ("sentencepiece", lambda p: _sentencepiece(p, "unigram")),
    "SentencePiece BPE": ("sentencepiece", lambda p: _sentencepiece(p, "bpe")),
    "as of T5": (
        "sentencepiece",
        lambda p: _sentencepiece(
            p, "unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, control_symbols="<m>"
        ),
    ),
    **{f"HF {kind}": ("hf", lambda p, k=kind: _hf(p, k)) for kind in HF},
}


def _words():
    return sorted({word for text in TEXTS for word in text.split()})


def _data(tmp_path, name, **changes):
    kind, write = FILES[name]
    write(tmp_path / "tok")
    (tmp_path / "t.txt").write_text("\n".join(TEXTS), "utf-8")
    config = smoke.get_config()
    config.data.update(source="text", path=str(tmp_path / "t.txt"), length=32)
    config.data.update(tokenizer=kind, tokenizer_path=str(tmp_path / "tok"), **changes)
    return config


@pytest.mark.parametrize("name", FILES)
def test_a_tokenizer_brought_along_works_as_one_of_ours(name, tmp_path):
    config = _data(tmp_path, name)
    tok = sources.train_tokenizer(config.data, [])
    assert tok.tokens()[:4] == list(SPECIALS)
    assert len(tok.tokens()) == len(set(tok.tokens())) == tok.vocab_size
    for text in TEXTS[:3]:
        ids = tok.encode(text)
        assert all(isinstance(i, int) and 4 <= i < tok.vocab_size for i in ids)
        assert tok.decode([START, *ids, END, *ids, PAD]) == text
        assert tok.decode(np.array(ids, np.int32)) == text
    assert tok.decode([]) == ""
    assert isinstance(tok.decode([UNK, 4]), str)
    ids = tok.encode("the 龍 [CLS] <s> </s> <pad> <|endoftext|> <m> [MASK]")
    assert not {START, END, PAD} & set(ids)
    assert max(ids) < tok.vocab_size
    assert (UNK in ids) == (name != "HF bytes")
    for bad in (-1, tok.vocab_size):
        with pytest.raises(UserError, match=f"id {bad} "):
            tok.decode([bad])
    (tmp_path / "tok").unlink()
    copy = from_dict(json.loads(json.dumps(tok.to_dict())))
    assert copy == tok
    assert copy.encode(TEXTS[0]) == tok.encode(TEXTS[0])
    assert pickle.loads(pickle.dumps(tok)).encode(TEXTS[0]) == tok.encode(TEXTS[0])


@pytest.mark.parametrize("name", FILES)
def test_it_encodes_as_its_own_library(name, tmp_path):
    """The ids in its own order, without its special tokens."""
    config = _data(tmp_path, name)
    tok, path = sources.train_tokenizer(config.data, []), str(tmp_path / "tok")
    for text in [*TEXTS[:3], "the old dog is a cat"]:
        if name.startswith("HF"):
            import tokenizers

            own = tokenizers.Tokenizer.from_file(path)
            own.no_truncation()
            own.no_padding()
            strings = own.encode(text, add_special_tokens=False).tokens
        elif name == "words":
            strings = text.split()
        else:
            own = sentencepiece.SentencePieceProcessor(model_file=path)
            strings = own.encode(text, out_type=str)
        assert [tok.tokens()[i] for i in tok.encode(text)] == strings


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_run_keeps_its_tokenizer(name, tmp_path):
    """Resuming, loading and sharing do without the file."""
    config = _data(tmp_path, name, valid_fraction=0.1)
    run = Trainer(language_job(config), str(tmp_path / "run"))
    run.state = run.state._replace(step=run.state.step + 1)
    writer = checkpoint.manager(tmp_path / "run", keep=2)
    run.save(writer)
    writer.close()
    (tmp_path / "tok").unlink()
    lm = loading.load(str(tmp_path / "run"))
    lm.save_pretrained(str(tmp_path / "shared"))
    shared = loading.load(str(tmp_path / "shared"))
    again = Trainer(language_job(config), str(tmp_path / "run"))
    assert lm.tokenizer == shared.tokenizer == again.corpus.tokenizer
    np.testing.assert_array_equal(again.corpus.train, run.corpus.train)
    for model in (lm, shared):
        ids = model.encode(TEXTS[:3])
        assert [model.tokenizer.decode(row) for row in ids] == TEXTS[:3]


@pytest.mark.parametrize("name", FILES)
def test_it_prepares_data(name, tmp_path):
    config = _data(tmp_path, name)
    whole = corpus.load_corpus(config)
    prepare.prepare_data(config, str(tmp_path / "p"))
    (tmp_path / "tok").unlink()
    train, _, tok, _ = array_record.load_prepared(str(tmp_path / "p"))
    assert tok == whole.tokenizer
    np.testing.assert_array_equal(train[: len(train)], whole.train)


JUNK = r"^\S*tok is not a tokenizer\.json of .*: correct config\.data\.tokenizer_path$"


@pytest.mark.parametrize(
    ("kind", "content", "says"),
    [
        ("word", b"the cat\n", "tok line 1: 'the cat' is not one word"),
        ("word", b"the\ncat\n\nthe\n", "tok line 4: 'the' is on line 1, too"),
        ("word", "caf\u00e9\ncafe\u0301\n".encode(), "tok line 2: .* on line 1, too"),
        ("word", b"", "tok holds no word"),
        ("word", b"the\n\xff\n", "tok line 2 is not UTF-8"),
        ("sentencepiece", b"", "tok is not a sentencepiece model"),
        ("sentencepiece", b"the\ncat\n", "tok is not a sentencepiece model"),
        ("hf", b"", JUNK),
        ("hf", b"{}", JUNK),
        ("hf", b"[1]", JUNK),
        ("hf", b"the\ncat\n", JUNK),
        ("hf", b'{"the": 0, "cat": 1}', JUNK),
        ("hf", b'{"model_max_length": 512, "tokenizer_class": "BertTokenizer"}', JUNK),
        ("hf", b'{"version": "1.0", "model": {"type": "None"}}', JUNK),
        (
            "wordpiece",
            b"",
            "config.data.tokenizer='wordpiece': did you mean 'word'. choose one of word, ",
        ),
    ],
)
def test_mistakes_are_one_line(kind, content, says, tmp_path):
    if kind == "hf":
        pytest.importorskip("tokenizers")
    (tmp_path / "tok").write_bytes(content)
    with pytest.raises(UserError, match=says):
        tokenizer_files.load(kind, str(tmp_path / "tok"))
    with pytest.raises(
        UserError, match=r"does not exist: .*config\.data\.tokenizer_path"
    ):
        tokenizer_files.load(kind if kind != "wordpiece" else "hf", "nowhere")


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("word", "a word per"),
        ("sentencepiece", "a SentenceP"),
        ("hf", r"a tokenizer\.json"),
    ],
)
def test_a_folder_is_no_tokenizer(kind, what, tmp_path):
    with pytest.raises(
        UserError, match=f"is a folder: set .*tokenizer_path to.* {what}"
    ):
        tokenizer_files.load(kind, str(tmp_path))


def test_hf_is_brought_along_only(tmp_path):
    config = smoke.get_config()
    config.data.tokenizer = "hf"
    with pytest.raises(UserError, match=r"not trained here: set .*tokenizer_path"):
        sources.train_tokenizer(config.data, TEXTS)


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "tok").write_text("{}", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'dlm_jax\[hf\]'"):
        tokenizer_files.load("hf", str(tmp_path / "tok"))


def test_what_it_leaves_out_is_unknown(tmp_path):
    """Without an unknown token the library leaves out a character in silence."""
    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60)
    tok.train_from_iterator(TEXTS, trainer)
    ours = from_dict({"kind": "hf", "model": tok.to_str()})
    assert UNK not in ours.encode("the cat sees a tree")
    for text, unknown in (
        ("Zcat", 1),
        ("cat Q", 1),
        ("QZ Q", 2),
        ("the \u9f8d cat", 1),
    ):
        assert ours.encode(text).count(UNK) == unknown, text
        assert UNK not in [i for w in ("cat", "the") for i in ours.encode(w)]


def test_a_text_that_a_unigram_without_unknown_token_cannot_encode_is_one_line():
    tokenizers = pytest.importorskip("tokenizers")
    pieces = [(c, -9.0) for c in "theca\u2581"] + [("\u2581the", -1.0)]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, None))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tok = from_dict({"kind": "hf", "model": made.to_str()})
    assert tok.encode("the cat")
    with pytest.raises(UserError, match=r"cannot encode 'the dog'.*an unknown token"):
        tok.encode("the dog")


def test_an_unknown_token_that_it_lacks_is_one_line(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel({"cat": 0}, "[UNK]"))
    with pytest.raises(UserError, match=r"unk_token '\[UNK\]' is not in its vocab"):
        from_dict({"kind": "hf", "model": tok.to_str()})
