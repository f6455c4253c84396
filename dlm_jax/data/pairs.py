# SPDX-License-Identifier: Apache-2.0
"""Pairs of a source and a target: text to text, or the fields of a record to text.

A row of ids is START source START target END PAD. The second START separates, so that
every tokenizer will do. E2E and the grammar give records: `linearize` turns one into
text, `name : The Eagle | food : French`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlm_jax.data import encoding, files, grammar, sources, tfds
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError, choose
from dlm_jax.types import END, START

FIELDS = "fields"  # config.data.source_column of sources that give records
SIDES = ("source_column", "column")  # the options of those that have columns


class Pair(NamedTuple):
    """A source and the target that is generated from it."""

    source: str
    target: str


def linearize(record: Mapping[str, str]) -> str:
    """Returns a record as text, in E2E's notation: `field : value | field : value`."""
    return " | ".join(f"{field} : {value}" for field, value in record.items())


def placeholder(field: str) -> str:
    """Returns the word that stands for the value of a field, such as X-name."""
    return f"X-{field.replace(' ', '-')}"


def placeholders(source: str, fields: Iterable[str]) -> dict[str, str]:
    """Returns {value: its placeholder} of a record's fields, the longest value first."""
    record = parse_linearized(source)
    found = {record[f]: placeholder(f) for f in fields if record.get(f)}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def replace_words(text: str, new: Mapping[str, str]) -> str:
    """Replaces whole words, or several in a row; the first ones of `new` come first.

    A word that is replaced by "" is left out with the space before it.
    """
    if not new:
        return text
    any_ = "|".join(map(re.escape, new))

    def put(found: re.Match) -> str:
        word = new[found[2]]
        return found[1] + word if word else ""

    return re.sub(rf"( ?)(?<!\S)({any_})(?!\S)", put, text)


def delexicalize(pair: Pair, fields: Iterable[str]) -> Pair:
    """Replaces the values of these fields by placeholders in source and target.

    What a name is then does not matter to the model, which cannot confuse it with one
    that it saw beside the same values. Source: arXiv:1508.01745, as E2E's baseline.
    """
    new = placeholders(pair.source, fields)
    return Pair(*(replace_words(text, new) for text in pair))


def delexicalized(pairs: Iterable[Pair], fields: Iterable[str]) -> Iterable[Pair]:
    """Applies `delexicalize` to pairs, if there are fields."""
    return (delexicalize(pair, fields) for pair in pairs) if fields else pairs


def check_fields(pairs: Iterable[Pair], fields: Iterable[str]) -> None:
    """Raises UserError for one of config.data.delexicalize that no source has."""
    absent = set(fields)
    found: set[str] = set()
    for pair in pairs:
        if not absent:
            return
        found |= (record := parse_linearized(pair.source)).keys()
        absent -= record.keys()
    if absent:
        names = ", ".join(sorted(found))
        names = names if len(names) < 300 else f"{names[:300]} ..."
        raise UserError(
            f"config.data.delexicalize: no source has the field {min(absent)!r}; choose "
            f"of {names}"
        )


def parse_linearized(source: str) -> dict[str, str]:
    """Returns the record of `linearize`."""
    parts = (part.partition(" : ") for part in source.split(" | "))
    return {field: value for field, _, value in parts}


def load_pairs(cfg: Any, split: str) -> list[Pair]:
    """Loads the pairs of `split`, "train" or "valid". cfg: config.data. Raises UserError."""
    sources.check_options(cfg)
    load = choose("config.data.source of pairs", SOURCES, cfg.source)
    if cfg.source in ("e2e", "grammar") and cfg.source_column != FIELDS:
        raise UserError(
            f"config.data.source_column={cfg.source_column!r}: set it to {FIELDS!r} for "
            f"config.data.source={cfg.source}"
        )
    return load(cfg, split)


def _e2e(cfg: Any, split: str) -> list[Pair]:
    texts, records = sources.e2e_records(cfg, split)
    return [Pair(linearize(r), text) for text, r in zip(texts, records, strict=True)]


