# SPDX-License-Identifier: Apache-2.0
"""Measures of a set of texts, alone or against others; pure functions of strings.

None of them says alone how good a model is: a sampler that repeats one likely sentence
wins every likelihood, one that copies its training data wins every distance. They are
read together, beside the same figures of held-out text (`report`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Set
from math import log

import numpy as np
from jaxtyping import Float
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance

NGRAM = 4


def grams(text: str, n: int = NGRAM) -> list[tuple[str, ...]]:
    """The n-grams of a text's words, in order."""
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def all_grams(texts: Iterable[str], n: int = NGRAM) -> Iterator[tuple[str, ...]]:
    """The n-grams of all texts, one text after the other."""
    for text in texts:
        yield from grams(text, n)


def unigram_entropy(texts: Iterable[str]) -> float:
    """Entropy of the words' frequencies, nats: low where texts use few words."""
    counts = np.array(list(Counter(all_grams(texts, 1)).values()), float)
    return float(-sum(n / counts.sum() * log(n / counts.sum()) for n in counts))


def distinct(texts: list[str], n: int) -> float:
    """Different n-grams over all n-grams (distinct-n, arXiv:1510.03055); nan: none."""
    found = list(all_grams(texts, n))
    return len(set(found)) / len(found) if found else float("nan")


def repetition(texts: list[str], n: int = 2) -> float:
    """The share of n-grams that stood in the same text before; nan: none."""
    found = [grams(text, n) for text in texts]
    total = sum(map(len, found))
    again = total - sum(len(set(g)) for g in found)
    return again / total if total else float("nan")


def copied(texts: list[str], seen: Set[str]) -> float:
    """The share of texts that stand in `seen`, word for word."""
    return float(np.mean([text in seen for text in texts]))


def copied_grams(texts: list[str], seen: Set[tuple[str, ...]]) -> float:
    """The share of 4-grams that stand in `seen`; nan where the texts have none."""
    found = list(all_grams(texts))
    return float(np.mean([g in seen for g in found])) if found else float("nan")


def lengths(texts: list[str]) -> list[int]:
    """Words of each text."""
    return [len(text.split()) for text in texts]


def length_distance(texts: list[str], others: list[str]) -> float:
    """Wasserstein-1 distance between the histograms of lengths, in words."""
    return float(wasserstein_distance(lengths(texts), lengths(others)))


def energy_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased, in standard deviations of y.

    0 in the mean where both sets are of one distribution, and only there
    (Szekely and Rizzo 2013); single estimates may fall below 0.
    """
    scale = np.sqrt(np.sum(np.var(y, 0))) or 1.0

    def within(z: np.ndarray) -> float:
        n = len(z)
        return float(cdist(z, z).sum() / (n * (n - 1)))

    return float((2 * cdist(x, y).mean() - within(x) - within(y)) / scale)
