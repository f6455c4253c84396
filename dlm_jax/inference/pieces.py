# SPDX-License-Identifier: Apache-2.0
"""Templates and phrases of models whose tokens are pieces, not words.

Tokenizers spell the space before a word differently: U+2581, U+0120, or no ## after it.
Here it is found by encoding and decoding a text after another word, an anchor. So a
blank between spaces takes a piece that starts a word, and a blank without a space
before it one that does not.
"""

import functools
import re
from itertools import islice
from typing import NamedTuple

import numpy as np

from dlm_jax.data.tokenizer import Tokenizer, WordTokenizer
from dlm_jax.data.words import starts_unspaced
from dlm_jax.errors import UserError
from dlm_jax.types import PAD, UNK

BLANK, GAP = "___", "[...]"
ANCHORS = 100  # most words that a text is tried after
SAMPLE = 1000  # tokens that show on which side of a word its space is
_BREAK = re.compile(r"[\r\n]")
_SPACES = r"([^\S\r\n]*)"  # line breaks are kept
_SPACED = re.compile(f"{_SPACES}(.*?){_SPACES}", re.DOTALL)


class Part(NamedTuple):
    """A part of a template: a text, BLANK or GAP.

    starts: whether a word starts here; None at the start of the template.
    """

    text: str
    starts: bool | None


def split_template(template: str) -> list[Part]:
    """Splits a template at its blanks, which need no spaces around them."""
    parts: list[Part] = []
    spaced = False
    blanks = rf"({re.escape(BLANK)}|{re.escape(GAP)})"
    for text in re.split(blanks, template.strip()):
        before, inner, after = _SPACED.fullmatch(text).groups()  # type: ignore
        spaced |= bool(before)
        if inner:
            parts.append(Part(inner, spaced if parts else None))
            spaced = bool(after)
    return parts


def split_words(template: str) -> list[Part]:
    """Splits a template at the words that are blanks."""
    parts: list[Part] = []
    for word in template.split():
        opens = word in (BLANK, GAP)
        if parts and not opens and parts[-1].text not in (BLANK, GAP):
            word = f"{parts.pop().text} {word}"
        parts.append(Part(word, True))
    return parts


class _Shown(NamedTuple):
    """What the tokens of a tokenizer show.

    alone, inside: the text of each at the start of a text, and after another word with
    the space between them. anchors: words with their ids.
    """

    alone: list[str]
    inside: list[str]
    anchors: list[tuple[str, list[int]]]


@functools.lru_cache(maxsize=4)
def _shown(tok: Tokenizer) -> _Shown:
    """Decodes every token. Raises UserError if none is a word."""
    alone = [tok.decode([i]) for i in range(tok.vocab_size)]
    words = sorted(set(map(str.strip, alone[PAD + 1 :])), key=lambda w: (len(w), w))
    known = ((w, tok.encode(w)) for w in words if w.isalnum())
    known = ((w, i) for w, i in known if UNK not in i and tok.decode(i) == w)
    anchors = list(islice(known, ANCHORS))
    if not anchors:
        raise UserError("templates and phrases: this model has no token of a word")
    word, ids = anchors[0]
    inside = [tok.decode([*ids, i])[len(word) :] for i in range(tok.vocab_size)]
    return _Shown(alone, inside, anchors)


def _after(tok: Tokenizer, text: str, spaced: bool) -> list[int] | None:
    """Encodes a text after a word, with a space or without; None if it cannot be."""
    anchors = _shown(tok).anchors
    for word, head in anchors:
        ids = tok.encode(f"{word} {text}" if spaced else word + text)
        shows = tok.decode(ids).startswith(f"{word} ")
        if ids[: len(head)] == head and shows == spaced:
            return ids[len(head) :]
    word, head = anchors[0]
    ids = tok.encode(f"{word} {text}")
    fits = ids[: len(head)] == head and _is_either(tok, word, text)
    return ids[len(head) :] if fits else None


def _is_either(tok: Tokenizer, word: str, text: str) -> bool:
    """Returns whether a text has the same ids with a space as without: "." in BERT."""
    return tok.encode(f"{word} {text}") == tok.encode(word + text)


