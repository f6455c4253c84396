# SPDX-License-Identifier: Apache-2.0
"""Data: texts from files, TFDS or the grammar -> ids [n l] -> batches, seeded by step.

`load_texts` reads `config.data`, `encode` makes the one array of ids, and `batch_index`
is a pure function of (seed, step), so that a run resumes without saving a position.
"""

import codecs
import csv
import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32
from ml_collections import ConfigDict

from dlm_jax.data import array_record, grammar
from dlm_jax.data.tokenizer import TRAINERS, Tokenizer
from dlm_jax.types import END, PAD, START, UserError

VALID_SEED = 1_000_003  # added to the seed for the grammar's validation texts
CONNECT_SECONDS = 5.0  # TFDS itself retries for minutes without a network
ARCHIVES = (".zip", ".gz", ".tgz", ".tar", ".bz2")  # TFDS unpacks with TensorFlow


def load_texts(cfg: Any, split: str) -> list[str]:
    """The texts of `split`, "train" or "valid", from the source that `cfg` names.

    `cfg` is `config.data`. Without a validation set of its own, a source's last
    `valid_fraction` of examples is held out of training. Raises UserError.
    """
    if split not in ("train", "valid"):
        raise UserError(f"unknown split {split!r}: choose train or valid")
    source = _choose(SOURCES, cfg.source, "source")
    return _non_empty(source(cfg, split), f"{split} split of {_describe(cfg)}")


def train_tokenizer(cfg: Any, texts: Iterable[str]) -> Tokenizer:
    """Trains the kind of tokenizer `cfg` names, with `min_count` or `vocab_size`."""
    train = _choose(TRAINERS, cfg.tokenizer, "tokenizer")
    option = {"word": "min_count", "sentencepiece": "vocab_size"}[cfg.tokenizer]
    return train(texts, **{option: getattr(cfg, option)})


def _choose(choices: dict[str, Callable], name: str, flag: str) -> Callable:
    if name not in choices:
        raise UserError(
            f"unknown config.data.{flag}={name!r}: choose one of {', '.join(choices)}"
        )
    return choices[name]


def _describe(cfg: Any) -> str:
    return f"{cfg.source} {cfg.path}".strip()


def _non_empty(texts: list, what: str) -> list:
    if not texts:
        raise UserError(
            f"{what} holds no text: check config.data.path, size and source"
        )
    return texts


# --- sources: (cfg, split) -> texts


def _grammar(cfg: Any, split: str) -> list[str]:
    """Texts of the embedded grammar; a text may stand in both splits, as in E2E."""
    if split == "train":
        return grammar.sample(cfg.seed, cfg.size)
    return grammar.sample(cfg.seed + VALID_SEED, cfg.valid_size)


def _file(read: Callable[[Path, Any], Iterable], cfg: Any, split: str) -> list:
    """What is read of `path`; validation from `valid_path` or held out of `path`."""
    path = _path(cfg, split)
    found = _non_empty(list(read(path, cfg)), str(path))
    return found if cfg.valid_path else _hold_out(found, cfg, split)


def _path(cfg: Any, split: str) -> Path:
    """The file that holds a split."""
    name = "valid_path" if split == "valid" and cfg.valid_path else "path"
    return _existing(cfg[name], name)


def _e2e(cfg: Any, split: str) -> list[str]:
    return e2e_records(cfg, split)[0]


def e2e_records(cfg: Any, split: str) -> tuple[list[str], list[dict[str, str]]]:
    """E2E in Diffusion-LM's layout: texts, and of each its record, field to value.

    From a folder of src1_*.txt, or from files. Raises UserError.
    """
    if not cfg.valid_path and Path(cfg.path).is_dir():
        path = Path(cfg.path) / f"src1_{split}.txt"
        pairs = _non_empty(_read_e2e(_existing(str(path), "path"), cfg), str(path))
    else:
        pairs = _file(_read_e2e, cfg, split)
    return [text for text, _ in pairs], [record for _, record in pairs]


def _hold_out(texts: list, cfg: Any, split: str) -> list:
    return texts[slice(*part(len(texts), cfg, split))]


