# SPDX-License-Identifier: Apache-2.0
"""Texts by source: files, E2E, TFDS, the grammar, prepared data.

`load_texts` reads what `config.data` names; `stream` reads a file text by text.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dlm_jax.data import array_record, grammar, tfds
from dlm_jax.data.files import (
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
from dlm_jax.data.tokenizer import TRAINERS, Tokenizer
from dlm_jax.errors import UserError, choose

VALID_SEED = 1_000_003  # added to the seed for the grammar's validation texts


def load_texts(cfg: Any, split: str) -> list[str]:
    """The texts of `split`, "train" or "valid", from the source that `cfg` names.

    `cfg` is `config.data`. Without a validation set of its own, a source's last
    `valid_fraction` of examples is held out of training. Raises UserError.
    """
    if split not in ("train", "valid"):
        raise UserError(f"unknown split {split!r}: choose train or valid")
    source = choose("config.data.source", SOURCES, cfg.source)
    return _non_empty(source(cfg, split), f"{split} split of {describe(cfg)}")


def train_tokenizer(cfg: Any, texts: Iterable[str]) -> Tokenizer:
    """Trains the kind of tokenizer `cfg` names, with `min_count` or `vocab_size`."""
    train = choose("config.data.tokenizer", TRAINERS, cfg.tokenizer)
    option = {"word": "min_count", "sentencepiece": "vocab_size"}[cfg.tokenizer]
    return train(texts, **{option: getattr(cfg, option)})


def _non_empty(texts: list, what: str) -> list:
    if not texts:
        raise UserError(
            f"{what} holds no text: check config.data.path, size and source"
        )
    return texts


def _grammar(cfg: Any, split: str) -> list[str]:
    """Texts of the embedded grammar; a text may stand in both splits, as in E2E."""
    if split == "train":
        return grammar.sample(cfg.seed, cfg.size)
    return grammar.sample(cfg.seed + VALID_SEED, cfg.valid_size)


def _file(read: Callable[[Path, Any], Iterable], cfg: Any, split: str) -> list:
    """What is read of `path`; validation from `valid_path` or held out of `path`."""
    path = _path(cfg, split)
    found = _non_empty(list(read(path, cfg)), str(path))
    return found if cfg.valid_path else hold_out(found, cfg, split)


def _path(cfg: Any, split: str) -> Path:
    """The file that holds a split."""
    name = "valid_path" if split == "valid" and cfg.valid_path else "path"
    return existing(cfg[name], name)


def _e2e(cfg: Any, split: str) -> list[str]:
    return e2e_records(cfg, split)[0]


def e2e_records(cfg: Any, split: str) -> tuple[list[str], list[dict[str, str]]]:
    """E2E in Diffusion-LM's layout: texts, and of each its record, field to value.

    From a folder of src1_*.txt, or from files. Raises UserError.
    """
    if not cfg.valid_path and Path(cfg.path).is_dir():
        path = Path(cfg.path) / f"src1_{split}.txt"
        pairs = _non_empty(read_e2e(existing(str(path), "path"), cfg), str(path))
    else:
        pairs = _file(read_e2e, cfg, split)
    return [text for text, _ in pairs], [record for _, record in pairs]


def stream(cfg: Any, split: str) -> Iterator[str]:
    """`load_texts`, one after the other where the source is a file of texts."""
    if cfg.source not in FILES:
        yield from load_texts(cfg, split)
        return
    path, read = _path(cfg, split), FILES[cfg.source]
    yield from islice(read(path, cfg), *_part_of(path, cfg, split))


def count(cfg: Any, split: str) -> int:
    """How many texts `stream` gives."""
    if cfg.source not in FILES:
        return len(load_texts(cfg, split))
    first, last = _part_of(_path(cfg, split), cfg, split)
    return last - first


def _part_of(path: Path, cfg: Any, split: str) -> tuple[int, int]:
    """(first, last) of a split's texts in its file."""
    state = path.stat()
    texts = _count(path, cfg.source, cfg.column, (state.st_mtime_ns, state.st_size))
    if not texts:
        _non_empty([], str(path))
    return (0, texts) if cfg.valid_path else part(texts, cfg, split)


@lru_cache(maxsize=4)
def _count(path: Path, source: str, column: str, state: tuple[int, int]) -> int:
    """The texts of a file, as long as it does not change."""
    return sum(1 for _ in FILES[source](path, ConfigDict({"column": column})))


def labelled(cfg: Any, split: str, column: str) -> tuple[list[str], list[str]]:
    """The texts of csv or jsonl, and what another column says of each; UserError."""
    records = {"csv": csv_records, "jsonl": jsonl_records}[cfg.source]

    def read(path: Path, cfg: Any) -> list[tuple[str, str]]:
        pairs = []
        for where, record in records(path):
            text = cell(record, cfg.column, where)
            if text:
                value = record.get(column)
                label = "" if value is None else str(value).strip()
                if not label:
                    raise UserError(
                        f"{where} has no config.classifier.column={column!r}: every "
                        "text needs a label"
                    )
                pairs.append((text, label))
        return pairs

    pairs = _file(read, cfg, split)
    return [text for text, _ in pairs], [label for _, label in pairs]


def _prepared_ids(cfg: Any, split: str) -> list[str]:
    return array_record.read_texts(cfg.path, split)


FILES: dict[str, Callable[[Path, Any], Iterator[str]]] = {
    "text": read_text,
    "csv": partial(read_records, csv_records),
    "jsonl": partial(read_records, jsonl_records),
}
SOURCES: dict[str, Callable[[Any, str], list[str]]] = {
    "grammar": _grammar,
    "e2e": _e2e,
    **{name: partial(_file, read) for name, read in FILES.items()},
    "tfds": tfds.load_tfds,
    "prepared": _prepared_ids,
}


def load_table(path: str, vocab: int, dim: int) -> np.ndarray | None:
    """An embedding table [v d] from an .npy file; None where path is empty.

    Raises UserError where the file is missing, not an array of finite numbers, or of
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
            f"config.embedding.path={path}: shape {table.shape}, and this run has "
            f"{vocab} words of config.model.dim={dim}"
        )
    return table.astype(np.float32)
