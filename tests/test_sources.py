# SPDX-License-Identifier: Apache-2.0
"""Data: sources, rows of ids, and batches as a pure function of (seed, step)."""

import json
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from dlm_jax.configs import classifier, default, e2e, e2e_small, smoke, stories
from dlm_jax.data import batching, encoding, sources, tfds
from dlm_jax.data.tokenizer import WordTokenizer
from dlm_jax.errors import UserError

TOK = WordTokenizer(("a", "b", "c", "d"))
LINES = [f"text {i} café" for i in range(20)]


def _cfg(**changes):
    cfg = ConfigDict(
        {
            "source": "text",
            "path": "",
            "valid_path": "",
            "column": "text",
            "delimiter": "",
            "source_column": "",
            "delexicalize": (),
            "size": 30,
            "valid_size": 10,
            "seed": 0,
            "tfds_train": "train",
            "tfds_valid": "",
            "tfds_dir": "",
            "length": 8,
            "mode": "pad",
            "too_long": "error",
            "tokenizer": "word",
            "min_count": 0,
            "vocab_size": 40,
            "byte_fallback": False,
            "tokenizer_path": "",
            "valid_fraction": 0.1,
        }
    )
    cfg.update(changes)
    return cfg


def _fails(says, call, *args, **kwargs):
    """The call raises a UserError that is one line and says `says`."""
    with pytest.raises(UserError, match=says) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# --- sources


def test_grammar_is_seeded_and_its_splits_differ():
    train = sources.load_texts(_cfg(source="grammar"), "train")
    assert len(train) == 30
    assert train == sources.load_texts(_cfg(source="grammar"), "train")
    assert train != sources.load_texts(_cfg(source="grammar", seed=1), "train")
    valid = sources.load_texts(_cfg(source="grammar"), "valid")
    assert len(valid) == 10
    assert valid != train[:10]


CONTENT = {
    "text": "\ufeff" + "\r\n\n".join(LINES) + "\n",
    "csv": "id,text\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(LINES)),
    "jsonl": "".join(json.dumps({"text": t}) + "\n" for t in LINES),
    "e2e": "".join(f"name : x | food : y||{t} \n" for t in LINES),
}


@pytest.mark.parametrize("source", CONTENT)
def test_files_hold_out_their_last_examples(tmp_path, source):
    path = _write(tmp_path / "a", CONTENT[source])
    cfg = _cfg(source=source, path=path)
    assert sources.load_texts(cfg, "train") == LINES[:18]
    assert sources.load_texts(cfg, "valid") == LINES[18:]
    cfg.valid_fraction = 0.0
    assert sources.load_texts(cfg, "train") == LINES
    _fails("valid_fraction=0.0", sources.load_texts, cfg, "valid")
    cfg.valid_path = path
    assert sources.load_texts(cfg, "train") == sources.load_texts(cfg, "valid") == LINES


def test_a_line_separator_inside_a_text_does_not_end_it(tmp_path):
    path = _write(tmp_path / "a", "one\u2028still one\x0bhere\ntwo\n")
    texts = sources.load_texts(_cfg(path=path, valid_fraction=0.0), "train")
    assert texts == ["one\u2028still one\x0bhere", "two"]


def test_csv_cells_may_hold_commas_quotes_and_lines(tmp_path):
    path = _write(tmp_path / "a", 'text,n\n"a, ""b""\nc",1\nd,2\n')
    texts = sources.load_texts(
        _cfg(source="csv", path=path, valid_fraction=0.0), "train"
    )
    assert texts == ['a, "b"\nc', "d"]


# --- nothing is lost in silence

ROWS = 400


