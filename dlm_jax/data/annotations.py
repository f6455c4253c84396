# SPDX-License-Identifier: Apache-2.0
"""Annotations of texts, and their encoding as label arrays for classifiers.

The grammar annotates its own texts. For files, fields come from E2E's records, tags
from a tagger trained on Universal Dependencies, trees from a constituency parser, and
sentence labels from a column. Tasks: arXiv:2205.14217, section 6, and docs/method.md,
section 7.
"""

import functools
import importlib
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from dlm_jax.data import grammar, sources
from dlm_jax.data.normalization import nfc, normalize
from dlm_jax.errors import UserError, choices, choose
from dlm_jax.ranges import check_ranges
from dlm_jax.types import HeadSpec

Fields = dict[str, str]
Spans = list[tuple[int, int, str]]

NONE = "none"  # label of a field not stated, or of a span that is no constituent
SPECIAL_TAGS = ("START", "END", "PAD")
HEADS = {"semantic": "fields", "label": "fields", "pos": "tags", "tree": "chart"}


class LabelVocab(NamedTuple):
    """The class names of a task's labels: a list per field.

    The tasks "pos" and "tree" have a single field, named after the task. length: l.
    """

    task: str
    classes: dict[str, list[str]]
    length: int

    @property
    def head_spec(self) -> HeadSpec:
        """Returns the classifier head that predicts these labels."""
        fields, l = len(self.classes), self.length
        shape = {"fields": (fields,), "tags": (l,), "chart": (l, l)}
        head = HEADS[self.task]
        return HeadSpec(head, shape[head], max(map(len, self.classes.values())))

    def class_index(self, field: str, name: str) -> int:
        """Returns the index of a class; raises UserError if training never saw it."""
        if field not in self.classes:
            known = ", ".join(self.classes)
            raise UserError(f"{field!r}: the {self.task} classifier knows only {known}")
        if name not in self.classes[field]:
            known = choices(name, self.classes[field])
            raise UserError(f"{field} {name!r}: not seen in training; {known}")
        return self.classes[field].index(name)

    def index_or_missing(self, field: str, name: str) -> int:
        """Returns `class_index`, or -1 for an unknown class."""
        return self.class_index(field, name) if name in self.classes[field] else -1

    def to_dict(self) -> dict[str, Any]:
        """Returns a record that JSON can store."""
        return self._asdict()


def build_label_vocab(task: str, notes: Iterable[Any], length: int) -> LabelVocab:
    """Collects the class names that occur in the annotations of training texts."""
    if HEADS[task] == "fields":
        seen: dict[str, set[str]] = {}
        for note in notes:
            for field, value in note.items():
                seen.setdefault(field, set()).add(value)
        absent = [NONE] if task == "semantic" else []
        classes = {field: [*absent, *sorted(seen[field])] for field in sorted(seen)}
    elif task == "pos":
        classes = {"pos": [*SPECIAL_TAGS, *sorted({t for n in notes for t in n})]}
    else:
        classes = {"tree": [NONE, *sorted({s[2] for note in notes for s in note})]}
    return LabelVocab(task, classes, length)


def encode(notes: Iterable[Any], vocab: LabelVocab) -> Int32[np.ndarray, "n m"]:
    """Encodes annotations as flat labels [n m]; -1: no label, or an unknown class."""
    rows = [_ENCODE[HEADS[vocab.task]](note, vocab) for note in notes]
    return np.stack(rows).reshape(len(rows), -1).astype(np.int32)


def _target_fields(note: Any, vocab: LabelVocab) -> Int[np.ndarray, " f"]:
    """Encodes target fields; -1 leaves the other fields unconstrained."""
    if not isinstance(note, dict) or not note:
        raise UserError(f"{vocab.task}={note!r}: give {{field: value}}")
    row = dict.fromkeys(vocab.classes, -1)
    for field, value in note.items():
        name = normalize(str(value), f"{field}={value!r}")
        field = nfc(str(field))
        row[field] = vocab.class_index(field, name)
    return np.array(list(row.values()))


