# SPDX-License-Identifier: Apache-2.0
"""The embedded corpus: a probabilistic grammar whose every question has an exact answer.

The language is that of `restaurant.pcfg`: finite, and with one derivation a text, so the
probability of a text is that of its derivation, and the entropy of the texts is that of
the derivations. Texts are tokens parted by single spaces; START, END and padding are the
tokenizer's and appear only in `entropy`, which says so. Every word has one tag.

Parsing is nltk's; it is imported late, since sampling starts every run and needs none.
"""

import bisect
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import nltk

START = "Text"
FIELDS = ("NAME", "TYPE", "FOOD", "PRICE", "RATING", "AREA", "FAMILY", "NEAR")
BLOCK = 4096  # texts whose uniform numbers are drawn at a time

Rules = dict[str, list[tuple[tuple[str, ...], float]]]


@functools.cache
def source() -> str:
    """The grammar file, in nltk's PCFG notation."""
    return Path(__file__).with_name("restaurant.pcfg").read_text(encoding="utf-8")


@functools.cache
def rules() -> Rules:
    """Nonterminal -> its alternatives (symbols, probability). A word keeps its quotes."""
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
    """What a symbol pushes on the stack, last first: words, and choices (cum, pushes)."""
    if symbol.startswith("'"):
        return [symbol.strip("'")]
    alternatives, probabilities = zip(*rules()[symbol], strict=True)
    pushes = [
        [item for part in reversed(parts) for item in _compiled(part)]
        for parts in alternatives
    ]
    if len(pushes) == 1:
        return pushes[0]
    # the last bound is left out: rounding in the sum must not let a draw pass it
    return [(list(itertools.accumulate(probabilities))[:-1], pushes)]


@functools.cache
def _choices(symbol: str) -> int:
    """The most choices that a derivation of the symbol takes."""
    if symbol.startswith("'"):
        return 0
    most = max(sum(map(_choices, parts)) for parts, _ in rules()[symbol])
    return most + (len(rules()[symbol]) > 1)


def _expand(draws: list[float]) -> str:
    """The text of one derivation; `draws` are uniform numbers in [0, 1)."""
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
    """n texts drawn from the grammar, without specials.

    Text i has its own row of one stream of `numpy.random.default_rng(seed)`, so
    sample(seed, n)[:k] == sample(seed, k); other seeds are independent splits.
    """
    rng, width, texts = np.random.default_rng(seed), _choices(START), []
    for start in range(0, n, BLOCK):
        rows = rng.random((min(BLOCK, n - start), width)).tolist()
        texts += map(_expand, rows)
    return texts


def trees(seed: int, n: int) -> list["nltk.Tree"]:
    """The derivations of `sample(seed, n)`, from the same numbers: no parsing."""
    rng, width = np.random.default_rng(seed), _choices(START)
    found = []
    for start in range(0, n, BLOCK):
        rows = rng.random((min(BLOCK, n - start), width)).tolist()
        found += [_grow(START, iter(row)) for row in rows]
    return found


def _grow(symbol: str, draws: Iterator[float]) -> "nltk.Tree":
    """The derivation of a symbol; choices come in the order of the text."""
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
    """Entropy (nats) and expected length (tokens) of what a symbol derives.

    H(A) = sum_r p_r (-ln p_r + sum_{B in r} H(B)), and likewise the length.
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
    """Entropy of the language in nats, exact: (per text, per token with END as one)."""
    nats, tokens = _moments(START)
    return nats, nats / (tokens + 1)


@functools.cache
def word_tags() -> dict[str, str]:
    """Word -> its universal part-of-speech tag; the grammar gives each word one."""
    return {
        symbol.strip("'"): left.split("_")[0]
        for left, alternatives in rules().items()
        for parts, _ in alternatives
        for symbol in parts
        if symbol.startswith("'")
    }


def words() -> list[str]:
    """All word types of the language, sorted."""
    return sorted(word_tags())


# ---- parsing -------------------------------------------------------------------------


@functools.cache
def _length(symbol: str, bound: Callable) -> int:
    """The least (bound=min) or greatest (max) number of tokens a symbol derives."""
    if symbol.startswith("'"):
        return 1
    sums = (sum(_length(part, bound) for part in parts) for parts, _ in rules()[symbol])
    return bound(sums)


def lengths() -> tuple[int, int]:
    """The least and the greatest number of tokens of a text, without specials."""
    return _length(START, min), _length(START, max)


@functools.cache
def _parser():
    """nltk's chart parser for the grammar file."""
    import nltk

    grammar = nltk.PCFG.fromstring(source())
    # no time limit, which counts the time of whatever else runs
    return nltk.parse.BottomUpLeftCornerChartParser(grammar, max_time=None)


