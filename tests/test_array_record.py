# SPDX-License-Identifier: Apache-2.0
"""Prepared ids: the rows that were written come back, wherever they are read."""

import json

import numpy as np
import pytest

from dlm_jax.data import array_record
from dlm_jax.data.tokenizer import WordTokenizer
from dlm_jax.errors import UserError
from dlm_jax.types import PAD

TOK = WordTokenizer(tuple(f"w{i}" for i in range(90)))
LENGTH = 5


def _prepared(folder, counts):
    """A folder with so many rows of each split, and the rows."""
    folder.mkdir(exist_ok=True)
    rng, rows, crc = np.random.default_rng(0), {}, 0
    for split, count in counts.items():
        rows[split] = rng.integers(0, 94, (count, LENGTH)).astype(np.int32)
        writer = array_record.ArrayRecordWriter(folder, split, LENGTH, TOK.vocab_size)
        for chunk in np.array_split(rows[split], 3):
            writer.add(chunk)
        writer.close()
        crc ^= writer.crc
    about = {"rows": counts, "length": LENGTH, "mode": "pad", "crc": crc}
    about |= {"dtype": "uint16", "tokenizer": TOK.to_dict()}
    (folder / "data.json").write_text(json.dumps(about), encoding="utf-8")
    return rows


@pytest.mark.parametrize("count", [1, 64, 65, 500])
def test_rows_come_back_in_any_order(count, tmp_path, monkeypatch):
    """Also over several files, and with the last page not full."""
    monkeypatch.setattr(array_record, "SHARD", 2)
    rows = _prepared(tmp_path / "p", {"train": count, "valid": 3})["train"]
    found, _, tok, _ = array_record.load_prepared(str(tmp_path / "p"))
    assert len(found) == count
    assert tok == TOK
    index = np.random.default_rng(1).integers(0, count, (4, 7))
    np.testing.assert_array_equal(found[index], rows[index])
    np.testing.assert_array_equal(found[:], rows)
    assert found[index].dtype == np.int32
    files = len(list((tmp_path / "p").glob("train-*")))
    assert files == -(-count // 128)


def test_a_large_vocabulary_is_kept(tmp_path):
    assert (
        array_record.ArrayRecordWriter(tmp_path, "train", LENGTH, 10**5).dtype
        == np.int32
    )
    assert (
        array_record.ArrayRecordWriter(tmp_path, "train", LENGTH, 2**16).dtype
        == np.uint16
    )


def test_texts_of_a_split(tmp_path):
    rows = _prepared(tmp_path / "p", {"train": 4, "valid": 2})
    rows = [TOK.decode(row) for row in rows["valid"]]
    assert array_record.read_texts(str(tmp_path / "p"), "valid") == rows


def _cut(path):
    path.write_bytes(path.read_bytes()[:100])


def _flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _change(**changes):
    def harm(path):
        path.write_text(
            json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes),
            encoding="utf-8",
        )

    return harm


HARMS = {
    "shard cut": ("train-00000.array_record", _cut),
    "shard flipped": ("train-00000.array_record", _flip),
    "shard gone": ("train-00000.array_record", lambda path: path.unlink()),
    "manifest cut": ("data.json", _cut),
    "manifest gone": ("data.json", lambda path: path.unlink()),
    "other counts": ("data.json", _change(rows={"train": 5, "valid": 2})),
    "negative counts": ("data.json", _change(rows={"train": -5, "valid": 2})),
    "no counts": ("data.json", _change(rows=[])),
    "no tokenizer": ("data.json", _change(tokenizer={"kind": "none"})),
    "other length": ("data.json", _change(length=7)),
    "no type": ("data.json", _change(dtype="O")),
}


@pytest.mark.parametrize("name", HARMS)
def test_damage_is_one_line(name, tmp_path):
    _prepared(tmp_path / "p", {"train": 300, "valid": 2})
    file, harm = HARMS[name]
    harm(tmp_path / "p" / file)
    with pytest.raises(UserError) as caught:
        array_record.load_prepared(str(tmp_path / "p"))[0][:]
    assert "\n" not in str(caught.value)


def test_the_last_page_is_filled_with_pad(tmp_path):
    _prepared(tmp_path / "p", {"train": 3, "valid": 1})
    rows = array_record.load_prepared(str(tmp_path / "p"))[0]
    raw = rows.source.__getitems__([0])[0]
    page = np.frombuffer(raw, np.uint16).reshape(array_record.PAGE, LENGTH)
    assert (page[3:] == PAD).all()