def part(texts: int, cfg: Any, split: str) -> tuple[int, int]:
    """(first, last) of a split among so many texts: the end is held out."""
    if not 0 <= cfg.valid_fraction < 1:
        raise UserError(
            f"config.data.valid_fraction={cfg.valid_fraction}: set it from 0 up to 1"
        )
    held = round(texts * cfg.valid_fraction)
    if cfg.valid_fraction and texts:
        held = max(held, 1)
    kept = (0, texts - held) if split == "train" else (texts - held, texts)
    if kept[0] >= kept[1]:
        raise UserError(
            f"{_describe(cfg)} with {texts} texts leaves none for {split} at "
            f"config.data.valid_fraction={cfg.valid_fraction}: change it, set "
            "config.data.valid_path (or tfds_valid), or give more text"
        )
    return kept


def _existing(path: str, flag: str) -> Path:
    if not path:
        raise UserError(f"config.data.{flag} is empty: set it to a file of texts")
    if not Path(path).is_file():
        found = "is a folder" if Path(path).is_dir() else "does not exist"
        raise UserError(f"{path} {found}: set config.data.{flag} to a file of texts")
    return Path(path)


def _decode(raw: bytes, path: Path, line: int) -> str:
    """The text of that line of the file."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}): "
            "convert the file to UTF-8"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, stripped, with their numbers from 1."""
    for number, line in enumerate(_raw_lines(path), 1):
        if stripped := line.strip():
            yield number, stripped


def _raw_lines(path: Path) -> Iterator[str]:
    """One after the other, never all; UserError naming the one that is not UTF-8."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        for number, raw in enumerate(file, 1):
            raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            yield _decode(raw, path, number)


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


def _read_text(path: Path, cfg: Any) -> Iterator[str]:
    return (line for _, line in _lines(path))


def _read_e2e(path: Path, cfg: Any) -> list[tuple[str, dict[str, str]]]:
    found = []
    for number, line in _lines(path):
        record, bar, text = line.partition("||")
        if not bar:
            raise UserError(
                f"{path} line {number} has no '||' between record and text: "
                "give E2E's `field : value | ... ||text`, or set config.data.source=text"
            )
        told = (part.partition(":") for part in record.split("|"))
        fields = {field.strip(): value.strip() for field, _, value in told}
        found.append((text.strip(), fields))
    return found


def labelled(cfg: Any, split: str, column: str) -> tuple[list[str], list[str]]:
    """The texts of csv or jsonl, and what another column says of each; UserError."""
    records = {"csv": _csv_records, "jsonl": _jsonl_records}[cfg.source]

    def read(path: Path, cfg: Any) -> list[tuple[str, str]]:
        pairs = []
        for where, record in records(path):
            text = _cell(record, cfg.column, where)
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


def _read_records(records: Callable, path: Path, cfg: Any) -> Iterator[str]:
    texts = (_cell(record, cfg.column, where) for where, record in records(path))
    return (text for text in texts if text)


def _jsonl_records(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, record) of each line."""
    for number, line in _lines(path):
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{where} is not JSON ({reason}): mend it") from error
        if not isinstance(record, dict):
            raise UserError(f"{where} is not a JSON object: give {{column: text}}")
        yield where, record