def derivations(text: str) -> list["nltk.Tree"]:
    """All derivations of a text: one, or none outside the language."""
    tokens = text.split(" ")
    least, greatest = lengths()  # a chart takes cubic time: long strings stay outside
    if not least <= len(tokens) <= greatest or not word_tags().keys() >= set(tokens):
        return []
    return [tree.freeze() for tree in _parser().parse(tokens)]


@functools.lru_cache(maxsize=4096)
def _derivation(text: str) -> "nltk.Tree | None":
    return next(iter(derivations(text)), None)


def accepts(text: str) -> bool:
    """Whether a text, without specials, is in the language; False for any other str."""
    return _derivation(text) is not None


def parse(text: str) -> "nltk.Tree":
    """The one derivation of a text (an immutable tree). Raises ValueError outside."""
    tree = _derivation(text)
    if tree is None:
        raise ValueError(f"not in the language of restaurant.pcfg: {text!r}")
    return tree


@functools.cache
def _log_rules() -> dict[tuple[str, tuple[str, ...]], float]:
    """(left side, right side) of a rule -> the log of its probability, nats."""
    return {
        (left, parts): math.log(p)
        for left, alternatives in rules().items()
        for parts, p in alternatives
    }


def log_prob(text: str) -> float:
    """Log probability of a text in nats, END not counted; -inf outside the language."""
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
    """Universal part-of-speech tag of each token. Raises ValueError outside."""
    return tags_of(parse(text))


def tags_of(tree: "nltk.Tree") -> list[str]:
    """Universal part-of-speech tag of each token of a derivation."""
    return [label.split("_")[0] for _, label in tree.pos()]


def spans_of(tree: "nltk.Tree") -> list[tuple[int, int, str]]:
    """(first, last, label) of every constituent over the words' tags, first to last.

    The label is the nonterminal without its suffix; a chain of single children is one
    constituent, its labels joined by "::".
    """
    found: list[tuple[int, int, str]] = []

    def visit(node: Any, first: int, above: str) -> int:
        label = node.label().split("_")[0]
        label = f"{above}::{label}" if above else label
        if len(node) == 1 and not isinstance(node[0], str) and node[0].height() > 2:
            return visit(node[0], first, label)
        found.append((first, first + len(node.leaves()) - 1, label))
        for child in node:
            if isinstance(child, str) or child.height() == 2:
                first += 1  # a word, or its tag
            else:
                first = visit(child, first, "")
        return first

    visit(tree, 0, "")
    return found


def derivable_spans(text: str) -> set[tuple[int, int, str]]:
    """(first, last, label) of whatever the grammar derives from words of a text.

    Also of a text outside the language, as a parser that always answers would find it:
    labels as in `spans_of`, but with each name of a chain on its own.
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
    """Field -> the words that state it, or yes/no for family. Raises ValueError outside.

    `fields("The Eagle is a cheap pub near Café Sicilia .")` is
    `{"name": "The Eagle", "price": "cheap", "type": "pub", "near": "Café Sicilia"}`.
    """
    return fields_of(parse(text))


def fields_of(tree: "nltk.Tree") -> dict[str, str]:
    """Field -> the words that state it, of a derivation; see `fields`."""
    found = {}
    for node in tree.subtrees():
        field, _, kind = node.label().partition("_")
        if field == "FAMILY":
            found["family"] = kind.split("_")[0].lower()
        elif field in FIELDS:
            found[field.lower()] = " ".join(node.leaves())
    return found
