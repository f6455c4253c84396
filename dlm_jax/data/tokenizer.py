# SPDX-License-Identifier: Apache-2.0
"""Tokenizers between text and ids: whole words, sentencepiece pieces, Hugging Face's.

All kinds share one interface: `encode`, `decode`, `vocab_size`, `tokens` and
`to_dict`, whose JSON record `from_dict` reads. Ids 0 to 3 are reserved. No text encodes
to START, END or PAD: the literal word "END" is a word like any other, and so is "<s>".
Text is brought to Unicode NFC before it is encoded.
"""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from dlm_jax.data.normalization import normalize
from dlm_jax.errors import UserError
from dlm_jax.types import END, PAD, START, UNK, Array

SPECIALS = ("START", "END", "UNK", "PAD")
# sentencepiece cuts such a name out of training text; no text has one with a space in it
PIECE_NAMES = ("START ", "END ", "UNK ", "PAD ")


@dataclass(frozen=True)
class WordTokenizer:
    """A word vocabulary: text is split at whitespace, `words[i]` has id i + 4."""

    words: tuple[str, ...]

    @cached_property
    def _ids(self) -> dict[str, int]:
        """The id of each word, also of one that is not in NFC as texts are."""
        ids: dict[str, int] = {}
        for i, word in enumerate(self.words, len(SPECIALS)):
            ids.setdefault(normalize(word, f"word {i} of the vocabulary"), i)
        return ids

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
        return [get(word, UNK) for word in normalize(text, "the text").split()]

    def decode(self, ids: Sequence[int] | Int[Array, " l"]) -> str:
        """Joins the words before the first END by spaces. Raises UserError."""
        strings = self.tokens()
        return " ".join(strings[i] for i in _content(ids, self.vocab_size))

    def to_dict(self) -> dict[str, Any]:
        """Returns a record that JSON can store; `from_dict` is the inverse."""
        return {"kind": "word", "words": list(self.words)}


@dataclass(frozen=True)
class PieceTokenizer:
    """A sentencepiece model, held as its serialised bytes.

    escaped: the model was trained on `_escape`d text, so that it loses no character.
    """

    model: bytes
    escaped: bool = False

    @cached_property
    def _processor(self) -> Any:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @cached_property
    def _space_follows(self) -> bool:
        """Whether pieces end with the space after a word: it ends a text, too."""
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2
        spec = proto.ModelProto.FromString(self.model).trainer_spec
        return spec.treat_whitespace_as_suffix

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
        text = normalize(text, "the text")
        return self._processor.encode(_escape(text) if self.escaped else text)

    def decode(self, ids: Sequence[int] | Int[Array, " l"]) -> str:
        """Returns the text before the first END. Raises UserError for an invalid id."""
        text = self._processor.decode(_content(ids, self.vocab_size))
        text = text.removesuffix(" ") if self._space_follows else text
        return _unescape(text) if self.escaped else text

    def to_dict(self) -> dict[str, Any]:
        """Returns a record that JSON can store, with the model in base64."""
        model = base64.b64encode(self.model).decode("ascii")
        return {"kind": "sentencepiece", "model": model, "escaped": self.escaped}