@pytest.mark.parametrize("quoted", [True, False])
@pytest.mark.parametrize("at", [1, 101, ROWS - 1])
def test_an_open_quote_is_named_with_its_line(tmp_path, at, quoted):
    """It swallowed the rows up to the end, or up to the next quote."""
    rows = [f'{i},"cat {i}"' if quoted else f"{i},cat {i}" for i in range(ROWS)]
    rows[at] = f'{at},"the cat'
    path = _write(tmp_path / "a", "\n".join(["id,text", *rows]) + "\n")
    cfg = _cfg(source="csv", path=path)
    for read in (sources.load_texts, sources.count):
        _fails(f"a line {at + 2} opens a quote", read, cfg, "train")


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_columns_are_told_apart(tmp_path, delimiter, ends, given):
    """`;` and tabs made one column of a row, so that numbers were trained on."""
    other = ";" if delimiter == "," else ","
    lines = [["id", "text", "note"]]
    lines += [[str(i), f"{t}{other} a dog", "x"] for i, t in enumerate(LINES)]
    path = _write(tmp_path / "a", ends.join(delimiter.join(line) for line in lines))
    name = {"\t": "\\t"}.get(delimiter, delimiter) if given else ""
    cfg = _cfg(source="csv", path=path, delimiter=name, valid_fraction=0.0)
    assert sources.load_texts(cfg, "train") == [f"{t}{other} a dog" for t in LINES]
    cfg.column = delimiter.join(lines[0])
    _fails("has no column .*to one of id, text, note", sources.load_texts, cfg, "train")


@pytest.mark.parametrize("names", [["", "text"], ["text", ""], ["", "text", ""]])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_column_may_have_no_name(tmp_path, delimiter, names):
    """pandas writes its index so: a header that begins with a tab was one column."""
    row = ["the cat" if name else "0" for name in names]
    lines = [delimiter.join(cells) for cells in (names, row, row)]
    path = _write(tmp_path / "a", "\n\n".join(lines) + "\n")
    cfg = _cfg(source="csv", path=path, valid_fraction=0.5)
    assert sources.load_texts(cfg, "train") == ["the cat"]


@pytest.mark.parametrize("delimiter", [",,", '"', "\n"])
def test_a_delimiter_is_one_character(tmp_path, delimiter):
    path = _write(tmp_path / "a", "id,text\n1,x\n")
    cfg = _cfg(source="csv", path=path, delimiter=delimiter)
    _fails(r"config.data.delimiter=.* one character", sources.load_texts, cfg, "train")


@pytest.mark.parametrize("source", ["text", "csv", "jsonl", "e2e"])
@pytest.mark.parametrize("size", [10, 160_000, 3_000_000])
def test_a_text_may_have_any_length(tmp_path, source, size):
    text = "x" * size
    content = {
        "text": f"{text}\n",
        "csv": f'id,text\n1,"{text}"\n',
        "jsonl": json.dumps({"text": text}),
        "e2e": f"name : x||{text}\n",
    }
    path = _write(tmp_path / "a", content[source])
    cfg = _cfg(source=source, path=path, valid_fraction=0.0)
    assert sources.load_texts(cfg, "train") == [text]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("marks", ["first", "joined"])
@pytest.mark.parametrize("source", CONTENT)
def test_marks_and_line_ends_are_no_text(tmp_path, source, ends, marks):
    """A byte order mark, also of each file that was joined, and three line ends."""
    content = "\n".join(CONTENT[source].lstrip("\ufeff").split("\r\n\n"))
    content = content if marks == "first" else content.replace("\n", "\n\ufeff", 3)
    if marks == "joined" and ends == "\r":
        pytest.skip("a mark inside of a line is a character")
    path = _write(tmp_path / "a", "\ufeff" + content.replace("\n", ends))
    cfg = _cfg(source=source, path=path, valid_fraction=0.0)
    assert sources.load_texts(cfg, "train") == LINES


@pytest.mark.parametrize("source", CONTENT)
def test_texts_and_labels_are_in_nfc(tmp_path, source):
    content = unicodedata.normalize("NFD", CONTENT[source])
    if source == "jsonl":  # escapes, too
        content = "".join(
            json.dumps({"text": unicodedata.normalize("NFD", t)}) + "\n" for t in LINES
        )
    cfg = _cfg(source=source, path=_write(tmp_path / "a", content))
    assert sources.load_texts(cfg, "train") == LINES[:18]
    if source == "csv":
        cfg.column = "id"
        labels = sources.labelled(cfg, "train", "text")[1]
        assert labels == LINES[:18]


@pytest.mark.parametrize("source", ["csv", "jsonl"])
def test_rows_without_text_are_counted(tmp_path, source):
    texts = ["", "a", " ", "b", "c", ""]
    rows = {"csv": "id,text\n" + "".join(f"1,{t}\n" for t in texts)}
    rows["jsonl"] = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    path = _write(tmp_path / "a", rows[source])
    cfg = _cfg(source=source, path=path, valid_fraction=0.34)
    assert sources.load_texts(cfg, "train") == list(sources.stream(cfg, "train"))
    assert sources.load_texts(cfg, "train") == ["a", "b"]
    assert (sources.count(cfg, "train"), sources.count_rows(cfg).blank) == (2, 3)


