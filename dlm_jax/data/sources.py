# SPDX-License-Identifier: Apache-2.0
"""Loads texts from their source: files, E2E, TFDS, the grammar, prepared data.

`load_texts` loads all texts; `stream` reads a file text by text.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dlm_jax.data import array_record, grammar, shards, tfds, tokenizer_files
from dlm_jax.data.characters import train_characters
from dlm_jax.data.files import (
    BREAK,
    cell,
    csv_records,
    describe,
    existing,
    hold_out,
    jsonl_records,
    part,
    read_e2e,
    read_records,
    read_text,
)
from dlm_jax.data.normalization import nfc, normalize
from dlm_jax.data.tokenizer import TRAINERS, Tokenizer
from dlm_jax.errors import UserError, choose

VALID_SHIFT = 1_000_003  # added to the seed for the grammar's validation texts


def load_texts(cfg: Any, split: str) -> list[str]:
    """Loads the texts of `split`, "train" or "valid", from the source that `cfg` names.

    cfg: config.data. If a source has no validation set of its own, the last
    `valid_fraction` of its texts is held out of training. Raises UserError.
    """
    if split not in ("train", "valid"):
        raise UserError(f"unknown split {split!r}: choose train or valid")
    source = choose("config.data.source", SOURCES, cfg.source)
    _refuse_unread(cfg, (name for name in SOURCE_OFF if cfg[name]))
    return _non_empty(source(cfg, split), f"{split} split of {describe(cfg)}")


FILE = ("path", "valid_path", "valid_fraction")
PAIRS = ("source_column", "delexicalize")
READS: dict[str, tuple[str, ...]] = {  # the options of config.data that a source reads
    "grammar": ("size", "valid_size", "seed", *PAIRS),
    "text": FILE,
    "e2e": (*FILE, *PAIRS),
    "csv": (*FILE, "column", *PAIRS, "delimiter"),
    "jsonl": (*FILE, "column", *PAIRS),
    "parquet": (*FILE, "column", *PAIRS),
    "stream": FILE,
    "tfds": (
        *("path", "valid_fraction", "column", *PAIRS),
        *("tfds_train", "tfds_valid", "tfds_dir"),
    ),
    "prepared": ("path",),
}
TRAINED: dict[str, tuple[str, ...]] = {  # those that training a tokenizer reads
    "word": ("min_count",),
    "char": ("min_count",),
    "sentencepiece": ("vocab_size", "byte_fallback"),
    "hf": (),
}
SOURCE_OFF = ("path", "valid_path", "delimiter")  # off by default
OFF = (
    *(*SOURCE_OFF, *PAIRS),
    *("tfds_dir", "tokenizer_path", "byte_fallback"),
)


def check_options(cfg: Any, given: Iterable[str] = ()) -> None:
    """Raises UserError for an option that the source or the tokenizer would ignore.

    cfg: config.data. given: names of the options that flags set. Of the others those
    that are off by default are checked: configs set the rest for several sources.
    """
    _refuse_unread(cfg, set(given) - set(OFF) | {name for name in OFF if cfg[name]})


def _refuse_unread(cfg: Any, names: Iterable[str]) -> None:
    unread = _unread(cfg)
    for name in sorted(unread.keys() & set(names)):
        raise UserError(
            f"config.data.{name}={cfg[name]!r} has no effect with {unread[name]}"
        )


def _unread(cfg: Any) -> dict[str, str]:
    """Returns the options that have no effect: with what, and the remedy."""
    read = choose("config.data.source", READS, cfg.source)
    found = {}
    for name in set(chain(*READS.values())) - set(read):
        others = ", ".join(other for other, names in READS.items() if name in names)
        found[name] = (
            f"config.data.source={cfg.source}: leave it out, or set the source ({others})"
        )
    by = "tfds_valid" if cfg.source == "tfds" else "valid_path"
    if "valid_fraction" in read and cfg[by]:
        found["valid_fraction"] = f"config.data.{by}={cfg[by]!r}: leave one of them out"
    elif cfg.source == "e2e" and cfg.path and Path(cfg.path).is_dir():
        found["valid_fraction"] = "a folder, which has src1_valid.txt: leave it out"
    trained = set(chain(*TRAINED.values()))
    if cfg.source == "prepared":
        kept = ("too_long", "tokenizer", "tokenizer_path", *trained)
        what = "prepared data: leave it out; --mode prepare_data takes it"
        return found | dict.fromkeys(kept, what)
    if cfg.mode != "pad":
        found["too_long"] = f"config.data.mode={cfg.mode}: leave it out"
    name, mine = f"tokenizer={cfg.tokenizer}", TRAINED.get(cfg.tokenizer, trained)
    if cfg.tokenizer_path:
        name, mine = f"tokenizer_path={cfg.tokenizer_path}", ()
    return found | dict.fromkeys(
        trained - set(mine), f"config.data.{name}: leave it out"
    )


def train_tokenizer(cfg: Any, texts: Iterable[str]) -> Tokenizer:
    """Trains the kind of tokenizer that `cfg` names, or reads it from its tokenizer_path.

    Raises UserError.
    """
    if cfg.tokenizer_path:
        return tokenizer_files.load(cfg.tokenizer, cfg.tokenizer_path)
    if cfg.tokenizer == "hf":
        raise UserError(
            "config.data.tokenizer=hf is not trained here: set config.data.tokenizer_path "
            "to its tokenizer.json"
        )
    trainers = TRAINERS | {"char": train_characters}
    train = choose("config.data.tokenizer", trainers, cfg.tokenizer)
    return train(texts, **{name: cfg[name] for name in TRAINED[cfg.tokenizer]})


def _non_empty(texts: list, what: str) -> list:
    if not texts:
        raise UserError(
            f"{what} holds no text: check config.data.path, size and source"
        )
    return texts


def _grammar(cfg: Any, split: str) -> list[str]:
    """Samples the built-in grammar; a text may occur in both splits."""
    if split == "train":
        return grammar.sample(cfg.seed, cfg.size)
    return grammar.sample(cfg.seed + VALID_SHIFT, cfg.valid_size)


def read_split(read: Callable[[Path, Any], Iterable], cfg: Any, split: str) -> list:
    """Reads a split: validation comes from `valid_path`, or is held out of `path`."""
    paths = _paths(cfg, split)
    found = chain.from_iterable(read(path, cfg) for path in paths)
    records = _non_empty(list(filter(None, found)), _named(paths))
    return records if cfg.valid_path else hold_out(records, cfg, split)


def _paths(cfg: Any, split: str) -> list[Path]:
    """Returns the files that hold a split."""
    name = "valid_path" if split == "valid" and cfg.valid_path else "path"
    return shards.named_files(cfg[name], name)


def all_files(cfg: Any) -> list[Path]:
    """Returns the files of both splits; none for a source that is read otherwise."""
    if cfg.source not in FILES:
        return []
    paths = {path for split in ("train", "valid") for path in _paths(cfg, split)}
    return sorted(paths)


def _named(paths: list[Path]) -> str:
    return f"{paths[0]}{' and others' if paths[1:] else ''}"


def _e2e(cfg: Any, split: str) -> list[str]:
    return e2e_records(cfg, split)[0]


def e2e_records(cfg: Any, split: str) -> tuple[list[str], list[dict[str, str]]]:
    """Loads E2E in the published code's layout: texts, and a {field: value} of each.

    cfg.path is a folder of src1_*.txt or a file. Raises UserError.
    """
    if not cfg.valid_path and Path(cfg.path).is_dir():
        path = Path(cfg.path) / f"src1_{split}.txt"
        pairs = _non_empty(read_e2e(existing(str(path), "path"), cfg), str(path))
    else:
        pairs = read_split(read_e2e, cfg, split)
    return [text for text, _ in pairs], [record for _, record in pairs]


def stream(cfg: Any, split: str) -> Iterator[str]:
    """Yields the texts of `load_texts`; reads files and TFDS text by text.

    Raises UserError.
    """
    if cfg.source in FILES:
        read = FILES[cfg.source]
        texts = chain.from_iterable(read(path, cfg) for path in _paths(cfg, split))
        yield from islice(filter(None, texts), *_part_of(cfg, split))
    elif cfg.source == "tfds":
        yield from islice(tfds.stream(cfg, split), *_part_of(cfg, split))
    else:
        yield from load_texts(cfg, split)


def count(cfg: Any, split: str) -> int:
    """Returns the number of texts that `stream` yields. Raises UserError."""
    check_options(cfg)
    if cfg.source not in FILES and cfg.source != "tfds":
        return len(load_texts(cfg, split))
    first, last = _part_of(cfg, split)
    return last - first


def _part_of(cfg: Any, split: str) -> tuple[int, int]:
    """Returns the range (start, stop) of a split's texts in its files or TFDS split."""
    if cfg.source == "tfds":
        name, texts, own = describe(cfg), _count_tfds(cfg, split), cfg.tfds_valid
    else:
        paths = _paths(cfg, split)
        texts = sum(_counts(path, cfg).texts for path in paths)
        name, own = _named(paths), cfg.valid_path
    if not texts:
        _non_empty([], name)
    return (0, texts) if own else part(texts, cfg, split)


