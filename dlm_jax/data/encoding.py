# SPDX-License-Identifier: Apache-2.0
"""Encodes texts as rows of ids: padded, or packed end to end.

pad    START text END PAD PAD ...   a text per row
block  texts between START and END, end to end
wrap   START, texts with END after each, END: the field's packed rows
crop   one stream of tokens, without START and END; training takes any window of it
"""

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError, choose
from dlm_jax.types import END, PAD, START


def encode(
    texts: list[str], tok: Tokenizer, *, length: int, mode: str, too_long: str
) -> Int32[np.ndarray, "n l"]:
    """Encodes texts as ids [n l], l = `length`.

    mode: a key of MODES, described above; all but "pad" join the texts, cut the stream
    into rows and drop the remainder. too_long: what "pad" does with a text that does not
    fit: "error", "truncate" (END is lost, as in the published code) or "drop". Raises
    UserError for a text that does not fit, an unknown choice or an empty result.
    """
    layout = arrangement(length, mode, too_long)
    ids, _ = layout.rows([layout.delimited(text, tok) for text in texts])
    if not len(ids):
        raise UserError(
            f"{len(texts)} texts fill no row of config.data.length={length} in mode "
            f"{mode}: set a smaller length or give more text"
        )
    return ids


class Mode(NamedTuple):
    """How texts become rows. before, after: ids around a text.

    start, end: ids at both ends of a packed row. packed: texts share rows.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    packed: bool = True


class Arrangement(NamedTuple):
    """A mode with the length l of a row, and what to do with texts that do not fit."""

    mode: Mode
    length: int
    fit: Callable[[list[list[int]], int], list[list[int]]]

    def delimited(self, text: str, tok: Tokenizer) -> list[int]:
        """Returns the ids of a text with those around it."""
        return [*self.mode.before, *tok.encode(text), *self.mode.after]

    def rows(self, texts: list[list[int]]) -> tuple[np.ndarray, list[int]]:
        """Returns the rows [n l] of delimited texts, and the ids that fill none."""
        if not self.mode.packed:
            return _padded(self.fit(texts, self.length), self.length), []
        flat, ends = _flat(texts), (self.mode.start, self.mode.end)
        size = self.length - sum(map(len, ends))
        body = flat[: len(flat) // size * size].reshape(-1, size)
        first, last = (
            np.tile(np.array(part, np.int32), (len(body), 1)) for part in ends
        )
        return np.concatenate([first, body, last], 1), flat[body.size :].tolist()


def arrangement(length: int, mode: str, too_long: str) -> Arrangement:
    """Returns how rows of a length are made. Raises UserError."""
    chosen = choose("config.data.mode", MODES, mode)
    least = 1 + max(1, len(chosen.start + chosen.end))
    if length < least:
        raise UserError(f"config.data.length={length}: set it to {least} or more")
    fit = choose("config.data.too_long", TOO_LONG, too_long)
    return Arrangement(chosen, length, fit)


def decode(ids: Any, tok: Tokenizer, mode: str) -> str:
    """Returns the text of a row [l]; packed ones, a line per text of the row."""
    if not MODES[mode].packed:
        return tok.decode(ids)
    ids = np.asarray(ids)
    texts = map(tok.decode, np.split(ids, np.flatnonzero(ids == END) + 1))
    return "\n".join(filter(None, texts))


def _padded(rows: list[list[int]], length: int) -> np.ndarray:
    sizes = np.fromiter(map(len, rows), np.int32, len(rows))
    ids = np.full((len(rows), length), PAD, np.int32)
    ids[np.arange(length) < sizes[:, None]] = _flat(rows)
    return ids


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


MODES: dict[str, Mode] = {
    "pad": Mode((START,), (END,), packed=False),
    "block": Mode((START,), (END,)),
    "wrap": Mode((), (END,), (START,), (END,)),
    "crop": Mode(),
}
TOO_LONG: dict[str, Callable] = {
    "error": _raise_too_long,
    "truncate": lambda rows, length: [row[:length] for row in rows],
    "drop": lambda rows, length: [row for row in rows if len(row) <= length],
}
