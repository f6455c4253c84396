# SPDX-License-Identifier: Apache-2.0
"""Texts as rows of ids, rows as texts, and the windows of a stream."""

import numpy as np
import pytest

from dlm_jax.data import batching, encoding
from dlm_jax.data.tokenizer import END, PAD, START, WordTokenizer
from dlm_jax.errors import UserError

TOK = WordTokenizer(("a", "b", "c", "d"))


def _fails(says, call, *args, **kwargs):
    """The call raises a UserError that is one line and says `says`."""
    with pytest.raises(UserError, match=says) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def _encode(texts, length=5, mode="pad", too_long="error"):
    return encoding.encode(texts, TOK, length=length, mode=mode, too_long=too_long)


def test_pad():
    ids = _encode(["a b", "", "a b c"])
    assert ids.dtype == np.int32
    assert ids.tolist() == [
        [START, 4, 5, END, PAD],
        [START, END, PAD, PAD, PAD],
        [START, 4, 5, 6, END],
    ]


def test_too_long():
    texts = ["a b c", "a b c d", "d", "a a a a a"]
    rows = _encode(texts, too_long="truncate").tolist()
    assert rows[1] == [START, 4, 5, 6, 7]  # END is lost, as published
    assert rows[3] == [START, 4, 4, 4, 4]
    assert _encode(texts, too_long="drop").tolist() == [rows[0], rows[2]]
    _fails("text 2 has 6 tokens .*length=5: set length=7", _encode, texts)


def test_block():
    texts = ["a b c d", "a", "b c"]
    ids = _encode(texts, length=4, mode="block")
    stream = [START, 4, 5, 6, 7, END, START, 4, END, START, 5, 6, END]
    assert ids.dtype == np.int32
    assert ids.ravel().tolist() == stream[:12]
    assert ids.shape == (3, 4)


def test_wrap():
    """MDLM's rows: an end after each text, and both ends of a row marked."""
    texts = ["a b c d", "a", "b c"]
    ids = _encode(texts, length=5, mode="wrap")
    assert ids.dtype == np.int32
    assert ids.tolist() == [
        [START, 4, 5, 6, END],
        [START, 7, END, 4, END],
        [START, END, 5, 6, END],
    ]


def test_crop():
    ids = _encode(["a b c d", "a", "b c"], length=3, mode="crop")
    assert ids.dtype == np.int32
    assert ids.tolist() == [[4, 5, 6], [7, 4, 5]]


@pytest.mark.parametrize(
    ("mode", "row", "text"),
    [
        ("pad", [START, 4, END, 5, PAD], "a"),
        ("wrap", [START, 4, 5, END, 6, END, END], "a b\nc"),
        ("wrap", [START, END, 4, 5, END], "a b"),
        ("block", [5, END, START, 4, 4, END, START, 6], "b\na a\nc"),
        ("crop", [4, 5, 6], "a b c"),
        ("wrap", [], ""),
    ],
)
def test_a_packed_row_decodes_to_a_line_per_text(mode, row, text):
    assert encoding.decode(np.array(row, np.int32), TOK, mode) == text


@pytest.mark.parametrize("length", [1, 2, 5])
def test_windows_are_all_of_a_stream(length):
    stream = np.arange(15, dtype=np.int32)
    windows = batching.Windows(stream[: 15 // length * length].reshape(-1, length))
    found = windows[np.arange(len(windows))]
    expected = np.lib.stride_tricks.sliding_window_view(
        stream[: 15 // length * length], length
    )
    np.testing.assert_array_equal(found, expected)
    index = np.array([[0, 3], [7, len(windows) - 1]])
    np.testing.assert_array_equal(windows[index], expected[index])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"texts": []}, "0 texts fill no row"),
        ({"texts": ["a"], "mode": "wrap"}, "no row of config.data.length=5"),
        ({"texts": ["a"], "mode": "wrap", "length": 2}, "length=2: set it to 3"),
        ({"texts": ["a"], "mode": "block"}, "no row of config.data.length=5"),
        ({"texts": ["a a a a"], "too_long": "drop"}, "1 texts fill no row"),
        ({"texts": ["a"], "length": 1}, "config.data.length=1"),
        ({"texts": ["a"], "mode": "cut"}, "config.data.mode='cut': .* pad, block"),
        ({"texts": ["a"], "too_long": "x"}, "config.data.too_long='x': .* truncate"),
    ],
)
def test_encode_refuses(changes, says):
    _fails(says, _encode, **changes)
