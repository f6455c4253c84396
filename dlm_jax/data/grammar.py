# SPDX-License-Identifier: Apache-2.0
"""The built-in corpus: a probabilistic grammar with exact probabilities and labels.

The language of `restaurant.pcfg` is finite and every text has exactly one derivation.
Hence the probability of a text is that of its derivation, and the entropy of the texts
is that of the derivations. A text is tokens separated by single spaces, without START,
END and PAD; only `entropy` counts END. Every word has exactly one tag.

nltk parses. It is imported on first use, because sampling does not need it.
"""

import bisect
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm_jax.data import inside_outside

if TYPE_CHECKING:
    import nltk

START = "Text"
FIELDS = ("NAME", "TYPE", "FOOD", "PRICE", "RATING", "AREA", "FAMILY", "NEAR")
BLOCK = 4096  # texts per draw of uniform numbers

Rules = dict[str, list[tuple[tuple[str, ...], float]]]


@functools.cache
def source() -> str:
    """Returns the text of the grammar file, in nltk's PCFG notation."""
    return Path(__file__).with_name("restaurant.pcfg").read_text(encoding="utf-8")


@functools.cache
def rules() -> Rules:
    """Returns {nonterminal: [(symbols, probability)]}; words keep their quotes."""
    table: Rules = {}
    for line in source().splitlines():
        if "->" in line and not line.startswith("#"):
            left, right = line.split(" -> ")
            for symbols, p in re.findall(r"([^\[|]+) \[([\d.]+)\]", right):
                table.setdefault(left, []).append((tuple(symbols.split()), float(p)))
    return table


# ---- sampling ------------------------------------------------------------------------


@functools.cache
def _compiled(symbol: str) -> list:
    """Returns what a symbol pushes on the stack, last item first.

    An item is a word, or a choice: (cumulative probabilities, pushes per alternative).
    """
    if symbol.startswith("'"):
        return [symbol.strip("'")]
    alternatives, probabilities = zip(*rules()[symbol], strict=True)
    pushes = [
        [item for part in reversed(parts) for item in _compiled(part)]
        for parts in alternatives
    ]
    if len(pushes) == 1:
        return pushes[0]
    # the last bound is omitted: if it rounds below 1, a draw must not exceed it
    return [(list(itertools.accumulate(probabilities))[:-1], pushes)]


@functools.cache
def _choices(symbol: str) -> int:
    """Returns the largest number of choices in a derivation of the symbol."""
    if symbol.startswith("'"):
        return 0
    most = max(sum(map(_choices, parts)) for parts, _ in rules()[symbol])
    return most + (len(rules()[symbol]) > 1)


def _expand(draws: list[float]) -> str:
    """Returns the text of one derivation. draws: uniform numbers in [0, 1)."""
    stack, words, draw = list(_compiled(START)), [], iter(draws)
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            words.append(item)
        else:
            bounds, pushes = item
            stack += pushes[bisect.bisect_right(bounds, next(draw))]
    return " ".join(words)


def sample(seed: int, n: int) -> list[str]:
    """Samples n texts from the grammar, without START and END.

    Text i uses row i of the numbers from `numpy.random.default_rng(seed)`, so
    sample(seed, n)[:k] == sample(seed, k). Other seeds give independent splits.
    """
    rng, width, texts = np.random.default_rng(seed), _choices(START), []
    for start in range(0, n, BLOCK):
        rows = rng.random((min(BLOCK, n - start), width)).tolist()
        texts += map(_expand, rows)
    return texts


def trees(seed: int, n: int) -> list["nltk.Tree"]:
    """Returns the derivations of `sample(seed, n)`, drawn alike rather than parsed."""
    rng, width = np.random.default_rng(seed), _choices(START)
    derived = []
    for start in range(0, n, BLOCK):
        rows = rng.random((min(BLOCK, n - start), width)).tolist()
        derived += [_grow(START, iter(row)) for row in rows]
    return derived


