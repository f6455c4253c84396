# SPDX-License-Identifier: Apache-2.0
"""Encodes texts as rows of ids: between START and END, padded or packed in blocks."""

from collections.abc import Callable
from itertools import chain

import numpy as np
from jaxtyping import Int32

from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError, choose
from dlm_jax.types import END, PAD, START


def encode(
    texts: list[str], tok: Tokenizer, *, length: int, mode: str, too_long: str
) -> Int32[np.ndarray, "n l"]:
    """Encodes texts as ids [n l], l = `length`, each text between START and END.

    mode: "pad" puts one text in each row and fills it with PAD; "block" joins all
    texts, cuts the stream into rows and drops the remainder. too_long: what "pad" does
    with a text that does not fit: "error", "truncate" (END is lost, as in the published
    code) or "drop". Raises UserError for a text that does not fit, an unknown choice or
    an empty result.
    """
    arrange, fit = arrangement(length, mode, too_long)
    ids = arrange([delimited(text, tok) for text in texts], length, fit)
    if not len(ids):
        raise UserError(
            f"{len(texts)} texts fill no row of config.data.length={length} in mode "
            f"{mode}: set a smaller length or give more text"
        )
    return ids


def arrangement(length: int, mode: str, too_long: str) -> tuple[Callable, Callable]:
    """Returns the functions for `mode` and `too_long`. Raises UserError."""
    if length < 2:
        raise UserError(f"config.data.length={length}: set it to 2 or more")
    fit = choose("config.data.too_long", TOO_LONG, too_long)
    return choose("config.data.mode", MODES, mode), fit


def delimited(text: str, tok: Tokenizer) -> list[int]:
    """Returns the ids of START, the text and END."""
    return [START, *tok.encode(text), END]


def _pad(rows: list[list[int]], length: int, fit: Callable) -> np.ndarray:
    rows = fit(rows, length)
    sizes = np.fromiter(map(len, rows), np.int32, len(rows))
    ids = np.full((len(rows), length), PAD, np.int32)
    ids[np.arange(length) < sizes[:, None]] = _flat(rows)
    return ids


def _block(rows: list[list[int]], length: int, fit: Callable) -> np.ndarray:
    flat = _flat(rows)
    return flat[: len(flat) // length * length].reshape(-1, length)


def _flat(rows: list[list[int]]) -> Int32[np.ndarray, " n"]:
    return np.fromiter(chain.from_iterable(rows), np.int32, sum(map(len, rows)))


def _raise_too_long(rows: list[list[int]], length: int) -> list[list[int]]:
    for number, row in enumerate(rows, 1):
        if len(row) > length:
            raise UserError(
                f"text {number} has {len(row)} tokens with START and END, more than "
                f"config.data.length={length}: set length={max(map(len, rows))}, or "
                "config.data.too_long to truncate or drop"
            )
    return rows


MODES: dict[str, Callable] = {"pad": _pad, "block": _block}
TOO_LONG: dict[str, Callable] = {
    "error": _raise_too_long,
    "truncate": lambda rows, length: [row[:length] for row in rows],
    "drop": lambda rows, length: [row for row in rows if len(row) <= length],
}
