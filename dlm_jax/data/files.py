# SPDX-License-Identifier: Apache-2.0
"""Readers of text files, record by record; errors name the line."""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from dlm_jax.errors import UserError


def describe(cfg: Any) -> str:
    """Returns the source's kind and path, for error messages."""
    return f"{cfg.source} {cfg.path}".strip()


def hold_out(texts: list, cfg: Any, split: str) -> list:
    """Returns the texts of a split; the last `valid_fraction` of them are held out."""
    return texts[slice(*part(len(texts), cfg, split))]


def part(texts: int, cfg: Any, split: str) -> tuple[int, int]:
    """Returns the range (start, stop) of a split; validation texts come last.

    Raises UserError if valid_fraction is not in [0, 1) or the range is empty.
    """
    if not 0 <= cfg.valid_fraction < 1:
        raise UserError(
            f"config.data.valid_fraction={cfg.valid_fraction}: set it from 0 to below 1"
        )
    held = round(texts * cfg.valid_fraction)
    if cfg.valid_fraction and texts:
        held = max(held, 1)
    kept = (0, texts - held) if split == "train" else (texts - held, texts)
    if kept[0] >= kept[1]:
        raise UserError(
            f"{describe(cfg)} with {texts} texts leaves none for {split} at "
            f"config.data.valid_fraction={cfg.valid_fraction}: change it, set "
            "config.data.valid_path (or tfds_valid), or give more text"
        )
    return kept


def existing(path: str, flag: str) -> Path:
    """Returns the path of a file; raises UserError if it is not a file."""
    if not path:
        raise UserError(f"config.data.{flag} is empty: set it to a file of texts")
    if not Path(path).is_file():
        problem = "is a folder" if Path(path).is_dir() else "does not exist"
        raise UserError(f"{path} {problem}: set config.data.{flag} to a file of texts")
    return Path(path)


def _decode(raw: bytes, path: Path, line: int) -> str:
    """Decodes a line as UTF-8; raises UserError naming the line."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}): "
            "convert the file to UTF-8"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the non-blank lines, stripped, with their line numbers from 1."""
    for number, line in enumerate(_raw_lines(path), 1):
        if stripped := line.strip():
            yield number, stripped


def _raw_lines(path: Path) -> Iterator[str]:
    """Yields lines on demand; raises UserError naming a line that is not UTF-8."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        for number, raw in enumerate(file, 1):
            raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            yield _decode(raw, path, number)


def read_text(path: Path, cfg: Any) -> Iterator[str]:
    """Yields the non-blank lines of a text file. Raises UserError."""
    return (line for _, line in _lines(path))


def read_e2e(path: Path, cfg: Any) -> list[tuple[str, dict[str, str]]]:
    """Returns E2E's pairs of a text and its {field: value} record. Raises UserError."""
    pairs = []
    for number, line in _lines(path):
        record, bar, text = line.partition("||")
        if not bar:
            raise UserError(
                f"{path} line {number} has no '||' between record and text: "
                "give E2E's `field : value | ... ||text`, or set config.data.source=text"
            )
        items = (item.partition(":") for item in record.split("|"))
        fields = {field.strip(): value.strip() for field, _, value in items}
        pairs.append((text.strip(), fields))
    return pairs


def read_records(records: Callable, path: Path, cfg: Any) -> Iterator[str]:
    """Yields the non-empty texts in column cfg.column. Raises UserError."""
    texts = (cell(record, cfg.column, where) for where, record in records(path))
    return (text for text in texts if text)


def jsonl_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields (location, record) of each non-blank line. Raises UserError."""
    for number, line in _lines(path):
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{where} is not JSON ({reason}): fix it") from error
        if not isinstance(record, dict):
            raise UserError(f"{where} is not a JSON object: give {{column: text}}")
        yield where, record


def csv_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields (location, record) of each row. Raises UserError."""
    pieces = chain.from_iterable(io.StringIO(x, newline="") for x in _raw_lines(path))
    rows = csv.DictReader(pieces)
    try:
        for row in rows:
            yield f"{path} line {rows.line_num}", row
    except csv.Error as error:
        where = f"{path} line {rows.line_num}"
        raise UserError(f"{where} is not CSV ({error}): fix it") from error


def cell(record: dict, column: str, where: str) -> str:
    """Returns the stripped text (str or UTF-8 bytes) of a column. Raises UserError."""
    if column not in record:
        names = ", ".join(str(name) for name in record if name is not None)
        raise UserError(
            f"{where} has no column {column!r}: set config.data.column to one of {names}"
        )
    value = record[column]
    try:
        value = value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise UserError(f"{where} column {column!r} is not UTF-8: fix it") from error
    if not isinstance(value, str):
        kind = "nothing" if value is None else type(value).__name__
        raise UserError(
            f"{where} column {column!r} holds {kind}, not text: "
            "fix it or set config.data.column to another"
        )
    return value.strip()
