# SPDX-License-Identifier: Apache-2.0
"""Metrics of a set of texts, alone or against other texts: pure functions of strings.

No metric alone ranks models: a sampler that repeats one likely sentence wins every
likelihood, and one that copies its training data wins every distance. Read them
together, next to the same metrics of held-out text (`report`). Words are those of
`data.words`: characters, in scripts without spaces.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Set
from math import log

import numpy as np
from jaxtyping import Float
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance

from dlm_jax.data.words import words

NGRAM = 4


def grams(text: str, n: int = NGRAM) -> list[tuple[str, ...]]:
    """Returns the n-grams of a text's words (`data.words`), in order."""
    units = words(text)
    return list(zip(*(units[i:] for i in range(n)), strict=False))


def all_grams(texts: Iterable[str], n: int = NGRAM) -> Iterator[tuple[str, ...]]:
    """Yields the n-grams of all texts, one text after the other."""
    for text in texts:
        yield from grams(text, n)


def unigram_entropy(texts: Iterable[str]) -> float:
    """Computes the entropy of word frequencies, nats; low if texts use few words."""
    return entropy(Counter(all_grams(texts, 1)).values())


def entropy(counts: Iterable[int]) -> float:
    """Computes the entropy of frequencies in proportion to counts, nats; 0 of none."""
    share = np.array(list(counts), float)
    share /= share.sum()
    return float(-sum(p * log(p) for p in share))


def distinct(texts: list[str], n: int) -> float:
    """Computes distinct n-grams over all n-grams (arXiv:1510.03055); nan if none."""
    ngrams = list(all_grams(texts, n))
    return len(set(ngrams)) / len(ngrams) if ngrams else float("nan")


def repetition(texts: list[str], n: int = 2) -> float:
    """Computes the share of n-grams that occur earlier in their text; nan if none."""
    ngrams = [grams(text, n) for text in texts]
    total = sum(map(len, ngrams))
    repeated = total - sum(len(set(g)) for g in ngrams)
    return repeated / total if total else float("nan")


def copied(texts: list[str], seen: Set[str]) -> float:
    """Computes the share of texts that are in `seen`, word for word."""
    return float(np.mean([text in seen for text in texts]))


def copied_grams(texts: list[str], seen: Set[tuple[str, ...]]) -> float:
    """Computes the share of 4-grams that are in `seen`; nan if the texts have none."""
    ngrams = list(all_grams(texts))
    return float(np.mean([g in seen for g in ngrams])) if ngrams else float("nan")


def lengths(texts: list[str]) -> list[int]:
    """Counts the words of each text."""
    return [len(words(text)) for text in texts]


def length_distance(texts: list[str], others: list[str]) -> float:
    """Computes the Wasserstein-1 distance between text lengths, in words."""
    return float(wasserstein_distance(lengths(texts), lengths(others)))


def energy_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """Computes 2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased, in units of std(y).

    Its expectation is 0 if both sets have the same distribution, and only then
    (Szekely and Rizzo 2013). A single estimate may be negative.
    """
    scale = np.sqrt(np.sum(np.var(y, 0))) or 1.0

    def within(z: np.ndarray) -> float:
        n = len(z)
        return float(cdist(z, z).sum() / (n * (n - 1)))

    return float((2 * cdist(x, y).mean() - within(x) - within(y)) / scale)
