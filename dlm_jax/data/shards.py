# SPDX-License-Identifier: Apache-2.0
"""Text in several files, in parquet files, and as one stream of characters."""

import codecs
import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlm_jax.data.files import existing
from dlm_jax.data.normalization import nfc, normalize
from dlm_jax.errors import UserError

SEVERAL = re.compile(r"[,*?[]")  # in a value that names several files
NUMBERED = re.compile(r"(.*-)(\d+)-of-(\d+)(.*)", re.DOTALL)
BLOCK = 10_000  # bytes of a stream, and rows of parquet, that are read at a time


def named_files(value: str, flag: str) -> list[Path]:
    """Returns the files of config.data.<flag>: one, a pattern, or several with commas.

    Raises UserError if one of them is missing, also if the names that a pattern matches
    tell that there are more, as train-00000-of-00010 does.
    """
    if not SEVERAL.search(value) or Path(value).exists():
        return [existing(value, flag)]
    found: list[Path] = []
    for name in value.split(","):
        matches = sorted(glob.glob(name)) if SEVERAL.search(name) else [name]
        if not matches:
            raise UserError(
                f"no file matches {name}: set config.data.{flag} to a file, a pattern "
                "such as 'train-*.parquet', or several with commas between"
            )
        _check_complete(matches, name)
        found += [existing(match, flag) for match in matches]
    return found


def _check_complete(matches: list[str], pattern: str) -> None:
    """Raises UserError for a shard that is missing, going by the names of the others."""
    if "*" not in pattern:
        return
    for first, number, total, last in (
        match.groups() for match in map(NUMBERED.fullmatch, matches) if match
    ):
        for i in range(int(total)):
            name = f"{first}{i:0{len(number)}}-of-{total}{last}"
            if name not in matches and not Path(name).exists():
                raise UserError(
                    f"{name} is missing, one of the {int(total)} files that {pattern} "
                    "stands for: restore it, or name the files with commas between"
                )


def parquet_records(path: Path, cfg: Any) -> Iterator[tuple[str, dict]]:
    """Yields (location, record) of each row, read BLOCK rows at a time. Raises UserError."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            "config.data.source=parquet needs the package pyarrow: pip install pyarrow"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BLOCK):
                names = [nfc(name) for name in batch.schema.names]
                for values in zip(*(c.to_pylist() for c in batch.columns), strict=True):
                    number += 1
                    yield f"{path} row {number}", dict(zip(names, values, strict=True))
    except (OSError, ValueError) as error:  # what pyarrow raises for damaged files
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{path} is not a parquet file that can be read, after row {number} "
            f"({reason}): restore it"
        ) from error


def read_stream(path: Path, cfg: Any) -> Iterator[str]:
    """Yields all characters of a file, some at a time, also spaces and line breaks.

    Raises UserError for bytes that are not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as file:
        done = 0
        while raw := file.read(BLOCK):
            done += len(raw)
            try:
                text = decoder.decode(raw, final=len(raw) < BLOCK)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x}, "
                    f"before byte {done}): convert the file to UTF-8"
                ) from error
            yield normalize(text, f"{path} before byte {done}")