@dataclass(frozen=True)
class HFTokenizer:
    """A tokenizer of Hugging Face's package tokenizers, held as its JSON.

    Its unknown token is UNK. Its other special tokens, such as [CLS], have no id: START,
    END and PAD stand for them, and their names in a text are words like any other.
    """

    model: str

    @cached_property
    def _tokenizer(self) -> Any:
        return open_hf(self.model)

    @cached_property
    def _strings(self) -> dict[int, str]:
        """The string of each of its ids that has one of ours, in our order."""
        added = self._tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special} | {self._unknown}
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        strings = sorted((i, token) for token, i in vocab.items())
        return {i: token for i, token in strings if i not in special}

    @cached_property
    def _unknown(self) -> int | None:
        """Its id of an unknown token, if it has one."""
        model = json.loads(self.model)["model"]
        name = model.get("unk_token")
        return (
            model.get("unk_id") if name is None else self._tokenizer.token_to_id(name)
        )

    @cached_property
    def _ids(self) -> dict[int, int]:
        return {theirs: i for i, theirs in enumerate(self._strings, len(SPECIALS))}

    @cached_property
    def _theirs(self) -> list[int | None]:
        """Its ids, from UNK on, in our order without END and PAD."""
        return [self._unknown, *self._strings]

    @property
    def vocab_size(self) -> int:
        """Returns the number of tokens, including our four special ones."""
        return len(SPECIALS) + len(self._strings)

    def tokens(self) -> list[str]:
        """Returns the string of each id, in order, as the tokenizer spells it."""
        return [*SPECIALS, *self._strings.values()]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of the tokens of `text`, without START and END.

        Raises UserError where a model without an unknown token needs one.
        """
        text = normalize(text, "the text")
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the package has no class of its own
            raise UserError(
                f"the tokenizer.json cannot encode {text[:60]!r} ({error}): give its model "
                "an unknown token"
            ) from error
        ids = [self._ids.get(i, UNK) for i in encoding.ids]
        return ids if self._unknown is not None else _with_gaps(ids, encoding, text)

    def decode(self, ids: Sequence[int] | Int[Array, " l"]) -> str:
        """Returns the text before the first END. Raises UserError for an invalid id."""
        content = (max(i - UNK - 1, 0) for i in _content(ids, self.vocab_size))
        known = [self._theirs[i] for i in content if self._theirs[i] is not None]
        text = self._tokenizer.decode(known, skip_special_tokens=False)
        return text.removeprefix(" ")  # that of ByteLevel(add_prefix_space=True)

    def to_dict(self) -> dict[str, Any]:
        """Returns a record that JSON can store."""
        return {"kind": "hf", "model": self.model}


def open_hf(model: str) -> Any:
    """Returns the tokenizer of a tokenizer.json's text; no text is a special token.

    Raises UserError without the package tokenizers, and its own Exception for others.
    """
    try:
        import tokenizers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "a tokenizer.json needs the package tokenizers: pip install 'dlm_jax[hf]'"
        ) from error
    tokenizer = tokenizers.Tokenizer.from_str(model)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _with_gaps(ids: list[int], encoding: Any, text: str) -> list[int]:
    """Adds UNK where a tokenizer without an unknown token left part of a word out."""
    found, end = [], 0
    for i, (first, last) in zip(ids, encoding.offsets, strict=True):
        found += [UNK] * len(text[end:first].split()) + [i]
        end = max(end, last)
    return found + [UNK] * len(text[end:].split())


Tokenizer = WordTokenizer | PieceTokenizer | HFTokenizer

# sentencepiece means a space by U+2581, and drops training text with the others: in its
# text each is a private character followed by another, and so is the former
_RESERVED = "\ue000\u2581\u2585\t\x1f"
_ESCAPES = {c: f"\ue000{chr(0xE001 + i)}" for i, c in enumerate(_RESERVED)}
_ORIGINALS = {pair: c for c, pair in _ESCAPES.items()}
_ESCAPED, _PAIR = re.compile(f"[{_RESERVED}]"), re.compile("\ue000[\ue001-\ue005]")


def _escape(text: str) -> str:
    return _ESCAPED.sub(lambda match: _ESCAPES[match[0]], text)


def _unescape(text: str) -> str:
    return _PAIR.sub(lambda match: _ORIGINALS[match[0]], text)


def train_word(texts: Iterable[str], *, min_count: int = 10) -> WordTokenizer:
    """Collects the words that occur MORE than `min_count` times, by first occurrence.

    This is the published code's vocabulary, 821 ids on E2E. Raises UserError if no
    word is that frequent.
    """
    counts = Counter(word for text in _numbered(texts) for word in text.split())
    words = tuple(word for word, count in counts.items() if count > min_count)
    if not words:
        raise UserError(
            f"no word occurs more than min_count={min_count} times among {len(counts)} "
            "different words: lower config.data.min_count or give more text"
        )
    return WordTokenizer(words)


def _numbered(texts: Iterable[str]) -> Iterator[str]:
    """Yields the texts in NFC. Raises UserError with the number of a text, from 1."""
    return (normalize(text, f"text {i}") for i, text in enumerate(texts, 1))


SENTENCE_BYTES, SENTENCE = 4192, 1000  # sentencepiece's limit; characters of a part


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yields the texts as sentencepiece takes them: long ones in parts.

    It drops longer ones without a word, and its time is quadratic in the distance of two
    spaces. A text is cut at a space, or between two characters if none is in reach.
    """
    for text in map(_escape, _numbered(texts)):
        start, short = 0, len(text.encode()) <= SENTENCE_BYTES
        while start < len(text):
            end = len(text)
            if not short and end - start > SENTENCE:
                space = text.rfind(" ", start + 1, start + SENTENCE)
                end = start + SENTENCE if space < 0 else space
            if part := text[start:end].strip(" "):
                yield part
            start = end


