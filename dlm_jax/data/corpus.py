# SPDX-License-Identifier: Apache-2.0
"""Both splits of a run as token ids, and what made them."""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlm_jax.data import array_record, encoding, sources
from dlm_jax.data.array_record import ArrayRecordDataset
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError


class Corpus(NamedTuple):
    """Token ids of both splits [n l], and the tokenizer that made them.

    metadata: what else identifies the corpus, recorded in each checkpoint.
    """

    train: np.ndarray | ArrayRecordDataset
    valid: np.ndarray | ArrayRecordDataset
    tokenizer: Tokenizer
    metadata: dict | None = None

    def identity(self) -> dict:
        """Returns the metadata with a checksum of the training ids, as `corpus`."""
        if not isinstance(self.train, np.ndarray):
            return dict(self.metadata or {})
        return {"corpus": zlib.crc32(self.train.tobytes()), **(self.metadata or {})}


def load_corpus(config: Any, tokenizer: Tokenizer | None = None) -> Corpus:
    """Reads, tokenises and encodes both splits; a saved tokenizer is kept."""
    if config.data.source == "prepared":
        return _prepared(config.data)
    texts = sources.load_texts(config.data, "train")
    held_out = sources.load_texts(config.data, "valid")
    tokenizer = tokenizer or sources.train_tokenizer(config.data, texts)
    layout = {name: config.data[name] for name in ("length", "mode", "too_long")}
    train, valid = (encoding.encode(t, tokenizer, **layout) for t in (texts, held_out))
    return Corpus(train, valid, tokenizer)


def _prepared(cfg: Any) -> Corpus:
    """What --mode prepare_data wrote; UserError where the config has another layout."""
    metadata = array_record.read_manifest(Path(cfg.path))
    for name in ("length", "mode"):
        if cfg[name] != metadata[name]:
            raise UserError(
                f"config.data.{name}={cfg[name]}: {cfg.path} was prepared with "
                f"{metadata[name]}; take that, or prepare it again"
            )
    return Corpus(*array_record.load_prepared(cfg.path))