def test_e2e_folder(tmp_path):
    _write(tmp_path / "src1_train.txt", CONTENT["e2e"])
    _write(tmp_path / "src1_valid.txt", "name : x||only one\n")
    cfg = _cfg(source="e2e", path=str(tmp_path))
    assert sources.load_texts(cfg, "train") == LINES
    assert sources.load_texts(cfg, "valid") == ["only one"]


def test_published_e2e():
    """Line counts and vocabulary of the published files, from their README."""
    if "DLM_DATA" not in os.environ:
        pytest.skip("set DLM_DATA to the folder that holds e2e/src1_train.txt")
    path = str(Path(os.environ["DLM_DATA"]) / "e2e")
    cfg = _cfg(source="e2e", path=path, min_count=10, length=64)
    train, valid = (sources.load_texts(cfg, split) for split in ("train", "valid"))
    assert (len(train), len(valid)) == (42_061, 4_672)
    tok = sources.train_tokenizer(cfg, train)
    assert tok.vocab_size == 821
    how = {"length": 64, "mode": "pad"}
    assert len(encoding.encode(train, tok, **how, too_long="truncate")) == 42_061
    assert len(encoding.encode(train, tok, **how, too_long="drop")) == 42_061 - 2
    _fails("set length=77", encoding.encode, train, tok, **how, too_long="error")


@pytest.mark.parametrize(
    ("source", "content", "says"),
    [
        ("text", "", "a holds no text"),
        ("text", "\n \n", "a holds no text"),
        ("text", b"fine\nalso\nbad \xff\n", "a line 3 is not UTF-8"),
        ("e2e", "x : y||fine\n\nx : y|bad\n", r"a line 3 has no '\|\|'"),
        ("csv", "id,words\n1,x\n", "line 2 has no column 'text': .* id, words"),
        ("csv", "id,text\n1,x\n2\n", "line 3 column 'text' holds nothing"),
        ("csv", "", "a holds no text"),
        ("csv", 'text\nfine\n"open', "a line 3 opens a quote"),
        ("csv", 'text\n"two\nlines"\n"a"b\n', "a line 4 opens a quote"),
        ("csv", "id,text\n1,x\n2,the cat, a dog\n", "a line 3 has 3 cells .* row 2"),
        ("csv", "text,text\n1,x\n", r"to one of text \(column 1\), text \(col"),
        ("jsonl", '{"text": "x"}\n{"text": "cat \\ud83d"}\n', "line 2 column .*ud83d"),
        ("jsonl", '{"text": "a\\u0000b"}\n', "line 1 column 'text' holds a NUL"),
        ("text", "fine\nthe cat".encode("utf-16-le"), "a line 1 holds a NUL .*UTF-16"),
        ("text", "fine\n".encode("utf-16"), "a line 1 holds a NUL .*UTF-16"),
        ("csv", "text\nfine\n".encode("utf-32-le"), "NUL"),
        ("jsonl", '{"text": "x"}\n{"text": \n', "a line 2 is not JSON"),
        ("jsonl", '["x"]\n', "a line 1 is not a JSON object"),
        ("jsonl", '{"text": "a", "text": "b"}\n', "line 1 .*'text' occurs twice"),
        ("jsonl", '{"words": "x"}\n', "line 1 has no column 'text': .* words"),
        ("jsonl", '{"text": 3}\n', "line 1 column 'text' holds int"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, source, content, says):
    cfg = _cfg(source=source, path=_write(tmp_path / "a", content))
    assert str(tmp_path) in _fails(says, sources.load_texts, cfg, "train")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"source": "xml"}, "config.data.source='xml': .*grammar, e2e, text"),
        ({"path": ""}, "config.data.path is empty"),
        (
            {"delimiter": ";"},
            "delimiter=';' has no effect with config.data.source=text",
        ),
        ({"path": "nowhere.txt"}, r"nowhere.txt does not exist: set config.data.path"),
        ({"path": "."}, "is a folder: set config.data.path"),
        (
            {"path": "/dev/null"},
            "/dev/null is a device or a pipe.*: set config.data.path",
        ),
        ({"source": "e2e", "path": "."}, "src1_train.txt does not exist"),
        ({"source": "grammar", "path": "", "size": 0}, "grammar holds no text|size"),
        (
            {"source": "grammar", "path": "x.txt"},
            "path='x.txt' has no effect with .*=grammar: .* set the source .text, e2e, csv",
        ),
        (
            {"source": "grammar", "path": "", "valid_path": "x.txt"},
            "config.data.valid_path='x.txt' has no effect with config.data.source=grammar",
        ),
    ],
)
def test_bad_settings_name_the_flag(changes, says):
    _fails(says, sources.load_texts, _cfg(**changes), "train")


