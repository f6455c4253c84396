# SPDX-License-Identifier: Apache-2.0
"""The grammar: one derivation a text, exact probabilities, texts as promised."""

import functools
import itertools
import math
import random

import numpy as np
import pytest

from dlm_jax.data import grammar

EAGLE = "The Eagle is a cheap pub near Café Sicilia ."
TAGS = "DET PROPN AUX DET ADJ NOUN ADP PROPN PROPN PUNCT"
UPOS = {"ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "NOUN", "NUM", "PART", "PRON"}
UPOS |= {"PROPN", "PUNCT", "VERB"}


@pytest.fixture(scope="module")
def texts():
    return grammar.sample(0, 300)


# ---- one derivation a text, proved for the whole language ----------------------------


class Positions:
    """Glushkov's automaton of a finite grammar: its states are the word occurrences.

    Every use of a nonterminal is expanded apart, so a derivation is a path. `follow`
    holds the states after each state, state 0 being the start; `word` its word.
    """

    def __init__(self, rules, start):
        self.rules, self.word, self.follow = rules, [None], [[]]
        first, self.last = self.expand(start)
        self.follow[0] = first

    def expand(self, symbol):
        """First and last states of a fresh expansion of the symbol."""
        if symbol.startswith("'"):
            self.word.append(symbol.strip("'"))
            self.follow.append([])
            return [len(self.word) - 1], [len(self.word) - 1]
        first, last = [], []
        for parts, _ in self.rules[symbol]:
            ends = [self.expand(part) for part in parts]
            for (_, before), (after, _) in itertools.pairwise(ends):
                for state in before:
                    self.follow[state] += after
            first += ends[0][0]
            last += ends[-1][1]
        return first, last

    def by_word(self, state):
        groups = {}
        for after in self.follow[state]:
            groups.setdefault(self.word[after], []).append(after)
        return groups


def ambiguous(rules, start):
    """Whether some text has two derivations: two paths that part and end together.

    Every state lies on some path, so it is enough to start where a state has two
    followers with one word, and to walk the pairs of states that read the same words.
    """
    auto = Positions(rules, start)
    after = [auto.by_word(state) for state in range(len(auto.word))]
    last = set(auto.last)
    pairs = {
        pair
        for groups in after
        for states in groups.values()
        for pair in itertools.combinations(states, 2)
    }
    stack = list(pairs)
    while stack:
        p, q = stack.pop()
        if p in last and q in last:
            return True
        for word in after[p].keys() & after[q].keys():
            for r, s in itertools.product(after[p][word], after[q][word]):
                if r == s:
                    return True
                pair = (min(r, s), max(r, s))
                if pair not in pairs:
                    pairs.add(pair)
                    stack.append(pair)
    return False


def test_no_text_has_two_derivations():
    assert not ambiguous(grammar.rules(), grammar.START)


@pytest.mark.parametrize(
    "rules",
    [
        {"S": [(("A", "'x'"), 1.0)], "A": [(("'a'",), 0.5), (("'a'",), 0.5)]},
        {"S": [(("A",), 0.5), (("'a'", "'b'"), 0.5)], "A": [(("'a'", "'b'"), 1.0)]},
        {
            "S": [(("A", "B"), 1.0)],
            "A": [(("'a'",), 0.5), (("'a'", "'b'"), 0.5)],
            "B": [(("'b'", "'c'"), 0.5), (("'c'",), 0.5)],
        },
    ],
)
def test_two_derivations_are_found(rules):
    assert ambiguous(rules, "S")


def test_samples_have_one_derivation(texts):
    assert {len(grammar.derivations(text)) for text in texts} == {1}


# ---- probabilities -------------------------------------------------------------------


def test_rules_are_distributions_and_nltk_reads_the_same():
    import nltk

    ours = {
        (left, parts): p for left, rows in grammar.rules().items() for parts, p in rows
    }
    theirs = {
        (
            str(rule.lhs()),
            tuple(f"'{s}'" if isinstance(s, str) else str(s) for s in rule.rhs()),
        ): rule.prob()
        for rule in nltk.PCFG.fromstring(grammar.source()).productions()
    }
    assert ours == theirs
    assert len(ours) == sum(map(len, grammar.rules().values()))
    for left, rows in grammar.rules().items():
        assert math.isclose(sum(p for _, p in rows), 1.0, abs_tol=1e-12), left


def test_log_prob_is_the_product_along_the_derivation():
    choices = [
        0.1,  # Text -> First_tdl .
        0.4 * 0.5 * 0.3,  # NAME is Venue_d Loc; Adj_d; Adj_p
        0.3 * 0.2,  # The Eagle
        0.6 * 0.6 * 0.7,  # "a", one word, cheap
        0.75 * 0.4,  # pub
        0.5 * 0.6 * 0.45 * 0.35,  # near, Café Sicilia
    ]
    assert math.isclose(grammar.log_prob(EAGLE), math.log(math.prod(choices)))


def test_probabilities_of_all_texts_of_a_phrase_sum_to_one():
    @functools.cache
    def language(symbol):
        """{string: probability} of all that the symbol derives."""
        if symbol.startswith("'"):
            return {symbol.strip("'"): 1.0}
        found = {}
        for parts, p in grammar.rules()[symbol]:
            for combo in itertools.product(*(language(part).items() for part in parts)):
                string = " ".join(word for word, _ in combo)
                assert string not in found, f"{symbol} derives {string!r} twice"
                found[string] = p * math.prod(q for _, q in combo)
        return found

    for symbol in ("NAME", "Loc", "Meal", "Adj_d", "Adj_dr", "Has_r", "Then_p"):
        strings = language(symbol)
        nats = -sum(p * math.log(p) for p in strings.values())
        assert math.isclose(sum(strings.values()), 1.0)
        assert math.isclose(nats, grammar._moments(symbol)[0])


def test_entropy_agrees_with_samples():
    nats = -np.array([grammar.log_prob(text) for text in grammar.sample(1, 1000)])
    per_text, per_token = grammar.entropy()
    assert abs(nats.mean() - per_text) < 5 * nats.std() / math.sqrt(len(nats))
    sizes = np.array([len(text.split()) + 1 for text in grammar.sample(1, 10_000)])
    error = abs(sizes.mean() - per_text / per_token)
    assert error < 5 * sizes.std() / math.sqrt(len(sizes))
    assert 10 < per_text < 20


@pytest.mark.parametrize("word", ["Located", "Aromi", "Eagle", "called", "bistro"])
def test_frequencies_are_the_rules(word):
    @functools.cache
    def expected(symbol):
        """How often the symbol derives the word; of these words, once a text at most."""
        if symbol.startswith("'"):
            return float(symbol == f"'{word}'")
        rows = grammar.rules()[symbol]
        return sum(p * sum(map(expected, parts)) for parts, p in rows)

    p, n = expected(grammar.START), 20_000
    share = sum(word in text.split() for text in grammar.sample(2, n)) / n
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)


