# SPDX-License-Identifier: Apache-2.0
"""Readers of text files, record by record; errors name the line.

Files are UTF-8, with or without a byte order mark. Texts come out in Unicode NFC.
"""

import codecs
import csv
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from dlm_jax.data.normalization import nfc, normalize, refuse_nul
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


def existing(
    path: str, flag: str, what: str = "a file of texts", section: str = "data"
) -> Path:
    """Returns the path of a file; raises UserError if it is not a file."""
    if not path:
        raise UserError(f"config.{section}.{flag} is empty: set it to {what}")
    place = Path(path)
    if not place.is_file():
        problem = "is a folder" if place.is_dir() else "does not exist"
        if place.exists() and not place.is_dir():
            problem = "is a device or a pipe, and files are read several times"
        raise UserError(f"{path} {problem}: set config.{section}.{flag} to {what}")
    return place


def _decode(raw: bytes, path: Path, line: int) -> str:
    """Decodes a line as UTF-8, without its mark; raises UserError naming the line."""
    if b"\0" in raw:  # such as UTF-16 without its mark, which is valid UTF-8
        refuse_nul(f"{path} line {line}")
    try:
        # files that were joined have the mark at the start of other lines, too
        return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}): "
            "convert the file to UTF-8"
        ) from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the non-blank lines, stripped, with their numbers from 1. Raises UserError."""
    # of UTF-8 and without NUL: nothing is to be refused
    return ((i, nfc(line)) for i, line in enumerate(every_line(path), 1) if line)


def every_line(path: Path) -> Iterator[str]:
    """Yields all lines, stripped. They end at \\n, \\r\\n or \\r. Raises UserError."""
    for line in map(str.strip, _raw_lines(path)):
        if "\r" in line:
            yield from map(str.strip, line.split("\r"))
        else:
            yield line


def _raw_lines(path: Path) -> Iterator[str]:
    """Yields lines on demand; raises UserError naming a line that is not UTF-8."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        for number, raw in enumerate(file, 1):
            # most lines of most files; the rest takes a call
            fast = raw.isascii() and b"\0" not in raw
            yield raw.decode("ascii") if fast else _decode(raw, path, number)


def read_text(path: Path, cfg: Any) -> Iterator[str]:
    """Yields the non-blank lines of a text file. Raises UserError."""
    return (line for _, line in lines(path))


def read_e2e(path: Path, cfg: Any) -> list[tuple[str, dict[str, str]]]:
    """Returns E2E's pairs of a text and its {field: value} record. Raises UserError."""
    pairs = []
    for number, line in lines(path):
        record, bar, text = line.partition("||")
        if not bar:
            raise UserError(
                f"{path} line {number} has no '||' between record and text: "
                "give E2E's `field : value | ... ||text`, or set config.data.source=text"
            )
        if cfg.source_column and not (record.strip() and text.strip()):
            raise UserError(
                f"{path} line {number} has no {'text' if record.strip() else 'record'}: a "
                "pair needs a source and a target; remove the line or complete it"
            )
        items = (item.partition(":") for item in record.split("|"))
        fields = {field.strip(): value.strip() for field, _, value in items}
        pairs.append((text.strip(), fields))
    return pairs


def read_records(records: Callable, path: Path, cfg: Any) -> Iterator[str]:
    """Yields the texts in column cfg.column, empty ones too. Raises UserError."""
    return (cell(record, cfg.column, where) for where, record in records(path, cfg))


def jsonl_records(path: Path, cfg: Any) -> Iterator[tuple[str, dict]]:
    """Yields (location, record) of each non-blank line. Raises UserError."""
    for number, line in lines(path):
        where = f"{path} line {number}"
        try:
            record = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{where} is not JSON ({reason}): fix it") from error
        if not isinstance(record, dict):
            raise UserError(f"{where} is not a JSON object: give {{column: text}}")
        yield where, record


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    """Returns a JSON object, keys in NFC; raises ValueError if one occurs twice."""
    names = [nfc(name) for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"the key {twice!r} occurs twice")
    return dict(zip(names, (value for _, value in pairs), strict=True))


DELIMITERS = ",\t;|"
BREAK = re.compile(r"\r\n|\r|\n")
_LIMIT = threading.Lock()  # held while csv's limit on the size of a cell is another


