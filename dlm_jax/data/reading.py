# SPDX-License-Identifier: Apache-2.0
"""What was read: one line for the user, and warnings of what a model cannot learn."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np

from dlm_jax.data import files, shards, sources
from dlm_jax.data.tokenizer import Tokenizer, WordTokenizer
from dlm_jax.types import END, PAD, UNK

Splits = dict[str, tuple[list[str], np.ndarray]]

MAX_UNKNOWN = 0.01  # share of UNK above which there is a warning
CHECKED = 1000  # first texts that are decoded again


class Reading:
    """Counts texts and their rows, chunk by chunk.

    texts, unknown and tokens: by split; tokens of all rows, without START, END and PAD.
    """

    def __init__(self, cfg: Any, tok: Tokenizer):
        self.cfg, self.tok = cfg, tok
        self.texts, self.tokens, self.unknown = (
            {"train": 0, "valid": 0} for _ in range(3)
        )
        self.words = self.bytes = self.too_long = 0
        self.changed = 0
        self.first_unknown = self.first_changed = ""

    def state(self) -> dict[str, Any]:
        """Returns a copy of all counts, which JSON can store."""
        counts = {k: v for k, v in vars(self).items() if k not in ("cfg", "tok")}
        return copy.deepcopy(counts)

    def restore(self, state: dict[str, Any]) -> None:
        """Sets all counts to those of `state`."""
        vars(self).update(copy.deepcopy(state))

    def add(self, split: str, texts: list[str], rows: np.ndarray) -> None:
        """Counts texts, and the rows [n l] that they filled."""
        before = self.texts[split]
        self.texts[split] += len(texts)
        self.bytes += len("".join(texts).encode())
        unknown = int(np.count_nonzero(rows == UNK))
        tokens = int(np.count_nonzero(rows > PAD)) + unknown
        too_long = 0
        if self.cfg.mode == "pad":
            cut = np.count_nonzero((rows[:, -1] != PAD) & (rows[:, -1] != END))
            too_long = len(texts) - len(rows) + int(cut)
        # the ids of a word tokenizer are the words; counting them again takes longer
        counted = isinstance(self.tok, WordTokenizer) and not too_long
        self.words += tokens if counted else sum(len(t.split()) for t in texts)
        self.unknown[split] += unknown
        self.tokens[split] += tokens
        self.too_long += too_long
        if unknown and not self.first_unknown:
            self.first_unknown = self._first(split, texts, before)
        self._check(split, texts[: max(CHECKED - before, 0)], before)

    def _first(self, split: str, texts: Iterable[str], before: int) -> str:
        """Returns what is UNK first, and its place."""
        for number, text in enumerate(texts, before + 1):
            if UNK in self.tok.encode(text):
                parts = text.split() if isinstance(self.tok, WordTokenizer) else text
                part = next((p for p in parts if UNK in self.tok.encode(p)), text)
                return f"{part[:40]!r} in text {number} of {split}"
        return ""

    def _check(self, split: str, texts: list[str], before: int) -> None:
        """Counts texts without UNK that are not decoded exactly, but for spaces."""
        for number, text in enumerate(texts, before + 1):
            ids = self.tok.encode(text)
            decoded = self.tok.decode(ids)
            if UNK not in ids and decoded.split() != text.split():
                self.changed += 1
                place = (
                    f"text {number} of {split}, {text[:40]!r} becomes {decoded[:40]!r}"
                )
                self.first_changed = self.first_changed or place

    def lines(self) -> list[str]:
        """Returns the line of what was read, and warnings."""
        cfg, long = self.cfg, self.too_long
        rows = sources.count_rows(cfg)
        tokens = sum(self.tokens.values())
        share = sum(self.unknown.values()) / max(tokens, 1)
        first = f" (first {self.first_unknown})" if self.first_unknown else ""
        cut = " (truncated)" if long and cfg.too_long == "truncate" else ""
        dropped = {"blank": rows.blank}
        if cfg.mode == "pad" and cfg.too_long == "drop":
            dropped["too long"] = long
        why = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n)
        line = (
            f"{self._source(rows)}: {self.texts['train']:,} + {self.texts['valid']:,} texts "
            f"(train + valid), {self.words:,} words, {tokens:,} tokens, "
            f"{share:.2%} UNK{first}, {long:,} too long{cut}, "
            f"{sum(dropped.values()):,} dropped{f' ({why})' if why else ''}, "
            f"{self.bytes:,} bytes"
        )
        return [" ".join(line.split()), *self._warnings()]

    def _source(self, rows: sources.Counts) -> str:
        name = files.describe(self.cfg)
        if self.cfg.source != "csv":
            return name
        delimiter = files.delimiter(
            shards.named_files(self.cfg.path, "path")[0], self.cfg
        )
        long = f"; the longest cell has {rows.lines} lines, at {rows.row}"
        return f"{name} (columns end at {delimiter!r}{long if rows.row else ''})"

    def _warnings(self) -> Iterable[str]:
        for split, unknown in self.unknown.items():
            share = unknown / max(self.tokens[split], 1)
            if share > MAX_UNKNOWN:
                yield (
                    f"warning: {share:.1%} of the tokens of {split} are UNK, first "
                    f"{self.first_unknown}: the model cannot learn them; {self._remedy()}"
                )
        if self.changed:
            yield (
                f"warning: the tokenizer changes {self.changed} of the first "
                f"{sum(min(n, CHECKED) for n in self.texts.values())} texts: "
                f"{self.first_changed}"
            )

    def _remedy(self) -> str:
        if self.cfg.tokenizer_path:
            return "take another config.data.tokenizer_path, or train a tokenizer"
        if self.cfg.tokenizer == "word":
            return (
                f"lower config.data.min_count={self.cfg.min_count}, or set "
                "config.data.tokenizer=sentencepiece"
            )
        return "set config.data.byte_fallback=True"


def describe(cfg: Any, tok: Tokenizer, splits: Splits) -> tuple[str, ...]:
    """Returns the lines on {split: (texts, rows [n l])}. cfg: config.data."""
    reading = Reading(cfg, tok)
    for split, (texts, rows) in splits.items():
        reading.add(split, texts, rows)
    return tuple(reading.lines())