def _target_tags(note: list[str], vocab: LabelVocab) -> Int[np.ndarray, " l"]:
    for tag in note:
        if tag in SPECIAL_TAGS:
            raise UserError(f"pos {tag!r}: give only the tags of the words")
        vocab.class_index("pos", tag)
    _fits("pos", len(note), vocab)
    return encode([note], vocab)[0]


def _target_tree(note: Spans, vocab: LabelVocab) -> Int[np.ndarray, "l l"]:
    _fits("tree", 1 + max((span[1] for span in note), default=-1), vocab)
    for span in note:
        _constituent(span, vocab)
    if len({span[:2] for span in note}) < len(note):
        raise UserError("tree: two labels for one constituent; join them by '::'")
    for a, b, _ in note:
        crossing = [s for s in note if a < s[0] <= b < s[1]]
        if crossing:
            raise UserError(f"tree: constituents {(a, b)} and {crossing[0][:2]} cross")
    return encode([note], vocab).reshape(vocab.head_spec.shape)


def _target_span(
    span: tuple[int, int, str], vocab: LabelVocab
) -> Int[np.ndarray, "l l"]:
    """Returns a chart that constrains a single constituent."""
    first, last, _ = span
    _fits("span", last + 1, vocab)
    chart = np.full(vocab.head_spec.shape, -1)
    chart[first + 1, last + 1] = _constituent(span, vocab)
    return chart


def _constituent(span: tuple[int, int, str], vocab: LabelVocab) -> int:
    first, last, label = span
    if not 0 <= first <= last:
        raise UserError(f"constituent {span!r}: give (first, last, label), from 0")
    if label == NONE:
        raise UserError(f"constituent {span!r}: {NONE!r} is not a constituent label")
    return vocab.class_index("tree", label)


def _fits(what: str, size: int, vocab: LabelVocab) -> None:
    if not 1 <= size <= vocab.length - 2:
        raise UserError(
            f"{what}: {size} words; the model has {vocab.length} positions including "
            f"START and END: give 1 to {vocab.length - 2} words"
        )


# constraint -> encoder of the target labels of one text; each raises UserError for a
# label that is invalid or was not seen in training
TARGET_ENCODERS: dict[str, Callable[[Any, LabelVocab], np.ndarray]] = {
    "semantic": _target_fields,
    "label": _target_fields,
    "pos": _target_tags,
    "tree": _target_tree,
    "span": _target_span,
}


def _fields(note: Fields, vocab: LabelVocab) -> np.ndarray:
    stated = dict.fromkeys(vocab.classes, NONE) | note
    return np.array(
        [vocab.index_or_missing(field, stated[field]) for field in vocab.classes]
    )


def _tags(note: list[str], vocab: LabelVocab) -> np.ndarray:
    """Encodes the tags of START, the words, END and PAD, truncated to the length."""
    tags = ["START", *note, "END"][: vocab.length]
    tags += ["PAD"] * (vocab.length - len(tags))
    return np.array([vocab.index_or_missing("pos", tag) for tag in tags])


def _chart(note: Spans, vocab: LabelVocab) -> np.ndarray:
    """Encodes a chart [l l]: entry (i, j) labels positions i to j; START is 0."""
    l = vocab.length
    chart = np.where(np.tri(l, k=-1), -1, 0)
    for first, last, label in note:
        if last + 1 < l:
            chart[first + 1, last + 1] = vocab.index_or_missing("tree", label)
    return chart


_ENCODE: dict[str, Callable] = {"fields": _fields, "tags": _tags, "chart": _chart}


# --- annotated texts: (texts, an annotation of each)

Annotated = tuple[list[str], list[Any]]


def load_annotated(config: Any, task: str, split: str) -> Annotated:
    """Loads the texts of a split, and an annotation of each. Raises UserError.

    Of a file, config.classifier.texts are drawn, as files are often sorted.
    """
    source, most = config.data.source, config.classifier.texts
    choose("config.classifier.task", HEADS, task)
    check_ranges(config, "classifier")
    if source == "grammar" and task != "label":
        return _grammar_texts(config, task, split)
    if task in ("semantic", "label"):
        texts, notes = {"semantic": _records, "label": _columns}[task](config, split)
        return _draw(texts, most), _draw(notes, most)
    texts = _draw(sources.load_texts(config.data, split), most)
    if task == "pos":
        tagger = train_tagger(config.classifier.conllu)
        return texts, [tags_of(tagger, text) for text in texts]
    parser = load_parser(config.classifier.parser)
    return texts, [parse_spans(parser, text) for text in texts]