def _csv_records(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, record) of each row."""
    pieces = chain.from_iterable(io.StringIO(x, newline="") for x in _raw_lines(path))
    rows = csv.DictReader(pieces)
    try:
        for row in rows:
            yield f"{path} line {rows.line_num}", row
    except csv.Error as error:
        where = f"{path} line {rows.line_num}"
        raise UserError(f"{where} is not CSV ({error}): mend it") from error


def _cell(record: dict, column: str, where: str) -> str:
    """The text of one record, which may be bytes; UserError if it has none."""
    if column not in record:
        names = ", ".join(str(name) for name in record if name is not None)
        raise UserError(
            f"{where} has no column {column!r}: set config.data.column to one of {names}"
        )
    value = record[column]
    try:
        value = value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise UserError(f"{where} column {column!r} is not UTF-8: mend it") from error
    if not isinstance(value, str):
        kind = "nothing" if value is None else type(value).__name__
        raise UserError(
            f"{where} column {column!r} holds {kind}, not text: "
            "mend it or set config.data.column to another"
        )
    return value.strip()


# --- TFDS, without TensorFlow


def _tfds(cfg: Any, split: str) -> list[str]:
    """A data set by name ("e2e_cleaned", "name/config:1.0.0"), prepared if it is not."""
    wanted = cfg.tfds_valid if split == "valid" and cfg.tfds_valid else cfg.tfds_train
    try:
        builder = _prepared(cfg)
        if cfg.column not in (builder.info.features or {}):
            names = ", ".join(builder.info.features or {})
            raise UserError(
                f"TFDS {cfg.path} has no column {cfg.column!r}: "
                f"set config.data.column to one of {names}"
            )
        records = builder.as_data_source(split=wanted)
        cells = (_cell(r, cfg.column, f"TFDS {cfg.path}") for r in records)
        texts = [text for text in cells if text]
    except UserError:
        raise
    except Exception as error:
        raise UserError(_tfds_failure(error, cfg, wanted)) from error
    return texts if cfg.tfds_valid else _hold_out(texts, cfg, split)


def _prepared(cfg: Any) -> Any:
    """The data set's builder, its files in place: read if there, else prepared."""
    import tensorflow_datasets as tfds

    data_dir = cfg.tfds_dir or None
    builder = tfds.builder(cfg.path, data_dir=data_dir)
    if not builder.is_prepared():
        builder = tfds.builder(cfg.path, data_dir=data_dir, file_format="array_record")
        _check_preparable(builder, cfg)
        builder.download_and_prepare()
    return builder


def _check_preparable(builder: Any, cfg: Any) -> None:
    """Fails in seconds where TFDS would download in vain or retry for minutes."""
    import requests

    urls = list(builder.url_infos or {})
    if any(url.endswith(ARCHIVES) for url in urls) and not find_spec("tensorflow"):
        raise ModuleNotFoundError("to unpack archives", name="tensorflow")
    for url in urls[:1]:
        try:
            requests.head(url, timeout=CONNECT_SECONDS)
        except requests.RequestException as error:
            raise UserError(
                f"TFDS {cfg.path} is not prepared in {builder.data_path} and {url} "
                "cannot be reached: prepare it on a machine with a network and set "
                "config.data.tfds_dir to its folder"
            ) from error


