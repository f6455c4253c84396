# SPDX-License-Identifier: Apache-2.0
"""Minimum Bayes risk: selects the sample that is most like the others."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dlm_jax.data.words import words
from dlm_jax.errors import UserError, choose

Utility = Callable[[str, str], float]  # (hypothesis, reference) -> similarity


@functools.cache
def _metrics() -> tuple[Any, Any]:
    from sacrebleu.metrics.bleu import BLEU  # late: sampling does without it
    from sacrebleu.metrics.chrf import CHRF

    smooth = {"smooth_method": "add-k", "smooth_value": 1}
    return BLEU(effective_order=True, tokenize="none", **smooth), CHRF()


def _spaced(text: str) -> str:
    return " ".join(words(text))


def _bleu(hypothesis: str, reference: str) -> float:
    bleu, _ = _metrics()
    return bleu.sentence_score(_spaced(hypothesis), [_spaced(reference)]).score


def _chrf(hypothesis: str, reference: str) -> float:
    _, chrf = _metrics()
    return chrf.sentence_score(hypothesis, [reference]).score


UTILITIES: dict[str, Utility] = {"bleu": _bleu, "chrf": _chrf}


def utilities(
    candidates: Sequence[str],
    *,
    utility: str | Utility = "bleu",
    published: bool = False,
) -> np.ndarray:
    """Computes the mean utility of each candidate [n], with the others as references.

    utility: "bleu" (sentence BLEU-4 of the words of `data.words`, smoothed by 1) or "chrf", from 0 to
    100, or any function of (hypothesis, reference). published: use the candidate as the
    reference of the others, as the published code does. Raises UserError.
    """
    none = isinstance(candidates, str) or not len(candidates)
    if none or not all(isinstance(text, str) for text in candidates):
        raise UserError("mbr: give a list of one or more texts")
    if isinstance(utility, str):
        score: Utility = choose("utility", UTILITIES, utility)
    else:
        score = utility
    texts = sorted(set(candidates))  # equal texts cost one comparison
    counts = np.array([list(candidates).count(text) for text in texts], float)
    matrix = np.array([[score(a, b) for b in texts] for a in texts])
    if published:
        matrix = matrix.T
    weights = counts[None] - np.eye(len(texts))  # a candidate is not its own reference
    means = (matrix * weights).sum(1) / max(len(candidates) - 1, 1)
    return np.array([means[texts.index(text)] for text in candidates])


def select(
    candidates: Sequence[str],
    *,
    utility: str | Utility = "bleu",
    published: bool = False,
) -> str:
    """Returns the candidate of the largest mean utility, the first one if several are.

    Options: those of `utilities`. arXiv:2205.14217 section 5.3 selects from 50 samples.
    """
    return candidates[
        int(np.argmax(utilities(candidates, utility=utility, published=published)))
    ]
