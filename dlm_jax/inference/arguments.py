# SPDX-License-Identifier: Apache-2.0
"""Reads what a caller passes: texts, ids and targets, in types of Python or NumPy."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from dlm_jax.errors import UserError
from dlm_jax.ranges import integer
from dlm_jax.types import PAD, AnyIds


def as_texts(name: str, value: Any) -> list[str]:
    """Returns a text, or texts, as a list of strings. Raises UserError."""
    texts = [value] if isinstance(value, str | bytes) else value
    if not isinstance(texts, Iterable) or isinstance(texts, Mapping):
        raise UserError(f"{name}={value!r}: give a text, or a list of texts")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{name}: {text!r} is no text; give strings")
    return [str(text) for text in texts]  # without the type of NumPy's strings


def as_folder(name: str, value: Any) -> str:
    """Returns a path to a folder as a string. Raises UserError."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise UserError(f"{name}={value!r}: give the folder of a run or of a model")
    return str(os.fspath(value))


def check_ids(ids: AnyIds, length: int, vocab: int) -> np.ndarray:
    """Returns ids [n l] as an array of NumPy. Raises UserError unless a model can score it.

    length: most positions; vocab: size of the vocabulary.
    """
    try:
        rows = np.asarray(ids)
    except (TypeError, ValueError) as error:  # such as rows of unequal lengths
        raise UserError(
            f"ids: give an array [n l], as lm.encode does: {error}"
        ) from error
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.integer):
        raise UserError(
            f"ids: an array of shape {list(rows.shape)} of {rows.dtype}; give integers "
            "[n l], as lm.encode does"
        )
    if not rows.size or rows.shape[1] > length:
        raise UserError(
            f"ids: shape {list(rows.shape)}; give 1 or more rows of at most {length} "
            "positions"
        )
    if rows.min() < 0 or rows.max() >= vocab:
        wrong = int(rows.min() if rows.min() < 0 else rows.max())
        raise UserError(f"ids: {wrong} is outside the vocabulary of {vocab} ids")
    if len(wrong := np.flatnonzero(rows[:, 0] == PAD)):
        raise UserError(
            f"ids: row {wrong[0]} begins with PAD ({PAD}): a text, also an empty one, is "
            "padded at its end, as lm.encode does"
        )
    return rows.astype(np.int32)


def plain(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Returns constraints without those that are None, in types of Python.

    Raises UserError for a length that is no number, tags that are no texts, and
    constituents that are not (first, last, label).
    """
    read: dict[str, Callable[[Any], Any]] = {
        "length": lambda value: integer("length", value),
        "pos": lambda value: as_texts("pos", value),
        "tree": lambda value: [_span("tree", span) for span in _listed("tree", value)],
        "span": lambda value: _span("span", value),
    }
    found = {name: value for name, value in wanted.items() if value is not None}
    return {n: read[n](v) if n in read else v for n, v in found.items()}


def _span(name: str, value: Any) -> tuple[int, int, str]:
    span = _listed(name, value)
    if len(span) != 3 or not isinstance(span[2], str):
        raise UserError(f"{name}={value!r}: give (first, last, label)")
    return integer(name, span[0]), integer(name, span[1]), span[2]


def _listed(name: str, value: Any) -> list:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UserError(f"{name}={value!r}: give (first, last, label)")
    return list(value)