def _tfds_failure(error: Exception, cfg: Any, split: str) -> str:
    """One line for the user out of whatever TFDS raised."""
    name = f"TFDS {cfg.path}"
    chain_ = list(_causes(error))
    missing = [e.name for e in chain_ if isinstance(e, ImportError) and e.name]
    if missing:
        return (
            f"{name} needs the package {missing[0]}: install it, or prepare the data "
            "set as array_record elsewhere and set config.data.tfds_dir to its folder"
        )
    if any(type(e).__name__ == "DatasetNotFoundError" for e in chain_):
        return (
            f"{name} is not a known data set, nor prepared in config.data.tfds_dir="
            f"{cfg.tfds_dir!r}: correct config.data.path"
        )
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return (
        f"{name} split {split!r} cannot be read ({reason}): check config.data.path, "
        "tfds_train and tfds_valid, and that tfds_dir holds array_record files"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _prepared_ids(cfg: Any, split: str) -> list[str]:
    return array_record.texts(cfg.path, split)


FILES: dict[str, Callable[[Path, Any], Iterator[str]]] = {
    "text": _read_text,
    "csv": partial(_read_records, _csv_records),
    "jsonl": partial(_read_records, _jsonl_records),
}
SOURCES: dict[str, Callable[[Any, str], list[str]]] = {
    "grammar": _grammar,
    "e2e": _e2e,
    **{name: partial(_file, read) for name, read in FILES.items()},
    "tfds": _tfds,
    "prepared": _prepared_ids,
}


# --- texts -> ids


def encode(
    texts: list[str], tok: Tokenizer, *, length: int, mode: str, too_long: str
) -> Int32[np.ndarray, "n l"]:
    """Ids of the texts in rows of `length`, each text between START and END.

    `mode` "pad" gives a row a text, filled with PAD; "block" joins all texts and cuts
    rows from the stream, the remainder dropped. `too_long` says what "pad" does with
    a text that does not fit: "error", "truncate" (its END is lost, as published) or
    "drop". Raises UserError for such a text, an unknown choice or an empty result.
    """
    arrange, fit = arrangement(length, mode, too_long)
    ids = arrange([delimited(text, tok) for text in texts], length, fit)
    if not len(ids):
        raise UserError(
            f"{len(texts)} texts give no row of config.data.length={length} in mode "
            f"{mode}: set a smaller length or give more text"
        )
    return ids


def arrangement(length: int, mode: str, too_long: str) -> tuple[Callable, Callable]:
    """(rows of ids -> array, what fits them); UserError for a layout that cannot be."""
    if length < 2:
        raise UserError(f"config.data.length={length}: set it to 2 or more")
    return _choose(MODES, mode, "mode"), _choose(TOO_LONG, too_long, "too_long")


def delimited(text: str, tok: Tokenizer) -> list[int]:
    """START, the text, END."""
    return [START, *tok.encode(text), END]


def _pad(rows: list[list[int]], length: int, fit: Callable) -> np.ndarray:
    rows = fit(rows, length)
    sizes = np.fromiter(map(len, rows), np.int32, len(rows))
    ids = np.full((len(rows), length), PAD, np.int32)
    ids[np.arange(length) < sizes[:, None]] = _flat(rows)
    return ids


def _block(rows: list[list[int]], length: int, fit: Callable) -> np.ndarray:
    flat = _flat(rows)
    return flat[: len(flat) // length * length].reshape(-1, length)


def _flat(rows: list[list[int]]) -> Int32[np.ndarray, " n"]:
    return np.fromiter(chain.from_iterable(rows), np.int32, sum(map(len, rows)))


def _refuse(rows: list[list[int]], length: int) -> list[list[int]]:
    for number, row in enumerate(rows, 1):
        if len(row) > length:
            raise UserError(
                f"text {number} has {len(row)} tokens with START and END, more than "
                f"config.data.length={length}: set length={max(map(len, rows))} or "
                "config.data.too_long to truncate or drop"
            )
    return rows


MODES: dict[str, Callable] = {"pad": _pad, "block": _block}
TOO_LONG: dict[str, Callable] = {
    "error": _refuse,
    "truncate": lambda rows, length: [row[:length] for row in rows],
    "drop": lambda rows, length: [row for row in rows if len(row) <= length],
}


# --- ids -> batches


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    rows = np.arange(n, dtype=np.uint32 if n < 2**32 else np.uint64)
    return np.random.default_rng((seed % 2**64, epoch)).permutation(rows)


def batch_index(
    n: int,
    *,
    seed: int,
    step: int,
    batch: int,
    host: int = 0,
    hosts: int = 1,
) -> np.ndarray:
    """Of n rows, those of the batch of `step` that belong to `host`: batch // hosts.

    A pure function of (seed, step). Each epoch has its own order, and a batch may run
    across its end: every row comes once an epoch and none is dropped. Host h takes the
    h-th of `hosts` equal slices. Raises UserError if `hosts` does not divide `batch`.
    """
    if batch % hosts:
        raise UserError(
            f"batch {batch} does not divide over {hosts} hosts: "
            f"set the batch size to a multiple of {hosts}"
        )
    share = batch // hosts
    epochs, index = np.divmod(step * batch + host * share + np.arange(share), n)
    rows = [
        _permutation(seed, epoch, n)[index[epochs == epoch]]
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
    ]
    return np.concatenate(rows)


def batches(
    ids: Int32[np.ndarray, "n l"] | array_record.Rows, batch: int
) -> Iterator[tuple[Int32[np.ndarray, "b l"], Float32[np.ndarray, " b"]]]:
    """All rows in order, for evaluation: (ids, mask), each of `batch` rows.

    The last batch is filled up with rows from the start, whose mask is 0.
    """
    for start in range(0, len(ids), batch):
        index = np.arange(start, start + batch)
        yield ids[index % len(ids)], (index < len(ids)).astype(np.float32)


class Ahead:
    """make(step) of the next steps, made by a thread before they are asked for."""

    def __init__(self, make: Callable[[int], Any], steps: range, depth: int = 2):
        self.make, self.left = make, iter(steps)
        self.pool = ThreadPoolExecutor(1)
        self.due = deque(self.pool.submit(make, s) for s in islice(self.left, depth))

    def __call__(self) -> Any:
        """That of the next step."""
        for step in islice(self.left, 1):
            self.due.append(self.pool.submit(self.make, step))
        return self.due.popleft().result()

    def close(self) -> None:
        """Ends the thread."""
        self.pool.shutdown(cancel_futures=True)


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