def _grow(symbol: str, draws: Iterator[float]) -> "nltk.Tree":
    """Samples a derivation of a symbol, making its choices in the order of the text."""
    import nltk

    alternatives, probabilities = zip(*rules()[symbol], strict=True)
    bounds = list(itertools.accumulate(probabilities))[:-1]
    index = bisect.bisect_right(bounds, next(draws)) if bounds else 0
    children = [
        part.strip("'") if part.startswith("'") else _grow(part, draws)
        for part in alternatives[index]
    ]
    return nltk.tree.ImmutableTree(symbol, children)


# ---- exact answers -------------------------------------------------------------------


@functools.cache
def _moments(symbol: str) -> tuple[float, float]:
    """Returns the entropy (nats) and the expected length (tokens) of a symbol's texts.

    H(A) = sum_r p_r (-ln p_r + sum_{B in r} H(B)); the length is computed likewise.
    """
    if symbol.startswith("'"):
        return 0.0, 1.0
    nats = tokens = 0.0
    for parts, p in rules()[symbol]:
        inner = [_moments(part) for part in parts]
        nats += p * (sum(h for h, _ in inner) - math.log(p))
        tokens += p * sum(length for _, length in inner)
    return nats, tokens


def entropy() -> tuple[float, float]:
    """Returns the exact entropy in nats: (per text, per token, END being a token)."""
    nats, tokens = _moments(START)
    return nats, nats / (tokens + 1)


@functools.cache
def word_tags() -> dict[str, str]:
    """Returns {word: its universal part-of-speech tag}; every word has exactly one."""
    return {
        symbol.strip("'"): left.split("_")[0]
        for left, alternatives in rules().items()
        for parts, _ in alternatives
        for symbol in parts
        if symbol.startswith("'")
    }


def words() -> list[str]:
    """Returns all distinct words of the language, sorted."""
    return sorted(word_tags())


@functools.cache
def _chart(tokens: tuple[str, ...], longest: int) -> inside_outside.Chart:
    missing = set(words()) - set(tokens)
    if missing:
        raise ValueError(f"the vocabulary lacks {sorted(missing)[0]!r} of the grammar")
    ids = {token: i for i, token in enumerate(tokens)}
    return inside_outside.make_chart(rules(), START, ids, longest)