def _grammar(cfg: Any, split: str) -> list[Pair]:
    """Samples texts of the grammar with the fields that they state."""
    train = split == "train"
    seed = cfg.seed if train else cfg.seed + sources.VALID_SHIFT
    trees = grammar.trees(seed, cfg.size if train else cfg.valid_size)
    return [Pair(linearize(_in_order(t)), " ".join(t.leaves())) for t in trees]


def _in_order(tree: Any) -> dict[str, str]:
    """Returns the fields of a derivation, in an order that tells nothing of the text."""
    stated = grammar.fields_of(tree)
    names = (name.lower() for name in grammar.FIELDS)
    return {name: stated[name] for name in names if name in stated}


def _records(cfg: Any, split: str) -> list[Pair]:
    read = sources.RECORDS[cfg.source]

    def pairs(path: Path, cfg: Any) -> Iterator[Pair]:
        return (_pair(record, cfg, where) for where, record in read(path, cfg))

    return sources.read_split(pairs, cfg, split)


def _tfds(cfg: Any, split: str) -> list[Pair]:
    return tfds.load_records(cfg, split, _pair, SIDES)


def _pair(record: dict, cfg: Any, where: str) -> Pair:
    pair = Pair(*(files.cell(record, cfg[side], where, side) for side in SIDES))
    if not pair.source or not pair.target:
        empty = cfg.column if pair.source else cfg.source_column
        raise UserError(
            f"{where} has nothing in column {empty!r}: a pair needs a source and a "
            "target; remove the row or complete it"
        )
    return pair


SOURCES: dict[str, Any] = {
    "e2e": _e2e,
    "grammar": _grammar,
    "csv": _records,
    "jsonl": _records,
    "parquet": _records,
    "tfds": _tfds,
}


def encode_pairs(
    pairs: Iterable[Pair],
    tok: Tokenizer,
    *,
    length: int,
    too_long: str,
    delexicalize: Iterable[str] = (),
) -> np.ndarray:
    """Encodes pairs as ids [n l], l = `length`. too_long: as in `encoding.encode`.

    delexicalize: the fields for `delexicalize`.
    Raises UserError for a source that leaves no room for a token and END, unless its
    pair is dropped.
    """
    layout = encoding.arrangement(length, "pad", too_long)
    rows = []
    for number, pair in enumerate(delexicalized(pairs, delexicalize), 1):
        source = encode_source(tok, pair.source)
        if len(source) + 2 > length and too_long == "truncate":
            raise UserError(
                f"the source of pair {number} has {len(source) - 2} tokens, which leaves "
                f"no room for its target in config.data.length={length}: raise it, or "
                "set config.data.too_long=drop"
            )
        rows.append([*source, *tok.encode(pair.target), END])
    ids, _ = layout.rows(rows)
    if not len(ids):
        raise UserError(
            f"{len(rows)} pairs fill no row of config.data.length={length}: raise it"
        )
    return ids


def fitting(
    pairs: Iterable[Pair], tok: Tokenizer, length: int, fields: Iterable[str]
) -> list[Pair]:
    """Returns the pairs that config.data.too_long=drop keeps. fields: to delexicalize."""

    def fits(pair: Pair) -> bool:
        source, target = delexicalize(pair, fields)
        return len(encode_source(tok, source)) + len(tok.encode(target)) < length

    return list(filter(fits, pairs))


def encode_source(tok: Tokenizer, source: str) -> list[int]:
    """Returns the ids of START, the source and the second START."""
    return [START, *tok.encode(source), START]


def are_pairs(ids: np.ndarray) -> bool:
    """Returns whether every row [n l] has the two START of a pair."""
    return bool(np.all(np.sum(np.asarray(ids) == START, -1) == 2))


def source_and_target(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of a row's source, and from its target on, without START."""
    first, second = np.flatnonzero(row == START)[:2]
    return row[first + 1 : second], row[second + 1 :]