# ---- texts ---------------------------------------------------------------------------


def test_the_quoted_text():
    assert grammar.accepts(EAGLE)
    assert grammar.tags(EAGLE) == TAGS.split()
    assert grammar.fields(EAGLE) == {
        "name": "The Eagle",
        "price": "cheap",
        "type": "pub",
        "near": "Café Sicilia",
    }


def test_fields_of_two_sentences():
    text = (
        "Located in the old town , Aromi is an Italian coffee shop . "
        "It does not welcome families and has prices under £20 ."
    )
    assert grammar.fields(text) == {
        "area": "old town",
        "name": "Aromi",
        "food": "Italian",
        "type": "coffee shop",
        "family": "no",
        "price": "under £20",
    }
    text = "Blue Spice serves French food and is family friendly ."
    assert grammar.fields(text)["family"] == "yes"
    text = "The Mill serves cheap meals and has a customer rating of 5 out of 5 ."
    assert grammar.fields(text)["rating"] == "5 out of 5"


def test_lengths_are_bounds_of_all_texts():
    assert grammar.lengths() == (8, 30)
    sizes = [len(text.split(" ")) for text in grammar.sample(3, 20_000)]
    assert min(sizes) == 8
    assert 28 <= max(sizes) <= 30


def test_every_plan_tells_the_name_once_and_no_field_twice():
    @functools.cache
    def count(symbol, field, bound):
        """The least or greatest number of times the symbol tells the field."""
        if symbol.startswith("'") or symbol.split("_")[0] == field:
            return int(not symbol.startswith("'"))
        rows = grammar.rules()[symbol]
        return bound(sum(count(s, field, bound) for s in parts) for parts, _ in rows)

    assert count(grammar.START, "NAME", min) == 1
    for field in grammar.FIELDS:
        assert count(grammar.START, field, max) == 1
        assert field == "NAME" or count(grammar.START, field, min) == 0