FORMS = ("NFC", "NFD")
NAMED = {
    "csv": lambda name: f"id,{name}\n1,the cat\n",
    "jsonl": lambda name: json.dumps({name: "the cat"}, ensure_ascii=False),
    "jsonl with escapes": lambda name: json.dumps({name: "the cat"}),
}


@pytest.mark.parametrize("asked", FORMS)
@pytest.mark.parametrize("written", FORMS)
@pytest.mark.parametrize("kind", NAMED)
def test_names_of_columns_are_compared_in_nfc(tmp_path, kind, written, asked):
    """A file of a Mac has no column of the name that a keyboard types."""
    name, column = (unicodedata.normalize(form, "légende") for form in (written, asked))
    path = _write(tmp_path / "a", NAMED[kind](name))
    source = kind.partition(" ")[0]
    cfg = _cfg(source=source, path=path, column=column, valid_fraction=0.0)
    assert sources.load_texts(cfg, "train") == ["the cat"]
    assert sources.labelled(cfg, "train", column) == (["the cat"], ["the cat"])
    assert sources.count(cfg, "train") == 1


@pytest.mark.parametrize("source", ["csv", "jsonl"])
def test_two_names_that_look_alike_are_one(tmp_path, source):
    one, other = (unicodedata.normalize(form, "légende") for form in FORMS)
    content = {
        "csv": f"{one},{other}\na,b\n",
        "jsonl": f'{{"{one}": "a", "le\\u0301gende": "b"}}',
    }
    path = _write(tmp_path / "a", content[source])
    cfg = _cfg(source=source, path=path, column=other)
    _fails(
        "line 1 .*twice|2 has no column .* \\(column 2\\)",
        sources.load_texts,
        cfg,
        "train",
    )


# --- options that have no effect

TRAINING = {"word": {"min_count"}, "sentencepiece": {"vocab_size", "byte_fallback"}}
TRAINING |= {"char": {"min_count"}}
ENCODING = {"too_long", "tokenizer", "tokenizer_path"}


class Watched(dict):
    """A config.data that remembers which of its options were read."""

    def __init__(self, cfg):
        super().__init__(cfg.items())
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)

    __getattr__ = __getitem__


@pytest.mark.parametrize("source", [*CONTENT, "grammar", "tfds"])
def test_the_options_that_a_source_reads(source, tmp_path, request):
    path = _write(tmp_path / "a", CONTENT.get(source, ""))
    if source == "tfds":
        path, folder = request.getfixturevalue("tfds_set")
        cfg = Watched(_cfg(source=source, path=path, tfds_dir=folder))
    else:
        cfg = Watched(_cfg(source=source, path=path))
    for split in ("train", "valid"):
        sources.SOURCES[source](cfg, split)
    pairs = set(sources.PAIRS)
    assert cfg.read - pairs == set(sources.READS[source]) - pairs


def _refused(cfg, name):
    """Whether a flag of that name is refused with its remedy."""
    try:
        sources.check_options(cfg, [name])
    except UserError as error:
        return f"config.data.{name}=" in str(error) and "leave" in str(error)
    return False


