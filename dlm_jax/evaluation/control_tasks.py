# SPDX-License-Identifier: Apache-2.0
"""The control tasks: how a target is drawn, asked for and scored.

The scores are those of arXiv:2205.14217, section 6 (docs/method.md, section 7.8).
Targets come from `control_targets`; `control` runs the tasks.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from dlm_jax.data.annotations import Fields, Spans
from dlm_jax.data.tokenizer import WordTokenizer
from dlm_jax.data.words import words
from dlm_jax.evaluation.control_targets import (
    Scorer,
    Sentence,
    fields_in_text,
    has_phrase,
)
from dlm_jax.inference.constraints import (
    BLANK,
    Constraints,
    give_length,
    pad_to_power_of_two,
    parse_constraints,
    parse_template,
    template_constraints,
)
from dlm_jax.inference.pieces import encode_value
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.types import UNK


class ControlTask(NamedTuple):
    """A task: its target, the constraint that asks for it, and its score.

    target(sentence, rng): draws a target from a held-out sentence. constrain(target,
    lm): the constraints of one text, as a row. score(text, target, scorer): named
    scores in [0, 1]. needs: the label tasks whose classifiers it uses.
    """

    target: Callable[[Sentence, Any], Any]
    constrain: Callable[[Any, DiffusionLM], Constraints]
    score: Callable[[str, Any, Scorer], dict[str, float]]
    needs: tuple[str, ...] = ()


# --- targets


def _one_field(sentence: Sentence, rng: Any) -> Fields:
    """Draws a field whose value occurs in the text, or any field if none does."""
    assert sentence.fields is not None
    fields = fields_in_text(sentence) or sentence.fields
    field = sorted(fields)[rng.integers(len(fields))]
    return {field: fields[field]}


def _one_span(sentence: Sentence, rng: Any) -> tuple[int, int, str]:
    """Draws a constituent other than the whole text."""
    inner = _inner(sentence)
    return inner[rng.integers(len(inner))]


def _inner(sentence: Sentence) -> list[tuple[int, int, str]]:
    whole = (0, len(sentence.text.split()) - 1)
    return [span for span in sentence.spans or [] if span[:2] != whole]


def _middle(sentence: Sentence, rng: Any, split: Callable = str.split) -> str:
    """Returns the text with a blank in the place of each word of its middle third."""
    text, found, start = " ".join(sentence.text.split()), [], 0
    for word in split(text):
        start = text.index(word, start)
        found.append((start, start := start + len(word)))
    third = max(1, len(found) // 3)
    for first, last in reversed(found[third : 2 * third] or found):
        text = text[:first] + BLANK + text[last:]
    return text


# --- constraints: (target, lm) -> one row


def _from_target(name: str) -> Callable[[Any, DiffusionLM], Constraints]:
    def constrain(target: Any, lm: DiffusionLM) -> Constraints:
        wanted = give_length({name: target}, lm.cfg)
        return parse_constraints(lm.tokenizer, lm.length, lm.classifiers, **wanted)

    return constrain


def _semantic(target: Fields, lm: DiffusionLM) -> Constraints:
    """Constrains the fields by the classifier, and their words by token guidance."""
    values = [encode_value(lm.tokenizer, value) for value in target.values()]
    phrases = [pad_to_power_of_two([-1] if UNK in ids else ids) for ids in values]
    return _from_target("semantic")(target, lm)._replace(phrases=tuple(phrases))


def _template(target: str, lm: DiffusionLM) -> Constraints:
    parts = parse_template(lm.tokenizer, target)
    vocab = lm.tokenizer.vocab_size
    return template_constraints(parts, lm.length, vocab, 1, 0, lengths=lm.lengths)


# --- scores


def _value(text: str, target: Fields, scorer: Scorer) -> dict[str, float]:
    return {"value": float(all(has_phrase(v, text) for v in target.values()))}


def _tags(text: str, target: list[str], scorer: Scorer) -> dict[str, float]:
    """Scores tags by position, after cutting or padding them to the target's length."""
    tags = scorer.tags(text)[: len(target)]
    tags += [""] * (len(target) - len(tags))
    right = [a == b for a, b in zip(tags, target, strict=True)]
    return {"tags": sum(right) / len(right), "all tags": float(all(right))}


