# SPDX-License-Identifier: Apache-2.0
"""Minimum Bayes risk: of many samples, the one most like the others."""

from collections.abc import Callable, Sequence

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from dlm_jax.errors import UserError

Utility = Callable[[str, str], float]  # (hypothesis, reference) -> how alike

_bleu = BLEU(
    effective_order=True, tokenize="none", smooth_method="add-k", smooth_value=1
)
_chrf = CHRF()

UTILITIES: dict[str, Utility] = {
    "bleu": lambda hypothesis, reference: (
        _bleu.sentence_score(hypothesis, [reference]).score
    ),
    "chrf": lambda hypothesis, reference: (
        _chrf.sentence_score(hypothesis, [reference]).score
    ),
}


def utilities(
    candidates: Sequence[str],
    *,
    utility: str | Utility = "bleu",
    published: bool = False,
) -> np.ndarray:
    """The mean utility of each candidate [n] against the others as references.

    utility: "bleu" (sentence BLEU-4 of the words, smoothed by 1), "chrf", from 0 to 100,
    or any function of (hypothesis, reference). published: the candidate is the
    reference of the others, as the paper's code has it (REFERENCE Q21).
    """
    if isinstance(candidates, str) or not len(candidates):
        raise UserError("mbr: give a list of one or more texts")
    if isinstance(utility, str):
        if utility not in UTILITIES:
            raise UserError(
                f"utility={utility!r}: choose one of {', '.join(UTILITIES)}"
            )
        utility = UTILITIES[utility]
    texts = sorted(set(candidates))  # equal texts cost one comparison
    counts = np.array([list(candidates).count(text) for text in texts], float)
    matrix = np.array([[utility(a, b) for b in texts] for a in texts])
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
    """The candidate of the greatest mean utility; of equals, the first. See `utilities`.

    arXiv:2205.14217 section 5.3 chooses one of 50 samples so.
    """
    return candidates[
        int(np.argmax(utilities(candidates, utility=utility, published=published)))
    ]
