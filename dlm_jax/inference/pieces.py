# SPDX-License-Identifier: Apache-2.0
"""Templates and phrases of models whose tokens are SentencePiece pieces.

A piece that starts a word begins with U+2581. So a blank between spaces takes a piece
that starts a word, and a blank without a space before it one that does not.
"""

import functools
import re
from typing import Any, NamedTuple

import numpy as np

from dlm_jax.data.tokenizer import PieceTokenizer, Tokenizer
from dlm_jax.data.words import starts_unspaced
from dlm_jax.errors import UserError
from dlm_jax.types import PAD

BLANK, GAP = "___", "[...]"
SPACE = "\u2581"


class Part(NamedTuple):
    """A part of a template: a text, BLANK or GAP.

    starts: whether a word starts here; None at the start of the template.
    """

    text: str
    starts: bool | None


def split_template(template: str) -> list[Part]:
    """Splits a template at its blanks, which need no spaces around them."""
    parts: list[Part] = []
    spaced: bool | None = None
    for text in re.split(rf"({re.escape(BLANK)}|{re.escape(GAP)})", template):
        if text.strip():
            before = spaced or (parts and text[0].isspace())
            parts.append(Part(text.strip(), None if not parts else bool(before)))
            spaced = False
        spaced = (spaced or bool(parts)) if text[-1:].isspace() else spaced
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


def encode_part(tok: Tokenizer, part: Part) -> list[int]:
    """Encodes a text of a template, with a space before it only if there is one."""
    if isinstance(tok, PieceTokenizer) and part.starts is False:
        return _continuing(tok.model).encode(part.text)
    return tok.encode(part.text)


def encode_phrase(tok: Tokenizer, text: str) -> list[int]:
    """Encodes a phrase as it stands in a text: without a space in some scripts."""
    return encode_part(tok, Part(text, not starts_unspaced(text)))


@functools.lru_cache(maxsize=4)
def _continuing(model: bytes) -> Any:
    """Returns the model without the space that it puts before a text."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2
    spec = proto.ModelProto.FromString(model)
    spec.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())


def first(tok: Tokenizer, part: Part) -> np.ndarray | None:
    """Returns the mask [v] of the tokens that an open part may start with, or None.

    A blank takes a piece that shows: no lone space and no single byte. Raises UserError
    if there is no such piece.
    """
    if part.text not in (BLANK, GAP):
        return None
    tokens = tok.tokens()
    allowed = np.arange(len(tokens)) > PAD
    if part.starts is not None:
        allowed &= np.array([t.startswith(SPACE) == part.starts for t in tokens])
    if part.text == BLANK:
        allowed &= np.array([bool(t.strip(SPACE)) for t in tokens])
        allowed &= np.array([not re.fullmatch("<0x[0-9A-F]{2}>", t) for t in tokens])
    if not allowed.any():
        with_ = "with" if part.starts else "without"
        raise UserError(
            f"template: the vocabulary has no piece for a {part.text} {with_} a space "
            "before it; set or leave out the space"
        )
    return allowed