def _count_tfds(cfg: Any, split: str) -> int:
    """Counts the texts of a TFDS split, once per process."""
    part = tfds.split_name(cfg, split)
    key = (cfg.path, part, cfg.column, cfg.tfds_dir)
    if key not in _TFDS_COUNTS:
        _TFDS_COUNTS[key] = sum(1 for _ in tfds.stream(cfg, split))
    return _TFDS_COUNTS[key]


_TFDS_COUNTS: dict[tuple[str, ...], int] = {}


class Counts(NamedTuple):
    """Counts of files: texts, rows without text, and the lines of the longest CSV cell.

    row: the place of that cell's row, if it has several lines.
    """

    texts: int = 0
    blank: int = 0
    lines: int = 1
    row: str = ""


def count_rows(cfg: Any) -> Counts:
    """Counts the rows of csv, jsonl and parquet files, of both splits."""
    if cfg.source not in RECORDS:
        return Counts()
    found = [_counts(path, cfg) for path in all_files(cfg)]
    texts, blank = (sum(column) for column in list(zip(*found, strict=True))[:2])
    longest = max(found, key=lambda counts: counts.lines)
    return longest._replace(texts=texts, blank=blank)


def _counts(path: Path, cfg: Any) -> Counts:
    """Counts the texts and rows of a file."""
    state = path.stat()
    options = (cfg.column, cfg.delimiter) if cfg.source in RECORDS else ("", "")
    return _count(path, cfg.source, *options, (state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=4096)
def _count(
    path: Path, source: str, column: str, delimiter: str, state: tuple[int, int]
) -> Counts:
    """Computes `_counts`. state: the file's (mtime, size), part of the cache key."""
    cfg = ConfigDict({"column": column, "delimiter": delimiter})
    if source not in RECORDS:
        return Counts(sum(map(bool, FILES[source](path, cfg))))
    texts, blank, lines, row = Counts()
    for where, record in RECORDS[source](path, cfg):
        empty = not cell(record, column, where)
        texts, blank = texts + (not empty), blank + empty
        if source == "csv":
            cells = filter(None, record.values())
            most = max((1 + len(BREAK.findall(text)) for text in cells), default=1)
            lines, row = (most, where) if most > lines else (lines, row)
    return Counts(texts, blank, lines, row)


def labelled(cfg: Any, split: str, column: str) -> tuple[list[str], list[str]]:
    """Loads texts of csv or jsonl, and labels from another column. Raises UserError."""
    records = RECORDS[cfg.source]

    def read(path: Path, cfg: Any) -> list[tuple[str, str]]:
        pairs = []
        for where, record in records(path, cfg):
            text = cell(record, cfg.column, where)
            if text:
                value = record.get(nfc(column))
                label = "" if value is None else str(value).strip()
                label = normalize(label, f"{where} column {column!r}")
                if not label:
                    raise UserError(
                        f"{where} has no config.classifier.column={column!r}: every "
                        "text needs a label"
                    )
                pairs.append((text, label))
        return pairs

    pairs = read_split(read, cfg, split)
    return [text for text, _ in pairs], [label for _, label in pairs]


def _prepared(cfg: Any, split: str) -> list[str]:
    return array_record.read_texts(cfg.path, split)


RECORDS: dict[str, Callable[[Path, Any], Iterator[tuple[str, dict]]]] = {
    "csv": csv_records,
    "jsonl": jsonl_records,
    "parquet": shards.parquet_records,
}
FILES: dict[str, Callable[[Path, Any], Iterator[str]]] = {
    "text": read_text,
    "stream": shards.read_stream,
    **{name: partial(read_records, records) for name, records in RECORDS.items()},
}
SOURCES: dict[str, Callable[[Any, str], list[str]]] = {
    "grammar": _grammar,
    "e2e": _e2e,
    **{name: partial(read_split, read) for name, read in FILES.items()},
    "tfds": tfds.load_tfds,
    "prepared": _prepared,
}


def load_table(path: str, vocab: int, dim: int) -> np.ndarray | None:
    """Loads an embedding table [v d] from an .npy file; None if path is empty.

    Raises UserError if the file is missing, is not an array of finite numbers or has
    another shape.
    """
    if not path:
        return None
    try:
        table = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"config.embedding.path={path}: {error.strerror}") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"config.embedding.path={path}: not an .npy array") from error
    if not isinstance(table, np.ndarray) or table.dtype.kind not in "fiu":
        raise UserError(f"config.embedding.path={path}: not an .npy array of numbers")
    if not np.isfinite(table).all():
        raise UserError(
            f"config.embedding.path={path}: holds values that are not finite"
        )
    if table.shape != (vocab, dim):
        raise UserError(
            f"config.embedding.path={path}: has shape {table.shape}, not "
            f"{(vocab, dim)}, the vocabulary size and config.model.dim"
        )
    return table.astype(np.float32)
