# SPDX-License-Identifier: Apache-2.0
"""Token ids in sharded array_record files: random access to data beyond memory.

A folder holds train-00000.array_record, ..., valid-00000.array_record, ... and
data.json, which is written last: the layout, the row counts, the tokenizer and a
checksum of the ids. A record is a page of PAGE rows, so a row costs one small read.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dlm_jax.data import encoding
from dlm_jax.data.tokenizer import Tokenizer, from_dict
from dlm_jax.errors import UserError, environment_reason
from dlm_jax.types import PAD

MANIFEST = "data.json"
PAGE, SHARD = 64, 2**13  # rows per record, records per file


class ArrayRecordDataset:
    """Token ids [n l] on disk; indexing reads rows, as of a NumPy array."""

    def __init__(self, folder: Path, split: str, metadata: dict):
        self.folder, self.split, self.metadata = folder, split, metadata
        self.count, self.length = metadata["rows"][split], metadata["length"]
        files = range(-(-self.count // (PAGE * SHARD)))
        paths = [_path(folder, split, number) for number in files]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]} is missing: prepare the data again")
        with _reading(folder):
            from array_record.python import array_record_data_source

            names = [_utf8(path) for path in paths]
            self.source = array_record_data_source.ArrayRecordDataSource(names)
            pages = len(self.source)
        if pages != -(-self.count // PAGE):
            raise UserError(
                f"{folder}: {pages} records do not hold {self.count} rows; prepare the "
                "data again"
            )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> np.ndarray:
        """Returns the rows of an index array or a slice: int32 [... l]."""
        if isinstance(index, slice):
            index = np.arange(*index.indices(self.count))
        pages, offset = np.divmod(np.asarray(index), PAGE)
        needed, at = np.unique(pages, return_inverse=True)
        with _reading(self.folder):
            raw = self.source.__getitems__(needed.tolist())
            dtype = np.dtype(self.metadata["dtype"])
            read = [np.frombuffer(r, dtype).reshape(PAGE, self.length) for r in raw]
        rows = [read[i][j] for i, j in zip(at.ravel(), offset.ravel(), strict=True)]
        return np.stack(rows).astype(np.int32).reshape(*pages.shape, self.length)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises various types for damaged files
        if reason := environment_reason(error):
            raise UserError(f"{folder} cannot be read here ({reason})") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{folder}: damaged ({reason}); prepare the data again"
        ) from error


def dtype(vocab: int) -> np.dtype:
    """Returns the type of ids on disk."""
    return np.dtype(np.uint16 if vocab <= 2**16 else np.int32)


def tokenizer_sha256(record: dict) -> str:
    """Returns the checksum of a tokenizer's record."""
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.array_record"


def _utf8(path: Path) -> str:
    """Returns the name of a file as the library wants it, whatever the locale."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def load_prepared(
    path: str,
) -> tuple[ArrayRecordDataset, ArrayRecordDataset, Tokenizer, dict]:
    """Loads (train, valid, tokenizer, {"corpus": checksum}). Raises UserError."""
    folder = Path(path)
    metadata = read_manifest(folder)
    train, valid = (
        ArrayRecordDataset(folder, split, metadata) for split in ("train", "valid")
    )
    return train, valid, from_dict(metadata["tokenizer"]), {"corpus": metadata["crc"]}


def read_manifest(folder: Path) -> dict:
    """Reads data.json; raises UserError if it is missing or damaged."""
    try:
        metadata = json.loads((folder / MANIFEST).read_text("utf-8"))
        rows = metadata["rows"]
        counts = [rows["train"], rows["valid"], metadata["length"], metadata["crc"]]
        if not all(isinstance(n, int) and n >= 0 for n in counts):
            raise ValueError("its counts are not whole numbers of at least 0")
        if counts[2] == 0 or max(counts[:2]) > PAGE * SHARD * 10**5:
            raise ValueError("its counts are out of range")
        if (
            metadata["dtype"] not in ("uint16", "int32")
            or metadata["mode"] not in encoding.MODES
        ):
            raise ValueError("unknown dtype or mode")
        if not isinstance(metadata["tokenizer"], dict):
            raise ValueError("no tokenizer")
        if metadata.get("tokenizer_sha256") not in (
            None,  # of an earlier version
            tokenizer_sha256(metadata["tokenizer"]),
        ):
            raise ValueError("another tokenizer than the data's")
        if not isinstance(metadata.get("read", []), list):
            raise ValueError("its lines on what was read are not a list")
    except OSError as error:
        if reason := environment_reason(error):
            raise UserError(f"{folder} cannot be read here ({reason})") from error
        raise UserError(
            f"config.data.path={folder}: no {MANIFEST} in it; create it with "
            "--mode prepare_data"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / MANIFEST}: damaged ({error}); prepare the data again"
        ) from error
    return metadata


def read_texts(path: str, split: str) -> list[str]:
    """Decodes all rows of a split to texts, in memory. Raises UserError."""
    train, valid, tokenizer, _ = load_prepared(path)
    mode = train.metadata["mode"]
    rows = {"train": train, "valid": valid}[split]
    return [encoding.decode(row, tokenizer, mode) for row in rows[:]]


class ArrayRecordWriter:
    """Writes the rows of a split to numbered files, one after the other."""

    def __init__(self, folder: Path, split: str, length: int, vocab: int):
        self.folder, self.split = folder, split
        self.dtype = dtype(vocab)
        self.left = np.zeros((0, length), self.dtype)
        self.rows = self.pages = self.crc = self.skip = 0
        self.complete = (0, 0)  # pages in files that are complete, and their checksum
        self.file: Any = None

    def resume(self, rows: int, pages: int, crc: int) -> None:
        """Continues after the files of these pages; the next rows are of number `rows`."""
        self.rows, self.pages, self.crc, self.complete = rows, pages, crc, (pages, crc)
        self.skip = pages * PAGE - rows  # rows that these files hold already

    def add(self, ids: np.ndarray) -> None:
        """Buffers rows [n l] and writes every full page."""
        self.rows += len(ids)
        held = min(self.skip, len(ids))
        ids, self.skip = ids[held:], self.skip - held
        self.left = np.concatenate([self.left, ids.astype(self.dtype)])
        while len(self.left) >= PAGE:
            self._write(self.left[:PAGE])
            self.left = self.left[PAGE:]

    def close(self) -> None:
        """Writes the last page, padded with PAD, and closes the file."""
        if len(self.left):
            page = np.full((PAGE, self.left.shape[1]), PAD, self.dtype)
            page[: len(self.left)] = self.left
            self._write(page)
        if self.file:
            self.file.close()

    def _write(self, page: np.ndarray) -> None:
        number, place = divmod(self.pages, SHARD)
        if place == 0:
            from array_record.python.array_record_module import (
                ArrayRecordWriter,
            )

            path = _path(self.folder, self.split, number)
            self.file = ArrayRecordWriter(_utf8(path), "group_size:1")
        raw = page.tobytes()
        self.crc = zlib.crc32(raw, self.crc)
        self.file.write(raw)
        self.pages += 1
        if self.pages % SHARD == 0:
            self.file.close()
            self.file, self.complete = None, (self.pages, self.crc)