def delimiter(path: Path, cfg: Any) -> str:
    """Returns cfg.delimiter, or what splits the first line into the most columns."""
    given = cfg.delimiter.replace("\\t", "\t")
    if given and (len(given) > 1 or given in '"\r\n'):
        raise UserError(
            f"config.data.delimiter={cfg.delimiter!r}: give one character, such as ; or "
            "\\t, or nothing, to tell it from the first line"
        )
    parts = (part for line in _raw_lines(path) for part in BREAK.split(line))
    first = next(filter(str.strip, parts), "")  # not stripped: it may begin with a tab
    columns = {
        d: len(_next(csv.reader([first], delimiter=d)) or ()) for d in DELIMITERS
    }
    return given or max(DELIMITERS, key=lambda d: columns[d])


def csv_records(path: Path, cfg: Any) -> Iterator[tuple[str, dict]]:
    """Yields (location, record) of each row; the first row names the columns.

    Raises UserError for a quote that is not closed, and for a row of too many cells.
    """
    names: list[str] = []
    for line, row in _csv_rows(path, delimiter(path, cfg)):
        if not names:
            named = [nfc(name) for name in row]
            names = [  # one of several has no name of its own
                f"{name} (column {i})" if named.count(name) > 1 else name
                for i, name in enumerate(named, 1)
            ]
            continue
        if any(row[len(names) :]):
            raise UserError(
                f"{path} line {line} has {len(row)} cells and the first row {len(names)}: "
                'put texts between quotes ("), or set config.data.delimiter'
            )
        yield f"{path} line {line}", dict(zip_longest(names, row[: len(names)]))


def _next(rows: Iterator[list[str]]) -> list[str] | None:
    """Returns the next row, its cells of any length; None at the end."""
    with _LIMIT:
        before = csv.field_size_limit(2**31 - 1)  # of the process; 128 kB by default
        try:
            return next(rows, None)
        finally:
            csv.field_size_limit(before)


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields (number of its first line, row) of each row that is not blank."""
    read: list[str] = []  # the lines of this row

    def pieces() -> Iterator[str]:
        parts = (io.StringIO(line, newline="") for line in _raw_lines(path))
        for piece in chain.from_iterable(parts):
            read.append(piece)
            yield piece

    rows = csv.reader(pieces(), delimiter=delimiter, strict=True)
    first = 1
    try:
        while (row := _next(rows)) is not None:
            if row:
                yield first, row
            first = rows.line_num + 1
            read.clear()
    except csv.Error as error:
        opened = first + _open_quote(read, delimiter)
        if not any('"' in line for line in read):
            raise UserError(
                f"{path} line {first} is not CSV ({error}): fix it"
            ) from error
        raise UserError(
            f'{path} line {opened} opens a quote (") that line {rows.line_num} does not '
            f"close as CSV does ({error}): close it; a quote inside of a quoted text is "
            'written twice ("")'
        ) from error


def _open_quote(lines: list[str], delimiter: str) -> int:
    """Returns the index of the line where the last quote opens, up to the first mistake."""
    opened, quoted, closing, ends = 0, False, False, f"{delimiter}\r\n"
    start = True  # of a cell
    for i, line in enumerate(lines):
        for c in line:
            if c == '"' and (start or quoted or closing):
                opened = i if start else opened
                quoted, closing = not quoted, quoted
            elif closing and c not in ends:
                return opened
            else:
                closing = False
            start = not quoted and c in ends
    return opened


def cell(record: dict, column: str, where: str, option: str = "column") -> str:
    """Returns the text (str or UTF-8 bytes) of a column, stripped. Raises UserError.

    The record's names are in NFC; column may be in any form. option: of config.data,
    which names the column.
    """
    column = nfc(column)
    if column not in record:
        names = ", ".join(str(name) for name in record if name is not None)
        names = names if len(names) < 300 else f"{names[:300]} ..."
        raise UserError(
            f"{where} has no column {column!r}: set config.data.{option} to one of {names}"
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
            f"fix it or set config.data.{option} to another"
        )
    return normalize(value.strip(), f"{where} column {column!r}")
