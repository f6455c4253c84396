# SPDX-License-Identifier: Apache-2.0
"""Both splits of a run as token ids, with their tokenizer."""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlm_jax.data import array_record, encoding, pairs, reading, sources
from dlm_jax.data.array_record import ArrayRecordDataset
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError


class Corpus(NamedTuple):
    """Token ids of both splits [n l], and the tokenizer that encoded them.

    metadata: further identification of the corpus, recorded in each checkpoint.
    read: lines on what was read, for the user.
    """

    train: np.ndarray | ArrayRecordDataset
    valid: np.ndarray | ArrayRecordDataset
    tokenizer: Tokenizer
    metadata: dict | None = None
    read: tuple[str, ...] = ()

    def identity(self) -> dict:
        """Returns the metadata with checksums of the ids: `corpus`, `valid`."""
        metadata = self.metadata or {}
        if isinstance(self.train, np.ndarray) and isinstance(self.valid, np.ndarray):
            splits = {"corpus": self.train, "valid": self.valid}
            sums = {name: zlib.crc32(ids.tobytes()) for name, ids in splits.items()}
            metadata = sums | metadata
        return dict(metadata)


def load_corpus(config: Any, tokenizer: Tokenizer | None = None) -> Corpus:
    """Loads and encodes both splits. Raises UserError.

    tokenizer: a saved one to use instead of training one. Prepared data has its own.
    """
    sources.check_options(config.data)
    if config.data.source == "prepared":
        return _load_prepared(config.data)
    if config.data.source_column:
        return _load_pairs(config.data, tokenizer)
    texts = sources.load_texts(config.data, "train")
    held_out = sources.load_texts(config.data, "valid")
    tokenizer = tokenizer or sources.train_tokenizer(config.data, texts)
    layout = {name: config.data[name] for name in ("length", "mode", "too_long")}
    train, valid = (encoding.encode(t, tokenizer, **layout) for t in (texts, held_out))
    splits = {"train": (texts, train), "valid": (held_out, valid)}
    read = reading.describe(config.data, tokenizer, splits)
    return Corpus(train, valid, tokenizer, read=read)


def _load_pairs(cfg: Any, tokenizer: Tokenizer | None) -> Corpus:
    """Loads pairs; sources and targets share the tokenizer."""
    given = {split: pairs.load_pairs(cfg, split) for split in ("train", "valid")}
    pairs.check_fields(given["train"], cfg.delexicalize)
    loaded = {
        split: list(pairs.delexicalized(found, cfg.delexicalize))
        for split, found in given.items()
    }
    texts = {split: list(map(" ".join, found)) for split, found in loaded.items()}
    tokenizer = tokenizer or sources.train_tokenizer(cfg, texts["train"])
    layout = {"length": cfg.length, "too_long": cfg.too_long}
    rows = {
        split: pairs.encode_pairs(found, tokenizer, **layout)
        for split, found in loaded.items()
    }
    splits = {split: (texts[split], rows[split]) for split in rows}
    read = reading.describe(cfg, tokenizer, splits)
    return Corpus(rows["train"], rows["valid"], tokenizer, read=read)


def _load_prepared(cfg: Any) -> Corpus:
    """Loads what --mode prepare_data wrote; UserError if the layout differs."""
    metadata = array_record.read_manifest(Path(cfg.path))
    for name in ("length", "mode"):
        if cfg[name] != metadata[name]:
            raise UserError(
                f"config.data.{name}={cfg[name]}: {cfg.path} was prepared with "
                f"{metadata[name]}; use that value, or prepare the data again"
            )
    lines = metadata.get("read") or ()
    read = tuple(f"{cfg.path}, prepared from {line}" for line in lines)
    return Corpus(*array_record.load_prepared(cfg.path), read=read)
