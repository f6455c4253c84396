# SPDX-License-Identifier: Apache-2.0
"""Encodes text of any size as files of ids, reading it line by line.

python -m dlm_jax.main --mode prepare_data --config configs/stories.py \\
    --config.data.path=texts.txt --workdir prepared/stories
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dlm_jax import console
from dlm_jax.data import array_record, encoding, sources
from dlm_jax.data.reading import Reading
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError

CHUNK = 5000  # texts encoded at a time
LEARN = 500_000  # most texts, evenly spaced, that train a sentencepiece model


def prepare_data(config: Any, workdir: str) -> None:
    """Writes the config's data as array_record files to workdir.

    To train on them, set config.data.source=prepared and config.data.path=workdir.
    Raises UserError, also if workdir already holds prepared data.
    """
    folder, cfg = Path(workdir), config.data
    if cfg.source == "prepared":
        raise UserError("config.data.source=prepared: name the text to prepare")
    if cfg.source_column:
        raise UserError(
            f"config.data.source_column={cfg.source_column!r}: pairs are not prepared; "
            "train on the source itself"
        )
    if (folder / array_record.MANIFEST).exists():
        raise UserError(f"--workdir {folder}: is prepared already; choose another")
    encoding.arrangement(cfg.length, cfg.mode, cfg.too_long)
    counts = {split: sources.count(cfg, split) for split in ("train", "valid")}
    tokenizer = _tokenizer(cfg, counts["train"])
    folder.mkdir(parents=True, exist_ok=True)
    reading = Reading(cfg, tokenizer)
    metadata = {
        "rows": {},
        "texts": counts,
        "length": cfg.length,
        "mode": cfg.mode,
        "tokenizer": tokenizer.to_dict(),
        "source": cfg.source,
    }
    for split, texts in counts.items():
        bar = _bar(cfg, split, "encoding", texts)
        writer = array_record.ArrayRecordWriter(
            folder, split, cfg.length, tokenizer.vocab_size
        )
        for chunk, rows in encode_stream(iter(bar), tokenizer, cfg):
            writer.add(rows)
            reading.add(split, chunk, rows)
        writer.close()
        if not writer.rows:
            raise UserError(
                f"{texts} texts fill no row of config.data.length={cfg.length} in the "
                f"{split} split: set a smaller length or give more text"
            )
        metadata["rows"][split], metadata["dtype"] = writer.rows, str(writer.dtype)
        metadata["crc"] = metadata.get("crc", 0) ^ writer.crc
    metadata["read"] = reading.lines()
    path = folder / array_record.MANIFEST
    part = path.with_suffix(".part")
    text = json.dumps(metadata, ensure_ascii=False)
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    part.replace(path)
    for line in metadata["read"]:
        console.say(line)
    console.say(
        f"{folder}: {metadata['rows']} rows of {cfg.length} tokens; to train on them, "
        f"set config.data.source=prepared and config.data.path={folder}"
    )


def _bar(cfg: Any, split: str, what: str, texts: int) -> Any:
    """Returns the texts of a split, with a progress bar on a terminal."""
    stream = sources.stream(cfg, split)
    return console.Bar(
        stream, f"{split}, {what}", total=texts, unit="text", disable=None
    )


def _tokenizer(cfg: Any, texts: int) -> Tokenizer:
    if cfg.tokenizer_path:
        return sources.train_tokenizer(cfg, ())
    every = 1 if cfg.tokenizer == "word" else -(-texts // LEARN)
    bar = _bar(cfg, "train", "tokenizer", texts)
    return sources.train_tokenizer(cfg, itertools.islice(iter(bar), 0, None, every))


def encode_stream(
    texts: Iterator[str], tok: Tokenizer, cfg: Any
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yields CHUNK texts at a time, and their rows [n l] of `encoding.encode`."""
    left: list[int] = []
    arrange, fit = encoding.arrangement(cfg.length, cfg.mode, cfg.too_long)
    while chunk := list(itertools.islice(texts, CHUNK)):
        ids = [left, *(encoding.delimited(text, tok) for text in chunk)]
        ids = ids if left else ids[1:]
        rows = arrange(ids, cfg.length, fit)
        if cfg.mode == "block":
            left = list(itertools.chain(*ids))[rows.size :]
        yield chunk, rows
