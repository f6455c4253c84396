# SPDX-License-Identifier: Apache-2.0
"""What control is measured by: held-out sentences with their notes, and a judge.

Sentences of the grammar are drawn from a seed that nothing was trained on; those of E2E
are of its validation split, or the published targets.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlm_jax.data import annotations, grammar, sources
from dlm_jax.data.annotations import Fields, Spans
from dlm_jax.errors import UserError
from dlm_jax.inference.pipeline import DiffusionLM

TARGET_SEED = 2_000_003  # added to the seed of the data: never trained or validated on


class Sentence(NamedTuple):
    """A held-out text, and what it says; None where that is not known."""

    text: str
    fields: Fields | None = None
    tags: list[str] | None = None
    spans: Spans | None = None


def has_phrase(value: str, text: str) -> bool:
    """Whether the words of the value stand in the text, one after the other."""
    return f" {value} " in f" {text} "


class Scorer(NamedTuple):
    """How texts are read: tags; constituents of a parse, and of parts that parse.

    nats(texts) gives -log p of each: exact for the grammar, and not finite outside the
    language; else the teacher's.
    """

    tags: Callable[[str], list[str]]
    spans: Callable[[str], Spans]
    derived: Callable[[str], set]
    nats: Callable[[list[str]], np.ndarray]
    exact: bool = False


EDGES = ("START", "END", "\n")  # of the published targets


def annotate(tree: Any) -> Sentence:
    """A derivation of the grammar as a sentence with all its notes."""
    notes = (annotations.ANNOTATORS[name](tree) for name in ("semantic", "pos", "tree"))
    return Sentence(" ".join(tree.leaves()), *notes)


def load_targets(config: Any, task: str, n: int) -> list[Sentence]:
    """Up to n held-out sentences with what the task needs to know of them; UserError."""
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
    found = [
        Sentence(texts[i], fields[i], tags(texts[i]), spans(texts[i])) for i in rows
    ]
    if "semantic" in task:
        if config.data.source != "e2e":
            raise UserError(f"config.control.task={task}: this text has no records")
        found = [s for s in found if fields_in_text(s)]
    return found


TREES = ("tree", "span", "semantic+tree")


def fields_in_text(sentence: Sentence) -> Fields:
    """The fields whose value is words of the text."""
    assert sentence.fields is not None
    told = sentence.fields.items()
    return {field: value for field, value in told if has_phrase(value, sentence.text)}


PUBLISHED = {
    "semantic": "target_attribute.json",
    "pos": "target_pos.json",
    "span": "target_spans.json",
    "semantic+pos": "target_compose_pos_attr.json",
}


def load_published(folder: Path, task: str) -> list[Sentence]:
    """The published targets; of length 10 to 40 tokens, START and END counted."""
    if task == "length":
        return [Sentence(" ".join(["word"] * n)) for n in range(8, 39)]
    if task not in PUBLISHED:
        raise UserError(
            f"config.control.targets: none published of {task}; there are length, "
            f"{', '.join(PUBLISHED)}"
        )
    path = folder / PUBLISHED[task]
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"config.control.targets: {path}: {error}") from error
    return [_published(row) for row in rows]


def _published(row: Any) -> Sentence:
    """A row of one of the files: a field; or words, with tags, a field or a span."""
    if isinstance(row, list):
        field, value = " ".join(row).split(" : ")
        return Sentence(value, {field: value})
    words = row["words_"]
    kept = [i for i, word in enumerate(words) if word not in EDGES]
    text = " ".join(words[i] for i in kept)
    fields = tags = spans = None
    if "attr" in row:
        field, value = " ".join(row["attr"]).split(" : ")
        fields = {field: value}
    if "pos" in row:
        tags = [row["pos"][i] for i in kept]
    if "spans" in row:
        end = len(kept) - 1  # some reach the line's end, which is no word here
        spans = [(i, min(j, end), label) for i, j, label in row["spans"] if i <= end]
    return Sentence(text, fields, tags, spans)


# --- the judge


def make_scorer(config: Any, task: str, ar_model: DiffusionLM | None) -> Scorer:
    """The grammar; or the tagger and the parser, where the task asks, and the teacher."""
    if config.data.source == "grammar":
        return Scorer(_word_tags, _parsed, grammar.derivable_spans, _exact_nats, True)
    tags = _tagger(config) if "pos" in task else lambda text: []
    spans = _parser(config) if task in TREES else lambda text: []
    return Scorer(tags, spans, lambda text: set(spans(text)), _teacher_nats(ar_model))


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


def _teacher_nats(ar_model: DiffusionLM | None) -> Callable[[list[str]], np.ndarray]:
    if ar_model is None:
        return lambda texts: np.full(len(texts), math.nan)
    return lambda texts: np.asarray(ar_model.nll(ar_model.encode(texts)).total())