def test_articles_agree_everywhere():
    auto = Positions(grammar.rules(), grammar.START)
    seen = set()
    for word, follow in zip(auto.word, auto.follow, strict=True):
        if word in ("a", "an"):
            for after in follow:
                seen.add(word)
                assert (auto.word[after][0] in "aeiouAEIOU") == (word == "an")
    assert seen == {"a", "an"}


def test_words_and_tags(texts):
    words = grammar.words()
    assert 80 <= len(words) <= 150
    assert {w for t in grammar.sample(4, 20_000) for w in t.split(" ")} == set(words)
    for left, rows in grammar.rules().items():  # one tag a word; only tags hold words
        for parts, _ in rows:
            for part in parts:
                if part.startswith("'"):
                    assert len(parts) == 1
                    assert left.split("_")[0] in UPOS
                    assert grammar.word_tags()[part.strip("'")] == left.split("_")[0]
    for text in texts[:50]:
        assert grammar.tags(text) == [grammar.word_tags()[w] for w in text.split(" ")]
        assert grammar.parse(text).leaves() == text.split(" ")


# ---- outside the language ------------------------------------------------------------


def test_junk_is_rejected():
    junk = [
        "",
        " ",
        ".",
        "\n\0\ud800",
        "a " * 10_000,
        EAGLE.lower(),
        EAGLE + " ",
        EAGLE[:-2],
        EAGLE.replace(" ", "  "),
        EAGLE.replace("cheap", "splendid"),
        EAGLE.replace("a cheap", "an cheap"),
        f"{EAGLE} {EAGLE}",
        f"{EAGLE} It is near Avalon .",
        "START " + EAGLE,
    ]
    for text in junk:
        assert not grammar.accepts(text), text
        assert grammar.log_prob(text) == -math.inf
    with pytest.raises(ValueError, match="not in the language"):
        grammar.parse("a pub")


def test_damaged_texts_are_rejected(texts):
    rng = random.Random(0)
    for text in texts[:100]:
        tokens = text.split(" ")
        shuffled = rng.sample(tokens, len(tokens))
        for damaged in (shuffled, tokens[:-1], tokens[1:], tokens + tokens):
            assert damaged == tokens or not grammar.accepts(" ".join(damaged))


# ---- the stream ----------------------------------------------------------------------


def test_samples_are_a_stream_of_the_seed(monkeypatch):
    texts = grammar.sample(5, 5000)
    for k in (0, 1, 17, 4097):
        assert grammar.sample(5, k) == texts[:k]
    monkeypatch.setattr(grammar, "BLOCK", 100)
    assert grammar.sample(5, 250) == texts[:250]
    assert len(set(texts) & set(grammar.sample(6, 5000))) < 100


# ---- derivations of the sampled texts ------------------------------------------------


def test_trees_are_those_of_the_texts(texts):
    trees = grammar.trees(0, 60)
    assert [" ".join(tree.leaves()) for tree in trees] == texts[:60]
    assert trees == [grammar.parse(text) for text in texts[:60]]


def test_spans_of_a_derivation():
    spans = grammar.spans_of(grammar.parse(EAGLE))
    words = EAGLE.split()
    named = {label: " ".join(words[i : j + 1]) for i, j, label in spans}
    assert named["Text"] == EAGLE
    assert named["NAME"] == "The Eagle"
    assert named["TYPE"] == "pub"
    assert named["Loc::Near"] == "near Café Sicilia"
    assert named["NEAR"] == "Café Sicilia"
    assert len(set(spans)) == len(spans)  # a chain is one constituent


def test_spans_nest(texts):
    for tree in grammar.trees(0, 60):
        spans = [(i, j) for i, j, _ in grammar.spans_of(tree)]
        assert spans[0] == (0, len(tree.leaves()) - 1)
        for (i, j), (k, m) in itertools.combinations(spans, 2):
            assert j < k or m < i or (i <= k and m <= j) or (k <= i and j <= m)


def test_derived_holds_every_constituent_and_parts_of_broken_texts():
    for text in grammar.sample(3, 20):
        found = grammar.derivable_spans(text)
        for first, last, label in grammar.spans_of(grammar.parse(text)):
            assert all((first, last, name) in found for name in label.split("::"))
    assert (1, 2, "NEAR") in grammar.derivable_spans("pub Burger King")
    assert grammar.derivable_spans("zebra pub") == grammar.derivable_spans("") == set()
