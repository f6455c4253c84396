# SPDX-License-Identifier: Apache-2.0
"""Held-out targets of the control tasks, and the scorer that evaluates the texts.

Grammar sentences are drawn with a seed that training and validation never use. Other
targets come from the validation split or from the published target files.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlm_jax.data import annotations, files, grammar, sources
from dlm_jax.data.annotations import Fields, Spans
from dlm_jax.data.normalization import normalize
from dlm_jax.errors import UserError
from dlm_jax.inference.pipeline import DiffusionLM

TARGET_SEED = 2_000_003  # added to data.seed; training and validation never use it


class Sentence(NamedTuple):
    """A held-out text with its annotations; None where one is unknown."""

    text: str
    fields: Fields | None = None
    tags: list[str] | None = None
    spans: Spans | None = None


def has_phrase(value: str, text: str) -> bool:
    """Returns whether the words of value occur consecutively in text."""
    return f" {value} " in f" {text} "


class Scorer(NamedTuple):
    """Functions that extract from a text the properties to be scored.

    tags: the part-of-speech tag of each word. spans: (first, last, label) of each
    constituent of the parse. derived: those that can be derived over part of the text,
    even if the whole has no parse. nats(texts): -log p of each text [n]. If exact, it
    comes from the grammar and is infinite outside the language; otherwise it comes from
    an autoregressive model, or is nan without one.
    """

    tags: Callable[[str], list[str]]
    spans: Callable[[str], Spans]
    derived: Callable[[str], set]
    nats: Callable[[list[str]], np.ndarray]
    exact: bool = False


EDGES = ("START", "END", "\n")  # tokens of the published files that are not words


def annotate(tree: Any) -> Sentence:
    """Returns a derivation of the grammar as a sentence with all its annotations."""
    notes = (annotations.ANNOTATORS[name](tree) for name in ("semantic", "pos", "tree"))
    return Sentence(" ".join(tree.leaves()), *notes)


def load_targets(config: Any, task: str, n: int) -> list[Sentence]:
    """Loads up to n held-out sentences, annotated for the task. Raises UserError."""
    if config.data.source == "grammar":
        return list(map(annotate, grammar.trees(config.data.seed + TARGET_SEED, n)))
    if config.control.targets and task != "unguided":
        return load_published(Path(config.control.targets), task)[:n]
    texts = sources.load_texts(config.data, "valid")
    fields: list[Any] = [None] * len(texts)
    if config.data.source == "e2e":
        texts, fields = sources.e2e_records(config.data, "valid")
    rows = np.random.default_rng(0).permutation(len(texts))[:n]
    tags = _tagger(config) if "pos" in task else lambda text: None
    spans = _parser(config) if task in TREES else lambda text: None
    sentences = [
        Sentence(texts[i], fields[i], tags(texts[i]), spans(texts[i])) for i in rows
    ]
    if "semantic" in task:
        if config.data.source != "e2e":
            raise UserError(
                f"config.control.task={task}: source {config.data.source!r} has no "
                "records of fields; use source grammar or e2e"
            )
        sentences = [s for s in sentences if fields_in_text(s)]
    return sentences


TREES = ("tree", "span", "semantic+tree")  # tasks that need a parser


def fields_in_text(sentence: Sentence) -> Fields:
    """Returns the fields whose value occurs in the text, as words."""
    assert sentence.fields is not None
    fields = sentence.fields.items()
    return {field: value for field, value in fields if has_phrase(value, sentence.text)}


PUBLISHED = {
    "semantic": "target_attribute.json",
    "pos": "target_pos.json",
    "span": "target_spans.json",
    "semantic+pos": "target_compose_pos_attr.json",
}


def load_published(folder: Path, task: str) -> list[Sentence]:
    """Loads the published targets of a task. Raises UserError.

    Lengths are 8 to 38 words; the published 10 to 40 tokens count START and END.
    """
    if task == "length":
        return [Sentence(" ".join(["word"] * n)) for n in range(8, 39)]
    if task not in PUBLISHED:
        raise UserError(
            f"config.control.targets: no published targets for task {task}; choose "
            f"length, {', '.join(PUBLISHED)}"
        )
    path = folder / PUBLISHED[task]
    try:
        rows = [json.loads(line) for _, line in files.lines(path)]
    except (OSError, ValueError) as error:
        raise UserError(f"config.control.targets: {path}: {error}") from error
    return [_published(row) for row in rows]


def _published(row: Any) -> Sentence:
    """Reads a row: a field and its value, or words with tags, a field or spans."""
    if isinstance(row, list):
        field, value = normalize(" ".join(row), "a field").split(" : ")
        return Sentence(value, {field: value})
    words = [normalize(word, "a word") for word in row["words_"]]
    kept = [i for i, word in enumerate(words) if word not in EDGES]
    text = " ".join(words[i] for i in kept)
    fields = tags = spans = None
    if "attr" in row:
        field, value = normalize(" ".join(row["attr"]), "a field").split(" : ")
        fields = {field: value}
    if "pos" in row:
        tags = [row["pos"][i] for i in kept]
    if "spans" in row:
        end = len(kept) - 1  # some spans reach the "\n", which is dropped here
        spans = [(i, min(j, end), label) for i, j, label in row["spans"] if i <= end]
    return Sentence(text, fields, tags, spans)


# --- the scorer


def make_scorer(config: Any, task: str, ar_model: DiffusionLM | None) -> Scorer:
    """Returns the scorer of config.data: the grammar's, or one of trained models.

    The latter has a tagger and a parser if the task needs them, and takes nats from
    ar_model. Raises UserError.
    """
    if config.data.source == "grammar":
        return Scorer(_word_tags, _parsed, grammar.derivable_spans, _exact_nats, True)
    tags = _tagger(config) if "pos" in task else lambda text: []
    spans = _parser(config) if task in TREES else lambda text: []
    return Scorer(tags, spans, lambda text: set(spans(text)), _ar_nats(ar_model))


def _word_tags(text: str) -> list[str]:
    return [grammar.word_tags().get(word, "") for word in text.split()]


def _parsed(text: str) -> Spans:
    return grammar.spans_of(grammar.parse(text)) if grammar.accepts(text) else []


def _exact_nats(texts: list[str]) -> np.ndarray:
    return -np.array([grammar.log_prob(text) for text in texts])


def _tagger(config: Any) -> Callable[[str], list[str]]:
    tagger = annotations.train_tagger(config.classifier.conllu)
    return lambda text: annotations.tags_of(tagger, text)


def _parser(config: Any) -> Callable[[str], Spans]:
    parser = annotations.load_parser(config.classifier.parser)
    return lambda text: annotations.parse_spans(parser, text) if text else []


def _ar_nats(ar_model: DiffusionLM | None) -> Callable[[list[str]], np.ndarray]:
    if ar_model is None:
        return lambda texts: np.full(len(texts), math.nan)
    return lambda texts: np.asarray(ar_model.nll(ar_model.encode(texts)).total())
