# SPDX-License-Identifier: Apache-2.0
"""Runs the `tiny` configs of configs/protocols.py, from text to measures.

    python benchmarks/protocols.py --data FOLDER --scratch runs/protocols \\
        --protocol text8 --out benchmarks/results/protocols.json

FOLDER holds tinystories/tinystories.lower.4MB.txt and wikitext2/{train,valid}.txt. They
stand in for the data of the protocols (docs/protocols.md): a BPE and a WordPiece model of
4,000 pieces, trained here, take the place of GPT-2's and BERT's tokenizers, and WikiText-2
that of text8, LM1B and OpenWebText. An interrupted run resumes.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

import dlm_jax
from dlm_jax.configs import protocols
from dlm_jax.data import array_record
from dlm_jax.data.encoding import MODES
from dlm_jax.diffusion import likelihood
from dlm_jax.evaluation import text_metrics
from dlm_jax.types import END, PAD, START

PIECES, TOKENS, SAMPLES, DRAWS = 4000, 16_384, 32, 8
NUM_STEPS = 32
DIGITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
]


# --- the text


def stories(data: Path) -> tuple[list[str], list[str]]:
    """Returns the stories of TinyStories' file; the last twentieth is held out."""
    text = (data / "tinystories/tinystories.lower.4MB.txt").read_text("utf-8")
    found = [part for part in re.split(r"(?<!\n)\n(?!\n)", text) if part.strip()]
    return found[: len(found) * 19 // 20], found[len(found) * 19 // 20 :]


def articles(data: Path, split: str) -> list[str]:
    """Returns WikiText-2's articles, each with its title and headings."""
    lines = (data / f"wikitext2/{split}.txt").read_text("utf-8").splitlines()
    found: list[list[str]] = []
    for line in filter(None, map(str.strip, lines)):
        if re.fullmatch(r"= [^=].*[^=] =", line) or not found:
            found.append([])
        found[-1].append(line)
    return ["\n".join(article) for article in found]


def sentences(texts: Iterable[str]) -> list[str]:
    """Returns the sentences of articles, without headings."""
    lines = (line for text in texts for line in text.split("\n"))
    prose = (line for line in lines if not line.startswith("="))
    parts = (s for line in prose for s in re.split(r"(?<= [.!?]) ", line))
    return [part for part in parts if len(part.split()) > 3]


def letters(texts: Iterable[str]) -> str:
    """Returns texts as in text8: a to z and single spaces, digits spelled out."""
    text = " ".join(texts).lower().replace("<unk>", " ")
    text = re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", text)
    return re.sub(r"[^a-z]+", " ", text)


def write_parquet(texts: list[str], folder: Path, split: str) -> None:
    """Writes texts as two shards of a column `text`."""
    import pyarrow
    from pyarrow import parquet

    for i in range(2):
        table = pyarrow.table({"text": texts[i::2]})
        parquet.write_table(table, folder / f"{split}-0000{i}-of-00002.parquet")


def write_tokenizer(texts: list[str], path: Path, kind: str) -> None:
    """Trains a tokenizer.json: bpe, as GPT-2's, or wordpiece, as BERT's uncased one."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "bpe":
        tok = tokenizers.Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        special, letters = ["<|endoftext|>"], pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=PIECES, special_tokens=special, initial_alphabet=letters
        )
    else:
        tok = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tok.normalizer = normalizers.BertNormalizer(lowercase=True)
        tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tok.decoder = decoders.WordPiece()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(vocab_size=PIECES, special_tokens=special)
    tok.train_from_iterator(texts, trainer)
    tok.save(str(path))


def write_data(name: str, data: Path, folder: Path) -> list[str]:
    """Writes the files of a protocol; returns the flags that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "tinystories256":
        train, valid = stories(data)
    else:
        train, valid = (articles(data, split) for split in ("train", "valid"))
    source, tokenizer = "parquet", folder / "tokenizer.json"
    if name == "text8":
        for split, texts in (("train", train), ("valid", valid)):
            (folder / f"{split}.txt").write_text(letters(texts), "utf-8")
        return [f"path={folder / 'train.txt'}", f"valid_path={folder / 'valid.txt'}"]
    if name.startswith("lm1b"):
        train, valid, source = sentences(train), sentences(valid), "jsonl"
        for split, texts in (("train", train), ("valid", valid)):
            lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
            (folder / f"{split}-0.jsonl").write_text(lines, "utf-8")
    else:
        write_parquet(train, folder, "train")
        write_parquet(valid, folder, "valid")
    if not tokenizer.exists():
        kind = "wordpiece" if name.startswith("lm1b") else "bpe"
        write_tokenizer(train, tokenizer, kind)
    flags = [f"source={source}", f"tokenizer_path={tokenizer}"]
    files = {"path": "train", "valid_path": "valid"}
    return flags + [f"{f}={folder}/{s}-*.{source}" for f, s in files.items()]


# --- the measures


def per_token(lm: Any, rows: np.ndarray) -> dict[str, Any]:
    """Measures the bound of rows [n l]: nats per token, and its standard error.

    Of packed rows all l tokens count, of padded ones those that are not PAD; the nats of
    PAD are in the bound all the same, as the model has to say where a text ends.
    """
    bound, count = lm.nll(rows, draws=DRAWS), np.sum(rows != PAD, -1)
    found = likelihood.ratio_with_stderr(bound.total(), count)
    return {
        "rows": len(rows),
        "tokens": int(count.sum()),
        "nats_per_token": found.mean,
        "stderr_over_rows": found.stderr,
        "stderr_of_the_noise": float(np.sqrt(np.sum(bound.stderr**2)) / count.sum()),
        "perplexity": math.exp(found.mean),
        "bits_per_token": found.mean / math.log(2),
        "estimator": f"variational, continuous time, {DRAWS} noise levels per row",
    }


def row_entropy(rows: np.ndarray) -> float:
    """Returns the mean over rows of the entropy of a row's tokens, nats."""
    entropies = []
    for row in rows:
        _, counts = np.unique(row[~np.isin(row, (START, END, PAD))], return_counts=True)
        share = counts / max(counts.sum(), 1)
        entropies.append(-np.sum(share * np.log(share)))
    return float(np.mean(entropies))


def text_measures(rows: np.ndarray, texts: list[str], words: frozenset[str]) -> dict:
    """Measures rows [n l] and their texts. words: those of the training text."""
    found = [word for text in texts for word in text.split()]
    return {
        "entropy_per_row": row_entropy(rows),
        "distinct_texts": len(set(texts)) / len(texts),
        "distinct_4": text_metrics.distinct(texts, 4),
        "words_known": sum(word in words for word in found) / max(len(found), 1),
    }


def measure(name: str, variant: str, prepared: Path, workdir: Path) -> dict[str, Any]:
    """Measures a finished run: its bound, its samples and held-out text."""
    lm = dlm_jax.load(workdir)
    train, valid, _, _ = array_record.load_prepared(str(prepared))
    rows = valid[: max(2, TOKENS // lm.length)]
    words = frozenset(
        word
        for text in array_record.read_texts(str(prepared), "train")
        for word in text.split()
    )
    sampled = lm.generate(SAMPLES, seed=0, num_steps=NUM_STEPS)
    manifest = array_record.read_manifest(prepared)
    held_out = array_record.read_texts(str(prepared), "valid")[: len(rows)]
    log = [json.loads(x) for x in (workdir / "metrics.jsonl").open(encoding="utf-8")]
    return {
        "config": f"protocols:{variant}",
        "rows_of_training_text": len(train),
        "vocabulary": lm.tokenizer.vocab_size,
        "length": lm.length,
        "mode": manifest["mode"],
        "packed": MODES[manifest["mode"]].packed,
        "steps": lm.step,
        "train_log_last": log[-1],
        "cores": len(os.sched_getaffinity(0)),
        "bound": per_token(lm, rows),
        "sampling_steps": NUM_STEPS,
        "samples": text_measures(sampled.ids, sampled.texts, words),
        "held_out": text_measures(rows, held_out, words),
        "texts": sampled.texts[:4],
        "protocol": name,
    }


# --- the command


def dlm(*flags: str) -> None:
    """Runs the command."""
    subprocess.run([sys.executable, "-m", "dlm_jax.main", *flags], check=True)


def main() -> None:
    """Prepares, trains and measures one protocol, and adds its row to the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--protocol", choices=protocols.PROTOCOLS, required=True)
    parser.add_argument("--loss", choices=protocols.LOSSES, default="ce")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    name, folder = args.protocol, args.scratch / args.protocol
    variant = f"{name}-tiny" + (f"-{args.loss}" if args.loss != "ce" else "")
    prepared, workdir = folder / "prepared", args.scratch / "runs" / variant
    config = ("--config", f"protocols:{variant}")
    if not (prepared / array_record.MANIFEST).exists():
        flags = write_data(name, args.data, folder / "text")
        flags = [f"--config.data.{flag}" for flag in flags]
        dlm("--mode", "prepare_data", *config, "--workdir", str(prepared), *flags)
    flags = ["--config.data.source=prepared", f"--config.data.path={prepared}"]
    if args.steps:
        flags.append(f"--config.train.total_steps={args.steps}")
    dlm(*config, "--workdir", str(workdir), *flags)
    rows = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    rows[variant] = measure(name, variant, prepared, workdir)
    text = json.dumps(rows, indent=1, ensure_ascii=False)
    args.out.write_text(f"{text}\n", encoding="utf-8")
    print(json.dumps(rows[variant], indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