@pytest.mark.parametrize("tok", [*TRAINING, "hf"])
@pytest.mark.parametrize("source", sources.READS)
def test_a_flag_that_has_no_effect_is_refused(source, tok):
    """A tokenizer, a column or a size that another source takes was ignored."""
    options = dict(default.get_config().data.items())
    on = {name: value or "x" for name, value in options.items()}
    on["byte_fallback"] = True
    takes = {"source", "length", "mode", *sources.READS[source]}
    takes |= set() if source == "prepared" else ENCODING | TRAINING.get(tok, set())
    takes -= {"valid_fraction"} if source == "tfds" else set()  # it has tfds_valid
    for name in options:
        changes = {"source": source, "tokenizer": tok, name: on[name]}
        if name in ("source", "tokenizer"):
            changes = {"source": source, "tokenizer": tok}
        cfg = ConfigDict(options | changes)
        assert _refused(cfg, name) == (name not in takes), name


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("too_long", {"mode": "block"}),
        ("too_long", {"mode": "wrap"}),
        ("too_long", {"mode": "crop"}),
        ("valid_fraction", {"valid_path": "x"}),
        ("valid_fraction", {"source": "tfds", "tfds_valid": "test"}),
        ("valid_fraction", {"source": "e2e", "path": "."}),
        ("min_count", {"tokenizer_path": "x"}),
        ("vocab_size", {"tokenizer": "sentencepiece", "tokenizer_path": "x"}),
    ],
)
def test_a_flag_that_another_option_replaces_is_refused(name, changes):
    assert _refused(_cfg(**changes), name)
    *most, _ = changes.items()
    assert not _refused(_cfg(**({"tfds_valid": ""} | dict(most))), name)


@pytest.mark.parametrize("source", sources.READS)
@pytest.mark.parametrize(
    "config", [default, classifier, e2e, e2e_small, smoke, stories]
)
def test_a_bundled_config_takes_every_source(config, source):
    """What it sets for its own source does not stand in the way of a flag."""
    cfg = config.get_config().data
    cfg.update(source=source, path="" if source == "grammar" else "x")
    sources.check_options(cfg, ["source", "path"])


@pytest.mark.parametrize("name", ["path", "byte_fallback", "valid_path", "delimiter"])
def test_an_option_may_be_switched_off(name):
    sources.check_options(_cfg(source="grammar"), [name])


def test_bad_validation_settings_name_the_flag(tmp_path):
    path = _write(tmp_path / "a", "one\n")
    load = sources.load_texts
    _fails("valid_fraction=0.1", load, _cfg(path=path), "train")
    _fails("valid_fraction=1", load, _cfg(path=path, valid_fraction=1.0), "train")
    _fails("config.data.valid_path", load, _cfg(path=path, valid_path="no"), "valid")
    _fails("train or valid", load, _cfg(path=path), "test")


def test_tokenizers_are_trained_by_name():
    cfg = _cfg()
    assert sources.train_tokenizer(cfg, LINES).to_dict()["kind"] == "word"
    cfg.tokenizer, cfg.vocab_size = "sentencepiece", 22
    assert sources.train_tokenizer(cfg, LINES).vocab_size == 22
    _fails(
        "config.data.tokenizer='bpe'",
        sources.train_tokenizer,
        _cfg(tokenizer="bpe"),
        [],
    )


# --- TFDS


@pytest.fixture(scope="module")
def tfds_set(tmp_path_factory):
    """The name and data_dir of a data set that TFDS knows only from this test."""
    pytest.importorskip("array_record")
    tfds = pytest.importorskip("tensorflow_datasets")

    class DlmCafes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "n": np.int64}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(20), "test": iter([(0, EXAMPLE)])}

        def _generate_examples(self, n):
            return ((i, {"text": LINES[i], "n": i}) for i in range(n))

    return "dlm_cafes", str(tmp_path_factory.mktemp("tfds"))


EXAMPLE = {"text": "the test café", "n": 0}


def test_tfds_prepares_once_and_reads_without_tensorflow(tfds_set, monkeypatch):
    name, folder = tfds_set
    cfg = _cfg(source="tfds", path=name, tfds_dir=folder)
    train = sources.load_texts(cfg, "train")
    valid = sources.load_texts(cfg, "valid")
    assert (len(train), len(valid)) == (18, 2)
    assert sorted(train + valid) == sorted(LINES)
    for split, texts in (("train", train), ("valid", valid)):
        assert list(sources.stream(cfg, split)) == texts
        assert sources.count(cfg, split) == len(texts)
    monkeypatch.setattr(tfds, "_check_preparable", None)  # prepared: not asked again
    cfg.tfds_valid = "test"
    assert sources.load_texts(cfg, "valid") == ["the test café"]
    assert len(sources.load_texts(cfg, "train")) == 20
    cfg.tfds_train = "train[:50%]"
    assert len(sources.load_texts(cfg, "train")) == 10
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"path": "no_such_set"}, "no_such_set is neither a known data set"),
        ({"path": "bad name!"}, "bad name! .* config.data.path"),
        ({"path": "dlm_cafes:9.9.9"}, "9.9.9"),
        ({"tfds_train": "dev"}, "'dev' .*train.*test.* tfds_train"),
        ({"column": "words"}, "no column 'words': .* text, n"),
        ({"column": "n"}, "column 'n' holds int"),
    ],
)
def test_tfds_failures_are_one_line(tfds_set, changes, says):
    name, folder = tfds_set
    cfg = _cfg(**({"source": "tfds", "path": name, "tfds_dir": folder} | changes))
    _fails(says, sources.load_texts, cfg, "train")