def _draw(items: list[Any], most: int) -> list[Any]:
    """Draws at most that many (0: all), always the same ones, in their order."""
    if not 0 < most < len(items):
        return items
    return [items[i] for i in sorted(random.Random(0).sample(range(len(items)), most))]


def _records(config: Any, split: str) -> Annotated:
    if config.data.source != "e2e":
        raise UserError(
            f"config.classifier.task=semantic: config.data.source={config.data.source!r} "
            "has no records: choose source e2e or grammar, or task label with a column"
        )
    return sources.e2e_records(config.data, split)


ANNOTATORS: dict[str, Callable[[Any], Any]] = {
    "semantic": grammar.fields_of,
    "pos": grammar.tags_of,
    "tree": grammar.spans_of,
}


def _grammar_texts(config: Any, task: str, split: str) -> Annotated:
    seed, n = config.data.seed, config.data.size
    if split == "valid":
        seed, n = seed + sources.VALID_SHIFT, config.data.valid_size
    trees = grammar.trees(seed, min(n, config.classifier.texts or n))
    return [" ".join(t.leaves()) for t in trees], [ANNOTATORS[task](t) for t in trees]


def _columns(config: Any, split: str) -> Annotated:
    """Loads texts of csv or jsonl files, and sentence labels from another column."""
    if config.data.source not in ("csv", "jsonl"):
        raise UserError(
            f"config.classifier.task=label: config.data.source={config.data.source!r} "
            "has no columns: set it to csv or jsonl, and config.data.path to a file"
        )
    column = nfc(config.classifier.column)
    texts, labels = sources.labelled(config.data, split, column)
    return texts, [{column: label} for label in labels]


# --- tags


def read_conllu(path: str | Path) -> list[list[tuple[str, str]]]:
    """Reads a CoNLL-U file as sentences of (word, universal tag). Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"config.classifier.conllu={str(path)!r}: give a .conllu file of Universal "
            f"Dependencies ({error})"
        ) from error
    sentences = []
    for block in normalize(text, str(path)).split("\n\n"):
        rows = [line.split("\t") for line in block.split("\n")]
        words = [(r[1], r[3]) for r in rows if len(r) == 10 and r[0].isdigit()]
        if words:
            sentences.append(words)
    if not sentences:
        raise UserError(f"{path} holds no sentence in CoNLL-U format: give another")
    return sentences


@functools.cache
def train_tagger(path: str | Path) -> Any:
    """Trains nltk's averaged perceptron on a treebank; accuracy: docs/control.md.

    nltk shuffles with the global generator; seeding it makes labels reproducible.
    """
    from nltk.tag.perceptron import PerceptronTagger

    sentences, tagger = read_conllu(path), PerceptronTagger(load=False)
    before = random.getstate()
    try:
        random.seed(0)
        tagger.train(sentences, nr_iter=5)
    finally:
        random.setstate(before)
    return tagger


def tags_of(tagger: Any, text: str) -> list[str]:
    """Returns the universal part-of-speech tag of each word."""
    return [tag for _, tag in tagger.tag(text.split())]


# --- trees


def load_parser(name: str) -> Any:
    """Loads a benepar parser; raises UserError if it or its model is not installed."""
    try:
        return importlib.import_module("benepar").Parser(name)
    except (ImportError, LookupError) as error:
        raise UserError(
            "config.classifier.task=tree needs the parser benepar for this source: "
            "pip install 'dlm_jax[parser]', then run benepar.download('benepar_en3')"
        ) from error


def parse_spans(parser: Any, text: str) -> Spans:
    """Returns a text's constituents; `parser.parse(words)` must return an nltk tree."""
    tree = parser.parse(text.split())
    if tree.label() == "TOP" and len(tree) == 1:
        tree = tree[0]
    return grammar.spans_of(tree)
