# SPDX-License-Identifier: Apache-2.0
"""Tokenizers between text and ids, by whole words or by sentencepiece pieces.

Both kinds share one interface: `encode`, `decode`, `vocab_size`, `tokens` and
`to_dict`, whose JSON record `from_dict` reads. Ids 0 to 3 are reserved. No text encodes
to START, END or PAD: the literal word "END" is a word like any other.
"""

import base64
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from dlm_jax.errors import UserError
from dlm_jax.types import END, PAD, START, UNK, Array

SPECIALS = ("START", "END", "UNK", "PAD")


@dataclass(frozen=True)
class WordTokenizer:
    """A word vocabulary: text is split at whitespace, `words[i]` has id i + 4."""

    words: tuple[str, ...]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words, len(SPECIALS))}

    @property
    def vocab_size(self) -> int:
        """Returns the number of words plus the four special tokens."""
        return len(SPECIALS) + len(self.words)

    def tokens(self) -> list[str]:
        """Returns the string of each id, in order."""
        return [*SPECIALS, *self.words]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the words, without START and END; UNK if unknown."""
        get = self._ids.get
        return [get(word, UNK) for word in text.split()]

    def decode(self, ids: Sequence[int] | Int[Array, " l"]) -> str:
        """Joins the words before the first END by spaces. Raises UserError."""
        strings = self.tokens()
        return " ".join(strings[i] for i in _content(ids, self.vocab_size))

    def to_dict(self) -> dict[str, Any]:
        """Returns a record that JSON can store; `from_dict` is the inverse."""
        return {"kind": "word", "words": list(self.words)}


@dataclass(frozen=True)
class PieceTokenizer:
    """A sentencepiece model, held as its serialised bytes."""

    model: bytes

    @cached_property
    def _processor(self) -> Any:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @property
    def vocab_size(self) -> int:
        """Returns the number of pieces, including the four special tokens."""
        return self._processor.get_piece_size()

    def tokens(self) -> list[str]:
        """Returns the piece of each id, in order; a leading U+2581 means a space."""
        pieces = range(len(SPECIALS), self.vocab_size)
        return [*SPECIALS, *map(self._processor.id_to_piece, pieces)]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the pieces of `text`, without START and END."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int] | Int[Array, " l"]) -> str:
        """Returns the text before the first END. Raises UserError for an invalid id."""
        return self._processor.decode(_content(ids, self.vocab_size))

    def to_dict(self) -> dict[str, Any]:
        """Returns a record that JSON can store, with the model in base64."""
        model = base64.b64encode(self.model).decode("ascii")
        return {"kind": "sentencepiece", "model": model}


Tokenizer = WordTokenizer | PieceTokenizer


def train_word(texts: Iterable[str], *, min_count: int = 10) -> WordTokenizer:
    """Collects the words that occur MORE than `min_count` times, by first occurrence.

    This is the published code's vocabulary, 821 ids on E2E. Raises UserError if no
    word is that frequent.
    """
    counts = Counter(word for text in texts for word in text.split())
    words = tuple(word for word, count in counts.items() if count > min_count)
    if not words:
        raise UserError(
            f"no word occurs more than min_count={min_count} times among {len(counts)} "
            "different words: lower config.data.min_count or give more text"
        )
    return WordTokenizer(words)


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int) -> PieceTokenizer:
    """Trains a unigram model (arXiv:1804.10959) of exactly `vocab_size` ids.

    One thread and no shuffling, so the same texts give the same bytes. Raises UserError
    if the texts are empty or cannot be split into `vocab_size` distinct pieces.
    """
    import sentencepiece

    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=writer,
            vocab_size=vocab_size,
            model_type="unigram",
            bos_id=START,
            eos_id=END,
            unk_id=UNK,
            pad_id=PAD,
            character_coverage=1.0,
            normalization_rule_name="identity",
            num_threads=1,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(_training_failure(str(error), vocab_size)) from error
    return PieceTokenizer(writer.getvalue())


TRAINERS: dict[str, Callable[..., Tokenizer]] = {
    "word": train_word,
    "sentencepiece": train_sentencepiece,
}


def from_dict(record: Any) -> Tokenizer:
    """Restores a tokenizer from its `to_dict` record; UserError if it is damaged."""
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(kind, str) or kind not in _READERS:
        raise UserError(
            f"tokenizer record of unknown kind {kind!r}: expected one of "
            f"{', '.join(_READERS)}; the file is damaged or of a newer version"
        )
    return _READERS[kind](record)


def _read_word(record: dict[str, Any]) -> WordTokenizer:
    words = record.get("words")
    strings = isinstance(words, list) and all(isinstance(word, str) for word in words)
    if not strings or not words or len(set(words)) != len(words):
        raise _damaged("words", "a list of distinct strings")
    return WordTokenizer(tuple(words))


def _read_sentencepiece(record: dict[str, Any]) -> PieceTokenizer:
    expected = "a base64 sentencepiece model with START, END, UNK, PAD at ids 0 to 3"
    try:
        tokenizer = PieceTokenizer(base64.b64decode(record["model"], validate=True))
        sp = tokenizer._processor
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged("model", expected) from error
    if (sp.bos_id(), sp.eos_id(), sp.unk_id(), sp.pad_id()) != (START, END, UNK, PAD):
        raise _damaged("model", expected)
    return tokenizer


_READERS = {"word": _read_word, "sentencepiece": _read_sentencepiece}


def _damaged(field: str, expected: str) -> UserError:
    return UserError(
        f"damaged tokenizer record: {field!r} is not {expected}; "
        "restore the file it came from or train again"
    )


def _content(ids: Sequence[int] | Int[Array, " l"], vocab_size: int) -> list[int]:
    """Returns the ids before the first END, without START and PAD; or UserError."""
    kept = []
    for i in np.asarray(ids).tolist():
        if i == END:
            break
        if not 0 <= i < vocab_size:
            raise UserError(f"id {i} is outside the vocabulary of {vocab_size} ids")
        if i not in (START, PAD):
            kept.append(i)
    return kept


def _training_failure(error: str, vocab_size: int) -> str:
    """Returns a one-line message for an error that sentencepiece raised."""
    if match := re.search(r"too high \(\d+\).* <= (\d+)", error):
        return (
            f"vocab_size={vocab_size} is too large for this text: "
            f"set config.data.vocab_size={match[1]} or less, or give more text"
        )
    if match := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return (
            f"vocab_size={vocab_size} is too small for the characters of this text: "
            f"set config.data.vocab_size={match[1]} or more"
        )
    if "sentences_.empty()" in error or "all_chars_count" in error:
        return "no text to train a sentencepiece model on: give a non-empty data set"
    return (
        f"sentencepiece cannot train with config.data.vocab_size={vocab_size}: "
        + " ".join(error.split())
    )