def posterior(
    scores: np.ndarray, tokens: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns p(token | scores) [b l v] under the grammar, and log of the evidence [b].

    scores [b l v]: log-likelihood in nats of each token at each position, up to a
    constant per position; for x_t it is `model.token_posterior_logits`. tokens: the
    token of each id, as in `Tokenizer.tokens()`. Then p @ table is E[x_0 | x_t], the
    denoiser that no network can beat. The evidence is sum_text p(text) exp(scores).
    Raises ValueError if a word of the grammar is no token.
    """
    chart = _chart(tuple(tokens), np.shape(scores)[1] - 2)
    return inside_outside.posterior(scores, chart)


# ---- parsing -------------------------------------------------------------------------


@functools.cache
def _length(symbol: str, bound: Callable) -> int:
    """Returns the minimum (bound=min) or maximum (max) number of tokens of a symbol."""
    if symbol.startswith("'"):
        return 1
    sums = (sum(_length(part, bound) for part in parts) for parts, _ in rules()[symbol])
    return bound(sums)


def lengths() -> tuple[int, int]:
    """Returns the minimum and maximum tokens per text, without START and END."""
    return _length(START, min), _length(START, max)


@functools.cache
def _parser():
    """Returns nltk's chart parser for the grammar."""
    import nltk

    grammar = nltk.PCFG.fromstring(source())
    # no time limit: nltk counts wall-clock time, which a busy machine stretches
    return nltk.parse.BottomUpLeftCornerChartParser(grammar, max_time=None)


def derivations(text: str) -> list["nltk.Tree"]:
    """Returns all derivations of a text: one, or none if it is not in the language."""
    tokens = text.split(" ")
    shortest, longest = lengths()  # parsing takes cubic time: skip what is too long
    if not shortest <= len(tokens) <= longest or not word_tags().keys() >= set(tokens):
        return []
    return [tree.freeze() for tree in _parser().parse(tokens)]


@functools.lru_cache(maxsize=4096)
def _derivation(text: str) -> "nltk.Tree | None":
    return next(iter(derivations(text)), None)


def accepts(text: str) -> bool:
    """Returns whether a text, without START and END, is in the language."""
    return _derivation(text) is not None


def parse(text: str) -> "nltk.Tree":
    """Returns the derivation of a text; ValueError if it is not in the language."""
    tree = _derivation(text)
    if tree is None:
        raise ValueError(f"not in the language of restaurant.pcfg: {text!r}")
    return tree


@functools.cache
def _log_rules() -> dict[tuple[str, tuple[str, ...]], float]:
    """Returns {(left side, right side): log probability of the rule, in nats}."""
    return {
        (left, parts): math.log(p)
        for left, alternatives in rules().items()
        for parts, p in alternatives
    }


def log_prob(text: str) -> float:
    """Returns log p(text) in nats, without END; -inf if it is not in the language."""
    tree = _derivation(text)
    if tree is None:
        return -math.inf
    return sum(
        _log_rules()[
            node.label(),
            tuple(f"'{c}'" if isinstance(c, str) else c.label() for c in node),
        ]
        for node in tree.subtrees()
    )


def tags(text: str) -> list[str]:
    """Returns the universal part-of-speech tag of each token. ValueError as `parse`."""
    return tags_of(parse(text))


def tags_of(tree: "nltk.Tree") -> list[str]:
    """Returns the universal part-of-speech tag of each token of a derivation."""
    return [label.split("_")[0] for _, label in tree.pos()]


def spans_of(tree: "nltk.Tree") -> list[tuple[int, int, str]]:
    """Returns (first, last, label) of every constituent above the tags.

    first and last are word indices from 0, both inclusive. The label is the nonterminal
    without its suffix. A chain of single children is one constituent, with its labels
    joined by "::".
    """
    spans: list[tuple[int, int, str]] = []

    def visit(node: Any, first: int, above: str) -> int:
        label = node.label().split("_")[0]
        label = f"{above}::{label}" if above else label
        if len(node) == 1 and not isinstance(node[0], str) and node[0].height() > 2:
            return visit(node[0], first, label)
        spans.append((first, first + len(node.leaves()) - 1, label))
        for child in node:
            if isinstance(child, str) or child.height() == 2:
                first += 1  # a word or a tag
            else:
                first = visit(child, first, "")
        return first

    visit(tree, 0, "")
    return spans


def derivable_spans(text: str) -> set[tuple[int, int, str]]:
    """Returns (first, last, label) of every span of a text that the grammar derives.

    The text need not be in the language. Labels are those of `spans_of`, except that
    the labels of a chain are separate spans.
    """
    tokens = text.split()
    if not tokens or not word_tags().keys() >= set(tokens):
        return set()
    return {
        (edge.start(), edge.end() - 1, str(edge.lhs()).split("_")[0])
        for edge in _parser().chart_parse(tokens).edges()
        if edge.is_complete() and not isinstance(edge.lhs(), str)
    }


def fields(text: str) -> dict[str, str]:
    """Returns {field: the words that state it}; "yes" or "no" for family.

    Raises ValueError if the text is not in the language. For example,
    `fields("The Eagle is a cheap pub near Café Sicilia .")` is
    `{"name": "The Eagle", "price": "cheap", "type": "pub", "near": "Café Sicilia"}`.
    """
    return fields_of(parse(text))


def fields_of(tree: "nltk.Tree") -> dict[str, str]:
    """Returns the fields that a derivation states; see `fields`."""
    stated = {}
    for node in tree.subtrees():
        field, _, kind = node.label().partition("_")
        if field == "FAMILY":
            stated["family"] = kind.split("_")[0].lower()
        elif field in FIELDS:
            stated[field.lower()] = " ".join(node.leaves())
    return stated