def train_sentencepiece(
    texts: Iterable[str], *, vocab_size: int, byte_fallback: bool = False
) -> PieceTokenizer:
    """Trains a unigram model (arXiv:1804.10959) of exactly `vocab_size` ids.

    Every trained text is decoded exactly. byte_fallback: 256 of the ids are bytes, which
    spell the characters that are not in the texts; without it they are UNK. One thread
    and no shuffling, so the same texts give the same bytes. Raises UserError if the
    texts are empty or cannot be split into `vocab_size` distinct pieces.
    """
    import sentencepiece

    writer, refused = io.BytesIO(), []

    def sentences() -> Iterator[str]:
        try:
            yield from _sentences(texts)
        except UserError as error:  # sentencepiece raises another one
            refused.append(error)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=writer,
            vocab_size=vocab_size,
            model_type="unigram",
            bos_id=START,
            eos_id=END,
            unk_id=UNK,
            pad_id=PAD,
            bos_piece=PIECE_NAMES[START],
            eos_piece=PIECE_NAMES[END],
            unk_piece=PIECE_NAMES[UNK],
            pad_piece=PIECE_NAMES[PAD],
            byte_fallback=byte_fallback,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=SENTENCE_BYTES,
            num_threads=1,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if not refused:
            raise UserError(_training_failure(str(error), vocab_size)) from error
    if refused:
        raise refused[0]
    return PieceTokenizer(writer.getvalue(), escaped=True)


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
        model = base64.b64decode(record["model"], validate=True)
        tokenizer = PieceTokenizer(model, bool(record.get("escaped")))
        sp = tokenizer._processor
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged("model", expected) from error
    if (sp.bos_id(), sp.eos_id(), sp.unk_id(), sp.pad_id()) != (START, END, UNK, PAD):
        raise _damaged("model", expected)
    return tokenizer


def _read_hf(record: dict[str, Any]) -> HFTokenizer:
    expected = "a tokenizer.json of Hugging Face's tokenizers"
    try:
        tokenizer = HFTokenizer(record["model"])
        if not tokenizer._strings:
            raise ValueError("no tokens")
        name = json.loads(tokenizer.model)["model"].get("unk_token")
        if name is not None and tokenizer._unknown is None:
            raise UserError(
                f"its unk_token {name!r} is not in its vocabulary: add it there"
            )
    except UserError:
        raise
    except Exception as error:  # the library raises Exception for what it cannot read
        raise _damaged("model", expected) from error
    return tokenizer


_READERS = {
    "word": _read_word,
    "sentencepiece": _read_sentencepiece,
    "hf": _read_hf,
}


class DamagedRecordError(UserError):
    """A record that is none of `to_dict`."""


def _damaged(field: str, expected: str) -> DamagedRecordError:
    return DamagedRecordError(
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
