# SPDX-License-Identifier: Apache-2.0
"""Text in several files, in parquet and as a stream; characters as tokens."""

import itertools
import json
import unicodedata

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from dlm_jax.configs import default
from dlm_jax.data import shards, sources
from dlm_jax.data.characters import train_characters
from dlm_jax.data.tokenizer import from_dict
from dlm_jax.errors import UserError
from dlm_jax.types import UNK

TEXTS = [f"text {i} café" for i in range(30)]


def _cfg(**changes):
    cfg = default.get_config().data
    cfg.update(valid_fraction=0.1, **changes)
    return cfg


def _fails(says, call, *args):
    with pytest.raises(UserError, match=says) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def _write(folder, source, name, texts):
    """A file of texts; returns its path."""
    path = folder / f"{name}.{source}"
    if source == "parquet":
        table = pyarrow.table({"n": range(len(texts)), "text": texts})
        parquet.write_table(table, path, row_group_size=4)
    elif source == "jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), "utf-8")
    elif source == "csv":
        path.write_text("\n".join(["text", *texts]), "utf-8")
    else:
        path.write_text("\n".join(texts), "utf-8")
    return str(path)


@pytest.mark.parametrize("source", ["text", "csv", "jsonl", "parquet"])
@pytest.mark.parametrize("named", ["pattern", "list"])
def test_shards_are_one_text_in_order(tmp_path, source, named):
    parts = [TEXTS[:10], TEXTS[10:21], TEXTS[21:]]
    names = [f"train-0000{i}-of-00003" for i in range(3)]
    paths = [_write(tmp_path, source, *part) for part in zip(names, parts, strict=True)]
    pattern = str(tmp_path / f"train-*.{source}")
    value = pattern if named == "pattern" else ",".join(paths)
    cfg = _cfg(source=source, path=value)
    assert sources.load_texts(cfg, "train") == TEXTS[:27]
    assert sources.load_texts(cfg, "valid") == TEXTS[27:]
    for split in ("train", "valid"):
        assert list(sources.stream(cfg, split)) == sources.load_texts(cfg, split)
        assert sources.count(cfg, split) == len(sources.load_texts(cfg, split))
    cfg.valid_path = _write(tmp_path, source, "valid", TEXTS[:3])
    assert sources.load_texts(cfg, "train") == TEXTS
    assert sources.load_texts(cfg, "valid") == TEXTS[:3]


def test_a_missing_shard_is_named(tmp_path):
    paths = [_write(tmp_path, "text", f"t-0000{i}-of-00003", TEXTS[:2]) for i in (0, 2)]
    cfg = _cfg(source="text", path=str(tmp_path / "t-*.text"))
    _fails(
        "t-00001-of-00003.text is missing, one of the 3", sources.count, cfg, "train"
    )
    _fails("t-00001-of-00003.text is missing", sources.load_texts, cfg, "train")
    cfg.path = ",".join(paths)  # who lists files means these
    assert sources.count(cfg, "train") == 3
    cfg.path += f",{tmp_path}/none.text"
    _fails("none.text does not exist", sources.count, cfg, "train")
    cfg.path = str(tmp_path / "x-*.text")
    _fails("no file matches .*x-.*: set config.data.path", sources.count, cfg, "train")
    cfg.path, cfg.valid_path = paths[0], str(tmp_path / "y-*")
    _fails("no file matches .*set config.data.valid_path", sources.count, cfg, "valid")


def test_a_name_with_a_comma_or_bracket_is_a_name(tmp_path):
    path = _write(tmp_path, "text", "a,b [1]*", TEXTS)
    assert sources.load_texts(_cfg(source="text", path=path), "train") == TEXTS[:27]


# --- parquet


def test_parquet_is_read_on_demand(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 4)
    path = tmp_path / "a.parquet"
    _write(tmp_path, "parquet", "a", TEXTS)
    rows = shards.parquet_records(path, None)
    assert next(rows) == (f"{path} row 1", {"n": 0, "text": TEXTS[0]})
    assert [record["text"] for _, record in rows] == TEXTS[1:]


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["a", None], "row 2 column 'text' holds nothing"),
        ([1, 2], "row 1 column 'text' holds int"),
        ([], "holds no text"),
    ],
)
def test_bad_rows_are_named(tmp_path, texts, says):
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": texts}), path)
    _fails(says, sources.load_texts, _cfg(source="parquet", path=path), "train")
    cfg = _cfg(source="parquet", path=path, column="words")
    says = "no column 'words': .* text" if texts else "holds no text"
    _fails(says, sources.load_texts, cfg, "train")


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    path = tmp_path / "a.parquet"
    _write(tmp_path, "parquet", "a", TEXTS)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] if damage == "cut" else b"text\n" * 99)
    says = "a.parquet is not a parquet file that can be read"
    _fails(says, sources.load_texts, _cfg(source="parquet", path=str(path)), "train")


# --- a stream of characters


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_a_stream_is_the_whole_file(tmp_path, monkeypatch, size):
    monkeypatch.setattr(shards, "BLOCK", size)
    text = " the cat\n\n sat ü 我 on it "
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + text.encode())
    path = str(tmp_path / "a")
    cfg = _cfg(source="stream", path=path, valid_path=path)
    assert "".join(sources.stream(cfg, "train")) == text
    assert "".join(sources.load_texts(cfg, "valid")) == text


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"fine" * 9 + b"\xff" + b"x" * 99, "not UTF-8 .byte 0xff, before byte 40"),
        (b"fine" * 9 + b"\xc3", "not UTF-8 .byte 0xc3"),
        ("cat".encode("utf-16-le"), "NUL"),
        (b"", "holds no text"),
    ],
)
def test_a_bad_stream_is_refused(tmp_path, monkeypatch, raw, says):
    monkeypatch.setattr(shards, "BLOCK", 10)
    (tmp_path / "a").write_bytes(raw)
    cfg = _cfg(source="stream", path=str(tmp_path / "a"))
    _fails(says, sources.load_texts, cfg, "train")


# --- characters


def test_each_character_is_a_token():
    text = "the cat sat  on\nit , café "
    tok = train_characters([text] * 2, min_count=1)
    kept = sorted(set(text))
    assert tok.tokens()[4:] == kept
    ids = tok.encode(text)
    assert [tok.tokens()[i] for i in ids] == list(text)
    assert tok.decode(ids) == text
    assert tok.encode("thé [UNK]") == [*tok.encode("thé "), UNK, UNK, UNK, UNK, UNK]
    assert tok.encode("x") == [UNK]
    assert from_dict(json.loads(json.dumps(tok.to_dict()))) == tok
    decomposed = unicodedata.normalize("NFD", "café")
    assert tok.encode(decomposed) == tok.encode("café")


def test_text8_has_27_characters():
    letters = "abcdefghijklmnopqrstuvwxyz "
    tok = train_characters(itertools.repeat(letters, 11), min_count=10)
    assert tok.vocab_size == 4 + 27
    assert np.all(np.array(tok.encode(letters)) > UNK)
    with pytest.raises(UserError, match="min_count=11 times: lower"):
        train_characters([letters] * 11, min_count=11)