def _tree(text: str, target: Spans, scorer: Scorer) -> dict[str, float]:
    """Computes F1 of labelled constituents; a text without a parse has none."""
    spans, wanted = set(scorer.spans(text)), set(target)
    f1 = 2 * len(spans & wanted) / (len(spans) + len(wanted))
    return {"tree F1": f1, "whole tree": float(spans == wanted)}


def _has_span(text: str, target: tuple, scorer: Scorer) -> dict[str, float]:
    """Scores a constituent in its place: alone, and within a parse of the text."""
    first, last, label = target
    derived = scorer.derived(text)
    within = tuple(target) in scorer.spans(text)
    alone = within or all((first, last, name) in derived for name in label.split("::"))
    return {"span": float(alone), "span in a parse": float(within)}


def _length(text: str, target: int, scorer: Scorer) -> dict[str, float]:
    return _off(len(text.split()) - target)


def _off(by: int) -> dict[str, float]:
    return {"exact length": float(by == 0), "length +-2": float(abs(by) <= 2)}


def _kept(text: str, target: str, scorer: Scorer) -> dict[str, float]:
    """Scores whether the known words are in place and the length is the template's."""
    pattern = re.escape(" ".join(target.split())).replace(BLANK, r"\S+")
    return {"known kept": float(bool(re.fullmatch(pattern, " ".join(text.split()))))}


def _both(first: ControlTask, second: ControlTask) -> ControlTask:
    """Combines two classifier tasks; both targets come from the same sentence."""

    def constrain(target: Any, lm: DiffusionLM) -> Constraints:
        one, two = first.constrain(target[0], lm), second.constrain(target[1], lm)
        labels = {**one.labels, **two.labels}
        return two._replace(phrases=one.phrases + two.phrases, labels=labels)

    def score(text: str, target: Any, scorer: Scorer) -> dict[str, float]:
        one = first.score(text, target[0], scorer)
        return {**one, **second.score(text, target[1], scorer)}

    return ControlTask(
        lambda s, rng: (first.target(s, rng), second.target(s, rng)),
        constrain,
        score,
        first.needs + second.needs,
    )


CONTROL_TASKS: dict[str, ControlTask] = {
    "semantic": ControlTask(_one_field, _semantic, _value, ("semantic",)),
    "pos": ControlTask(lambda s, rng: s.tags, _from_target("pos"), _tags, ("pos",)),
    "tree": ControlTask(lambda s, rng: s.spans, _from_target("tree"), _tree, ("tree",)),
    "span": ControlTask(_one_span, _from_target("span"), _has_span, ("tree",)),
    "length": ControlTask(
        lambda s, rng: len(s.text.split()), _from_target("length"), _length
    ),
    "infilling": ControlTask(_middle, _template, _kept),
}
CONTROL_TASKS["semantic+tree"] = _both(CONTROL_TASKS["semantic"], CONTROL_TASKS["tree"])
CONTROL_TASKS["semantic+pos"] = _both(CONTROL_TASKS["semantic"], CONTROL_TASKS["pos"])


def task_of(name: str, lm: DiffusionLM) -> ControlTask | None:
    """Returns a task as this model sees texts; None if there is no task of that name.

    If its tokens are no words, a length is one in pieces: those of the text, encoded
    again. The known words of infilling are as the tokenizer spells them; a character is
    a word in scripts without spaces.
    """
    task, tok = CONTROL_TASKS.get(name), lm.tokenizer
    if task is None or isinstance(tok, WordTokenizer):
        return task

    def size(text: str) -> int:
        return len(tok.encode(text))

    def length(text: str, target: int, scorer: Scorer) -> dict[str, float]:
        scores = _off(size(text) - target)
        return {f"{name} in pieces": score for name, score in scores.items()}

    def middle(sentence: Sentence, rng: Any) -> str:
        spelled = tok.decode(tok.encode(sentence.text))
        return _middle(sentence._replace(text=spelled), rng, words)

    changes: dict[str, Any] = {
        "length": {"target": lambda s, rng: size(s.text), "score": length},
        "infilling": {"target": middle},
    }
    return task._replace(**changes[name]) if name in changes else task


def is_feasible(lm: DiffusionLM, name: str, sentence: Sentence) -> bool:
    """Returns whether a sentence fits: its length, its words, and a span if needed."""
    if name == "infilling" and UNK in lm.tokenizer.encode(sentence.text):
        return False
    if name == "span" and not _inner(sentence):
        return False
    size = len(lm.tokenizer.encode(sentence.text))
    return name == "unguided" or size <= lm.length - 2
