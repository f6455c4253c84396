# SPDX-License-Identifier: Apache-2.0
"""Encodes text of any size as files of ids, reading it line by line.

python -m dlm_jax.main --mode prepare_data --config configs/stories.py \\
    --config.data.path=texts.txt --workdir prepared/stories
"""

import functools
import itertools
import json
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dlm_jax import console
from dlm_jax.data import array_record, encoding, sources
from dlm_jax.data.reading import Reading
from dlm_jax.data.tokenizer import Tokenizer, from_dict
from dlm_jax.errors import UserError

PROGRESS = "progress.json"  # of a preparation that is not finished
FIELDS = ("data", "texts", "tokenizer", "done", "at")
CHUNK = 5000  # texts encoded at a time
LEARN = 500_000  # most texts, evenly spaced, that train a sentencepiece model


def prepare_data(config: Any, workdir: str) -> None:
    """Writes the config's data as array_record files to workdir.

    An interrupted call is resumed at the last file that is complete, to the same bytes.
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
    begun = _begin(folder, cfg)
    try:
        metadata = _encode_all(folder, cfg, begun)
    except UserError:  # it would come again
        (folder / PROGRESS).unlink(missing_ok=True)
        raise
    write_json(folder / array_record.MANIFEST, metadata)
    (folder / PROGRESS).unlink()
    for line in metadata["read"]:
        console.say(line)
    console.say(
        f"{folder}: {metadata['rows']} rows of {cfg.length} tokens; to train on them, "
        f"set config.data.source=prepared and config.data.path={folder}"
    )


def _encode_all(folder: Path, cfg: Any, begun: dict) -> dict:
    """Writes the rows of both splits; returns the manifest. Raises UserError."""
    tokenizer, done = from_dict(begun["tokenizer"]), begun["done"]
    reading = Reading(cfg, tokenizer)
    for split, texts in begun["texts"].items():
        if split not in done:
            done[split] = _encode(folder, split, cfg, reading, begun)
            begun["at"] = {"reading": reading.state()}
            write_json(folder / PROGRESS, begun)
        if not done[split]["rows"]:
            raise UserError(
                f"{texts} texts fill no row of config.data.length={cfg.length} in the "
                f"{split} split: set a smaller length or give more text"
            )
    reading.restore(begun["at"]["reading"])
    return _manifest(cfg, tokenizer, begun, reading)


def _manifest(cfg: Any, tok: Tokenizer, begun: dict, reading: Reading) -> dict:
    """Returns what data.json holds: the protocol, the counts, the tokenizer, checksums."""
    done, record = begun["done"], begun["tokenizer"]
    how = cfg.too_long if cfg.mode == "pad" else "packed"
    return {
        "protocol": f"{cfg.mode} ({how}), {cfg.length} tokens per row of "
        f"{tok.vocab_size} ids, {record['kind']} tokenizer, {cfg.source} text",
        "rows": {split: found["rows"] for split, found in done.items()},
        "texts": begun["texts"],
        "tokens": reading.tokens,
        "bytes": reading.bytes,
        "length": cfg.length,
        "mode": cfg.mode,
        "dtype": str(array_record.dtype(tok.vocab_size)),
        "crc": functools.reduce(operator.xor, (x["crc"] for x in done.values())),
        "tokenizer_sha256": array_record.tokenizer_sha256(record),
        "tokenizer": record,
        "source": cfg.source,
        "read": reading.lines(),
    }


def _begin(folder: Path, cfg: Any) -> dict:
    """Returns the record of what is done: read from an interrupted preparation, or new.

    Raises UserError if that one was of other data or options.
    """
    data = json.loads(json.dumps(_identity(cfg)))
    if (folder / PROGRESS).exists():
        try:
            begun = json.loads((folder / PROGRESS).read_text("utf-8"))
            before, *_ = [begun[name] for name in FIELDS]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder / PROGRESS} is damaged ({error}): remove the folder"
            ) from error
        other = [name for name in data if data[name] != before.get(name)]
        if not other:
            return begun
        if begun["at"] or begun["done"]:
            raise UserError(
                f"--workdir {folder}: holds an unfinished preparation with another "
                f"{', '.join(other)}: remove it, or choose another"
            )
    texts = {split: sources.count(cfg, split) for split in ("train", "valid")}
    tokenizer = _tokenizer(cfg, texts["train"]).to_dict()
    folder.mkdir(parents=True, exist_ok=True)
    begun = {"data": data, "texts": texts, "tokenizer": tokenizer, "done": {}, "at": {}}
    write_json(folder / PROGRESS, begun)
    return begun


def _identity(cfg: Any) -> dict[str, Any]:
    """Returns the options of the data, and the sizes and times of its files."""
    files = {str(p): p.stat() for p in sources.all_files(cfg)}
    return {
        **{f"config.data.{name}": value for name, value in cfg.items()},
        "file": {name: (s.st_size, s.st_mtime_ns) for name, s in files.items()},
        "layout of files": (array_record.PAGE, array_record.SHARD),
    }


def write_json(path: Path, record: dict) -> None:
    """Writes a file whole or not at all."""
    part, text = path.with_suffix(".part"), json.dumps(record, ensure_ascii=False)
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    part.replace(path)


def _encode(
    folder: Path, split: str, cfg: Any, reading: Reading, begun: dict
) -> dict[str, int]:
    """Writes the rows of a split; returns their number and checksum.

    After each file that is complete, `begun["at"]` says where to resume: what was
    known before the texts that completed it.
    """
    at, tok = begun["at"], reading.tok
    writer = array_record.ArrayRecordWriter(folder, split, cfg.length, tok.vocab_size)
    done, left = at.get("texts", 0), at.get("left", [])
    if "reading" in at:
        reading.restore(at["reading"])
    if "pages" in at:
        writer.resume(at["rows"], at["pages"], at["crc"])
    bar = _bar(cfg, split, "encoding", begun["texts"][split])
    texts = itertools.islice(iter(bar), done, None)
    for chunk, rows, rest in encode_stream(texts, tok, cfg, left):
        before = {"texts": done, "left": left, "rows": writer.rows}
        before["reading"] = reading.state()
        complete, done, left = writer.complete, done + len(chunk), rest
        writer.add(rows)
        reading.add(split, chunk, rows)
        if writer.complete != complete:
            pages, crc = writer.complete
            begun["at"] = before | {"pages": pages, "crc": crc}
            write_json(folder / PROGRESS, begun)
    writer.close()
    return {"rows": writer.rows, "crc": writer.crc}


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
    texts: Iterator[str], tok: Tokenizer, cfg: Any, left: list[int] | None = None
) -> Iterator[tuple[list[str], np.ndarray, list[int]]]:
    """Yields CHUNK texts at a time, their rows [n l] of `encoding.encode`, and the rest.

    left: ids of earlier texts that fill no row; the rest: those after these texts.
    """
    layout, left = encoding.arrangement(cfg.length, cfg.mode, cfg.too_long), left or []
    while chunk := list(itertools.islice(texts, CHUNK)):
        ids = [layout.delimited(text, tok) for text in chunk]
        rows, left = layout.rows([left, *ids] if left else ids)
        yield chunk, rows, left