def encode_part(tok: Tokenizer, part: Part, what: str) -> list[int]:
    """Encodes a text of a template, with a space before it only if there is one.

    what: where the text is from, for messages. Raises UserError if the tokenizer cannot
    do so, naming a word outside the vocabulary.
    """
    text, ids = part.text, _encode(tok, part)
    if not text or ids == []:
        raise UserError(f"{what}: empty; give some words")
    if ids is None:
        sets = "no space" if part.starts else "a space"
        raise UserError(
            f"{what}: the tokenizer of this model sets {sets} before {text!r}; write so"
        )
    if UNK in ids:
        words = text.split()
        word = words[ids.index(UNK)] if len(words) == len(ids) else text
        raise UserError(f"{what}: {word!r} is not in the model's vocabulary")
    check_breaks(text, tok.decode(ids), what)
    return ids


def check_breaks(text: str, decoded: str, what: str) -> None:
    """Raises UserError if a text lost a line break when it was encoded and decoded."""
    if _BREAK.findall(text) != _BREAK.findall(decoded):
        raise UserError(
            f"{what} has a line break, which this model's tokens do not keep; write a "
            "space"
        )


def _encode(tok: Tokenizer, part: Part) -> list[int] | None:
    """Encodes a text of a template; None if the tokenizer cannot do so."""
    if part.starts is None or isinstance(tok, WordTokenizer):
        return tok.encode(part.text)
    return _after(tok, part.text, part.starts)


def _phrase(text: str) -> Part:
    """Returns a phrase as it stands in a text: without a space in some scripts."""
    text = text.strip()
    return Part(text, not starts_unspaced(text))


def encode_phrase(tok: Tokenizer, text: str, what: str) -> list[int]:
    """Encodes a phrase as it stands in a text. Raises UserError, as `encode_part`."""
    return encode_part(tok, _phrase(text), what)


def encode_value(tok: Tokenizer, text: str) -> list[int]:
    """Encodes a phrase that may have words outside the vocabulary, UNK."""
    return _encode(tok, _phrase(text)) or []


def encode_avoided(tok: Tokenizer, word: str) -> set[int]:
    """Returns the ids of a word to avoid: inside of a text, and at its start.

    Raises UserError if it is several tokens.
    """
    ids, at_start = encode_phrase(tok, word, "lacks"), tok.encode(word)
    if len(ids) > 1:
        raise UserError(
            f"lacks: {word!r} is {len(ids)} tokens of this model, each of which would be "
            "avoided everywhere; give single ones, as a list"
        )
    return {*ids, *(at_start if len(at_start) == 1 else ())}


def first(tok: Tokenizer, part: Part) -> np.ndarray | None:
    """Returns the mask [v] of the tokens that an open part may start with, or None.

    A blank takes a piece that shows: no lone space and no part of a character. Raises
    UserError if there is no such piece.
    """
    if part.text not in (BLANK, GAP):
        return None
    alone, inside, anchors = _shown(tok)
    word, ids = anchors[0]
    others = islice((i for i, text in enumerate(alone) if text.isalnum()), SAMPLE)
    if len({tok.decode([i, *ids]).endswith(f" {word}") for i in others}) > 1:
        raise UserError(
            "template: this model's tokens hold the space after a word, and templates "
            "need tokens that hold the one before it; use contains="
        )
    if part.starts is None:
        allowed = [a == b.removeprefix(" ") for a, b in zip(alone, inside, strict=True)]
    else:
        allowed = [text.startswith(" ") == part.starts for text in inside]
    if part.starts is False:
        characters = [starts_unspaced(text.strip()) for text in inside]
        for i in np.flatnonzero(characters):
            allowed[i] |= _is_either(tok, word, inside[i].strip())
    if part.text == BLANK:
        shows = [len(text.split()) == 1 and "\ufffd" not in text for text in inside]
        allowed = np.logical_and(allowed, shows)
    allowed = np.array(allowed) & (np.arange(len(alone)) > PAD)
    if not allowed.any():
        with_ = "with" if part.starts else "without"
        raise UserError(
            f"template: the vocabulary has no piece for a {part.text} {with_} a space "
            "before it; set or leave out the space"
        )
    return allowed
