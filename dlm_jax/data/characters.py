# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of characters, such as text8's 27: a token for each."""

import json
from collections import Counter
from collections.abc import Iterable

from dlm_jax.data.normalization import normalize
from dlm_jax.data.tokenizer import HFTokenizer
from dlm_jax.errors import UserError

UNKNOWN = "[UNK]"  # no character of a text


def train_characters(texts: Iterable[str], *, min_count: int = 10) -> HFTokenizer:
    """Collects the characters that occur more than `min_count` times, in order.

    Raises UserError if no character is that frequent.
    """
    counts: Counter[str] = Counter()
    for number, text in enumerate(texts, 1):
        counts.update(normalize(text, f"text {number}"))
    kept = sorted(c for c, count in counts.items() if count > min_count)
    if not kept:
        raise UserError(
            f"no character occurs more than min_count={min_count} times: lower "
            "config.data.min_count or give more text"
        )
    vocab = {token: i for i, token in enumerate([UNKNOWN, *kept])}
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}}
    record = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": split | {"behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": UNKNOWN},
    }
    return HFTokenizer(json.dumps(record, ensure_ascii=False))
