# SPDX-License-Identifier: Apache-2.0
"""The inside-outside algorithm for a finite grammar, over soft word scores.

Each token v at position i of a row has a score: a log-likelihood in nats, up to a
constant per position. A text, with START, END and PAD as in training, then has the
weight p(text) exp(sum of its scores). `posterior` sums these weights over all texts of
the language at once. The inside pass computes the sums bottom-up for every symbol, start
and number of words; its derivative, the outside pass, is the posterior of each token.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dlm_jax.types import END, PAD, START

# scores lie at most this far below the largest of all texts' sums: exp stays positive
MOST_NATS = 600.0

Rules = Mapping[str, Sequence[tuple[tuple[str, ...], float]]]


class Chart(NamedTuple):
    """The program of the inside pass. A node is a symbol (or a rule's prefix) and length.

    leaves: (node, token ids [k], probabilities [k]) of symbols of one word. steps:
    (target, source, weight) adds a multiple of a node; (target, left, words of left,
    right) adds the product of neighbours. roots: the node of the texts of n words.
    """

    leaves: list[tuple[int, np.ndarray, np.ndarray]]
    steps: list[tuple]
    roots: dict[int, int]
    nodes: int


def make_chart(rules: Rules, start: str, ids: Mapping[str, int], longest: int) -> Chart:
    """Compiles the rules of a grammar without recursion, for texts of up to `longest` words.

    ids: the token id of each word. Words stand in quotes in `rules`.
    """
    leaves, steps, made, count = [], [], {}, [0]

    def new() -> int:
        count[0] += 1
        return count[0] - 1

    def leaf(words: Sequence[str], probabilities: Sequence[float]) -> dict[int, int]:
        node = new()
        tokens = np.array([ids[word.strip("'")] for word in words])
        leaves.append((node, tokens, np.array(probabilities)))
        return {1: node}

    def sequence(parts: Sequence[str]) -> dict[int, int]:
        """Returns the node of a sequence of symbols for each number of words."""
        left = nodes(parts[0])
        for part in parts[1:]:
            joined: dict[int, int] = {}
            for k, a in left.items():
                for m, b in nodes(part).items():
                    if k + m <= longest:
                        if k + m not in joined:
                            joined[k + m] = new()
                        steps.append((joined[k + m], a, k, b))
            left = joined
        return left

    def nodes(symbol: str) -> dict[int, int]:
        """Returns the node of a symbol for each number of words."""
        if symbol in made:
            return made[symbol]
        if symbol.startswith("'"):
            made[symbol] = leaf([symbol], [1.0])
        elif all(len(p) == 1 and p[0].startswith("'") for p, _ in rules[symbol]):
            words, probabilities = zip(*rules[symbol], strict=True)
            made[symbol] = leaf([w for (w,) in words], probabilities)
        else:
            total: dict[int, int] = {}
            for parts, p in rules[symbol]:
                for k, a in sequence(parts).items():
                    if k not in total:
                        total[k] = new()
                    steps.append((total[k], a, p))
            made[symbol] = total
        return made[symbol]

    return Chart(leaves, steps, dict(nodes(start)), count[0])


def _inside(chart: Chart, e: np.ndarray) -> np.ndarray:
    """Computes the weight of every node at every first position [node l+1 b].

    e [l v b]: exp of the scores.
    """
    length, _, rows = e.shape
    value = np.zeros((chart.nodes, length + 1, rows))
    for node, tokens, p in chart.leaves:
        value[node, :length] = np.tensordot(p, e[:, tokens], (0, 1))
    for target, source, *rest in chart.steps:
        if len(rest) == 1:
            value[target] += rest[0] * value[source]
        else:
            k, right = rest
            value[target, : length + 1 - k] += (
                value[source, : length + 1 - k] * value[right, k:]
            )
    return value


def _outside(
    chart: Chart, value: np.ndarray, slope: np.ndarray, e: np.ndarray
) -> np.ndarray:
    """Computes d log(total) / d score of the words [l v b]; slope: of the roots."""
    length = len(e)
    for target, source, *rest in reversed(chart.steps):
        if len(rest) == 1:
            slope[source] += rest[0] * slope[target]
        else:
            k, right = rest
            own = slope[target, : length + 1 - k]
            slope[source, : length + 1 - k] += own * value[right, k:]
            slope[right, k:] += own * value[source, : length + 1 - k]
    gradient = np.zeros_like(e)
    for node, tokens, p in chart.leaves:
        for token, q in zip(tokens, p, strict=True):
            gradient[:, token] += q * slope[node, :length] * e[:, token]
    return gradient


def posterior(scores: np.ndarray, chart: Chart) -> tuple[np.ndarray, np.ndarray]:
    """Returns p(token at each position | scores) [b l v] and log of the total weight [b].

    scores [b l v], nats. A score counts at most 600 / l nats below the largest of its
    position, which keeps the sums above zero in float64.
    """
    scores = np.asarray(scores, np.float64)
    _, length, _ = scores.shape
    largest = scores.max(-1, keepdims=True)
    score = np.maximum(scores - largest, -MOST_NATS / length).transpose(1, 2, 0)
    e = np.exp(score)
    value = _inside(chart, e)
    sizes = sorted(n for n in chart.roots if n + 2 <= length)
    after = np.cumsum(score[::-1, PAD], 0)[::-1]  # the scores of PAD from a position on
    after = np.concatenate([after, np.zeros_like(after[:1])])
    roots = np.stack([value[chart.roots[n], 1] for n in sizes])
    logs = np.log(roots + 1e-300) + np.stack(
        [score[n + 1, END] + after[n + 2] for n in sizes]
    )
    top = logs.max(0)
    weights = np.exp(logs - top)
    total = top + np.log(weights.sum(0)) + score[0, START]
    weights /= weights.sum(0)  # p(number of words | scores)
    slope = np.zeros_like(value)
    for n, root, weight in zip(sizes, roots, weights, strict=True):
        slope[chart.roots[n], 1] = weight / (root + 1e-300)
    p = _outside(chart, value, slope, e)
    p[0, START] = 1.0
    for n, weight in zip(sizes, weights, strict=True):
        p[n + 1, END] += weight
        p[n + 2 :, PAD] += weight
    p = p.transpose(2, 0, 1)
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    return p, total + largest.sum((1, 2))