def test_tfds_that_needs_tensorflow_says_so(tfds_set, tmp_path, monkeypatch):
    cfg = _cfg(source="tfds", path="lm1b", tfds_dir=str(tmp_path))
    monkeypatch.setattr(tfds, "find_spec", lambda name: None)
    _fails("lm1b needs the package tensorflow", sources.load_texts, cfg, "train")

    def prepare(cfg):
        raise RuntimeError("two\nlines") from ModuleNotFoundError("", name="tensorflow")

    monkeypatch.setattr(tfds, "_prepared", prepare)
    cfg.path = tfds_set[0]
    _fails("needs the package tensorflow", sources.load_texts, cfg, "train")


def test_tfds_without_a_network_fails_at_once(tfds_set, tmp_path, monkeypatch):
    requests = pytest.importorskip("requests")

    def head(url, timeout):
        assert timeout <= 10
        raise requests.ConnectionError("no\nroute")

    monkeypatch.setattr(requests, "head", head)
    cfg = _cfg(source="tfds", path="e2e_cleaned", tfds_dir=str(tmp_path))
    says = "e2e_cleaned is not prepared .* cannot be reached: .*tfds_dir"
    _fails(says, sources.load_texts, cfg, "train")


# --- ids -> batches

IDS = np.arange(46, dtype=np.int32).reshape(23, 2)


def _rows(step, seed=0, batch=8, **host):
    return IDS[
        batching.batch_index(len(IDS), seed=seed, step=step, batch=batch, **host)
    ]


@pytest.mark.parametrize("batch", [1, 8, 23, 60])
def test_every_row_comes_once_an_epoch(batch):
    stream = np.concatenate([_rows(step, batch=batch) for step in range(100)])[:, 0]
    for epoch in range(len(stream) // 23):
        assert sorted(stream[epoch * 23 : (epoch + 1) * 23]) == IDS[:, 0].tolist()


def test_epochs_are_shuffled_anew_and_seeds_differ():
    epochs = [_rows(step, batch=23)[:, 0].tolist() for step in range(4)]
    assert len({tuple(epoch) for epoch in [*epochs, IDS[:, 0].tolist()]}) == 5
    assert _rows(0, seed=1, batch=23)[:, 0].tolist() not in epochs
    assert _rows(0, seed=-1).shape == _rows(0, seed=2**40).shape == (8, 2)


def test_a_batch_depends_on_seed_and_step_alone():
    forward = [_rows(step) for step in range(12)]
    for step in (11, 0, 7, 3, 7):
        _rows(step + 100, seed=5)
        np.testing.assert_array_equal(_rows(step), forward[step])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_the_batch(hosts):
    for step in range(6):
        shares = [_rows(step, host=host, hosts=hosts) for host in range(hosts)]
        assert {len(share) for share in shares} == {8 // hosts}
        np.testing.assert_array_equal(np.concatenate(shares), _rows(step))


def test_hosts_must_divide_the_batch():
    _fails("batch 8 is not divisible by 3 hosts", _rows, 0, hosts=3)


@pytest.mark.parametrize("batch", [1, 8, 23, 50])
def test_evaluation_batches_cover_the_rows_once(batch):
    pairs = list(batching.batches(IDS, batch))
    assert len(pairs) == -(-23 // batch)
    assert all(
        ids.shape == (batch, 2) and mask.shape == (batch,) for ids, mask in pairs
    )
    kept = np.concatenate([ids[mask > 0] for ids, mask in pairs])
    np.testing.assert_array_equal(kept, IDS)
    assert sum(mask.sum() for _, mask in pairs) == 23
