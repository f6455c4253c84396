# SPDX-License-Identifier: Apache-2.0
"""Reads tokenizers that were made elsewhere, and maps their special tokens to ids 0 to 3.

word           a vocabulary: a word per line
sentencepiece  a model of sentencepiece, such as spiece.model
hf             a tokenizer.json of Hugging Face's tokenizers
"""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from dlm_jax.data import files
from dlm_jax.data.tokenizer import (
    PIECE_NAMES,
    DamagedRecordError,
    Tokenizer,
    WordTokenizer,
    from_dict,
)
from dlm_jax.errors import UserError, choose
from dlm_jax.types import END, PAD, START, UNK

FLAG = "config.data.tokenizer_path"


def load(kind: str, path: str) -> Tokenizer:
    """Reads a tokenizer of this kind from a file. Raises UserError naming the file."""
    read = choose("config.data.tokenizer", READERS, kind)
    return read(files.existing(path, "tokenizer_path", WHAT[kind]))


def _word(path: Path) -> Tokenizer:
    seen: dict[str, int] = {}
    for number, word in files.lines(path):
        if len(word.split()) > 1:
            raise UserError(
                f"{path} line {number}: {word[:60]!r} is not one word; {FLAG} of "
                "config.data.tokenizer=word holds a word per line"
            )
        if word in seen:
            raise UserError(
                f"{path} line {number}: {word[:60]!r} is on line {seen[word]}, too: "
                "remove one of them"
            )
        seen[word] = number
    if not seen:
        raise UserError(f"{path} holds no word: set {FLAG} to a file of words")
    return WordTokenizer(tuple(seen))


def _sentencepiece(path: Path) -> Tokenizer:
    """Moves unknown, start, end and padding to our ids; other control pieces go."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = cast(Any, sentencepiece_model_pb2).ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        kinds = proto.SentencePiece
        special = (kinds.UNKNOWN, kinds.CONTROL)
        pieces = [piece for piece in proto.pieces if piece.type not in special]
        if not pieces:
            raise ValueError("no pieces")
        del proto.pieces[:]
        for i, name in enumerate(PIECE_NAMES):
            kind = kinds.UNKNOWN if i == UNK else kinds.CONTROL
            proto.pieces.add(piece=name, score=0.0, type=kind)
        proto.pieces.extend(pieces)
        names = zip(("bos", "eos", "unk", "pad"), (START, END, UNK, PAD), strict=True)
        for name, i in names:
            setattr(proto.trainer_spec, f"{name}_id", i)
            setattr(proto.trainer_spec, f"{name}_piece", PIECE_NAMES[i])
        model = base64.b64encode(proto.SerializeToString()).decode("ascii")
        return from_dict({"kind": "sentencepiece", "model": model})
    except (DecodeError, ValueError) as error:
        raise UserError(
            f"{path} is not a sentencepiece model: correct {FLAG}"
        ) from error


def _hf(path: Path) -> Tokenizer:
    text = "\n".join(files.every_line(path))
    try:
        return from_dict({"kind": "hf", "model": text})
    except DamagedRecordError as error:
        reason = " ".join(str(error.__cause__).split())[:200]
        raise UserError(
            f"{path} is not a tokenizer.json of Hugging Face's tokenizers ({reason}): "
            f"correct {FLAG}"
        ) from error
    except UserError as error:
        raise UserError(f"{FLAG}={path}: {error}") from error


WHAT = {
    "word": "a file with a word per line",
    "sentencepiece": "a SentencePiece model, such as spiece.model",
    "hf": "a tokenizer.json",
}
READERS: dict[str, Callable[[Path], Tokenizer]] = {
    "word": _word,
    "sentencepiece": _sentencepiece,
    "hf": _hf,
}
