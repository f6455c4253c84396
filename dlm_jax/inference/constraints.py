# SPDX-License-Identifier: Apache-2.0
"""Constraints on generated texts, as arrays: templates, lengths, phrases, labels.

A constraint is an array with one row per text, so constraints of equal shapes compile
once.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dlm_jax.data import annotations, grammar
from dlm_jax.data.annotations import LabelVocab
from dlm_jax.data.tokenizer import Tokenizer, WordTokenizer
from dlm_jax.diffusion import guidance
from dlm_jax.diffusion.classifier import Classifier
from dlm_jax.errors import UserError, choices
from dlm_jax.inference import arguments, pieces
from dlm_jax.inference.pieces import BLANK, GAP
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.ranges import integer
from dlm_jax.types import END, PAD, START, UNK


class GuidanceClassifier(NamedTuple):
    """A trained classifier: its parameters, its network and the names of its labels."""

    params: Classifier
    cfg: DenoiserConfig
    vocab: LabelVocab


class Constraints(NamedTuple):
    """Fixed tokens, and targets that guide, as arrays with a row per text; None: no limit.

    ids, known [n l]: token ids, and a mask of the positions where they are fixed.
    allowed [n l v]: the tokens that each position may take. phrases, each [n k]: ids
    wanted side by side; excluded [n k]: unwanted ids; rows are padded with -1. labels:
    classifier targets by task [n ...]; -1 sets no target.
    """

    ids: Any = None
    known: Any = None
    allowed: Any = None
    phrases: tuple[Any, ...] = ()
    excluded: Any = None
    labels: Mapping[str, Any] = {}


UNCONSTRAINED = Constraints()


def pad_to_power_of_two(row: list[int]) -> np.ndarray:
    """Pads a row of ids with -1 to [1 k], k a power of two, to limit recompilation."""
    width = 1 << max(len(row) - 1, 0).bit_length()
    return np.array([row + [-1] * (width - len(row))], np.int32)


def require_word_tokens(tok: Tokenizer, what: str) -> None:
    """Raises UserError if tokens are not words."""
    if not isinstance(tok, WordTokenizer):
        raise UserError(
            f"{what}: needs one word per token, and this model's tokens are pieces of "
            "words; train with config.data.tokenizer=word"
        )


def batch_constraints(rows: Iterable[Constraints]) -> Constraints:
    """Stacks constraints of the same kinds; phrases are padded to the longest."""
    rows = list(rows)

    def together(*phrases: np.ndarray) -> np.ndarray:
        width = max(p.shape[1] for p in phrases)
        fill = {"mode": "constant", "constant_values": -1}
        return np.concatenate(
            [np.pad(p, ((0, 0), (0, width - p.shape[1])), **fill) for p in phrases]
        )

    phrases = tuple(
        together(*p) for p in zip(*(row.phrases for row in rows), strict=True)
    )
    bare = [row._replace(phrases=()) for row in rows]
    return jax.tree.map(lambda *x: np.concatenate(x), *bare)._replace(phrases=phrases)


MAX_GAP_WORDS = 10  # as in the published code


class Template(NamedTuple):
    """A text in parts: a list of ids, None for one open token, or GAP for several.

    first: for each part the mask [v] of what its first token may be; None: any word.
    """

    parts: list[Any]
    first: list[Any]

    def restrict(self, allowed: np.ndarray, widths: Iterable[int]) -> None:
        """Narrows a row's mask [l v], in place, where a part with a mask starts."""
        place, gaps = 1, iter(widths)
        for part, mask in zip(self.parts, self.first, strict=True):
            if mask is not None:
                allowed[place] &= mask
            if isinstance(part, list):
                place += len(part)
            else:
                place += 1 if part is None else next(gaps, 1)

    @property
    def gaps(self) -> int:
        """The number of gaps."""
        return sum(part == GAP for part in self.parts)

    @property
    def size(self) -> int:
        """The number of positions that the template needs, counting a gap as one."""
        return sum(len(p) if isinstance(p, list) else 1 for p in self.parts)


def parse_template(tok: Tokenizer, template: str, excluded: Any = None) -> Template:
    """Parses a template such as "The ___ is a pub [...]". Raises UserError.

    excluded: ids that must not occur, so the template may not hold them either.
    """
    of_words, what = isinstance(tok, WordTokenizer), f"template {template!r}"
    split = (pieces.split_words if of_words else pieces.split_template)(template)
    if not any(part.text in (BLANK, GAP) for part in split):
        raise UserError(
            f"{what} has no blank: write {BLANK} for a word, {GAP} for one or more"
        )
    if of_words:
        pieces.check_breaks(template.strip(), "", what)
    kind = {BLANK: None, GAP: GAP}
    parts: list[Any] = [
        kind[p.text] if p.text in kind else pieces.encode_part(tok, p, what)
        for p in split
    ]
    held = {i for part in parts if isinstance(part, list) for i in part}
    if excluded is not None and (clash := held & set(excluded.ravel().tolist())):
        word = tok.decode([clash.pop()])
        raise UserError(f"{word!r} is in the template and must not occur")
    return Template(parts, [None if of_words else pieces.first(tok, p) for p in split])


def fill_template(
    template: Template, length: int, widths: Iterable[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids, known) [length]; a gap without a width runs to the end.

    Positions that are not known hold PAD, or END in a gap that runs to the end.
    """
    ids, known, gaps, rest = [START], [True], iter(widths), True
    for part in template.parts:
        if isinstance(part, list):
            ids, known = ids + part, known + [True] * len(part)
            continue
        width = 1 if part is None else next(gaps, 0)
        rest = rest and width > 0
        ids, known = ids + [PAD] * width, known + [False] * width
    size = length - len(ids)
    tail = [END] + [PAD] * (size - 1) if rest else [END] * size
    return np.array(ids + tail, np.int32), np.array(known + [rest] * size)


def template_constraints(
    template: Template,
    length: int,
    vocab: int,
    n: int,
    seed: int,
    words: int | None = None,
    lengths: Sequence[int] = (),
) -> Constraints:
    """Builds the constraints of n texts, with random gap widths for each.

    words: length of the whole text. lengths: training texts by number of tokens, from
    which the length is drawn if it is not given. Without both a gap has 1 to
    MAX_GAP_WORDS words, and a gap at the end stays open.
    """
    rngs = [np.random.default_rng((seed, i)) for i in range(n)]
    spare = length - 2 - template.size
    if words is None and spare < 0:
        raise UserError(
            f"the template needs {template.size + 2} positions with START and END; "
            f"the model has {length}"
        )
    if words is not None or lengths:
        sizes = [words or 0] * n
        if words is None:
            most = template.size + (spare if template.gaps else 0)
            counts = range(template.size, most + 1)
            sizes = draw_word_counts(lengths, n, seed, counts)
        pairs = zip(sizes, rngs, strict=True)
        widths = [_draw_widths(template, size, rng) for size, rng in pairs]
    else:
        drawn = template.gaps - (template.parts[-1] == GAP)
        most = min(MAX_GAP_WORDS, 1 + spare // max(drawn, 1))
        widths = [rng.integers(1, most + 1, drawn).tolist() for rng in rngs]
    ids, known = map(
        np.stack,
        zip(*(fill_template(template, length, w) for w in widths), strict=True),
    )
    allowed = allowed_tokens(ids, known, vocab)
    for row, width in zip(allowed, widths, strict=True):
        template.restrict(row, width)
    return Constraints(ids, known, allowed)


def draw_word_counts(
    lengths: Sequence[int],
    n: int,
    seed: int,
    counts: range,
    least: Sequence[int] | np.ndarray = (),
) -> list[int]:
    """Draws a number of words for each of n texts, as frequent as in training.

    lengths: the number of training texts of 0, 1, ... tokens, START and END counted.
    counts: the numbers that may be drawn; least [n]: the smallest for each text. Raises
    UserError if no text has any of several.
    """
    numbers = np.array(counts)
    share = np.array([lengths[k + 2] if k + 2 < len(lengths) else 0 for k in counts])
    if len(counts) == 1:
        return list(counts) * n
    drawn = []
    for i in range(n):
        smallest = max([counts[0], *least[i : i + 1]])
        fits = share * (numbers >= smallest)
        if not fits.sum():
            raise UserError(
                f"no training text has {smallest} to {counts[-1]} words: give length="
            )
        rng = np.random.default_rng((seed, i, 1))
        drawn.append(int(rng.choice(numbers, p=fits / fits.sum())))
    return drawn


def least_words(rows: Constraints, n: int) -> np.ndarray:
    """Returns the fewest words that hold the phrases and constituents of each text [n]."""
    needed = [np.sum(np.asarray(ids) >= 0, -1) for ids in rows.phrases]
    if "tree" in rows.labels:  # [n first last] by position, START being 0
        ends = np.any(np.asarray(rows.labels["tree"]) >= 0, 1)
        needed.append(np.max(ends * np.arange(ends.shape[-1]), -1))
    return np.max([np.ones(n, int), *needed], 0)


def _draw_widths(template: Template, words: int, rng: Any) -> list[int]:
    """Draws gap widths that give the text this length, uniformly over all such widths."""
    spare = words - template.size
    if spare < 0 or (spare and not template.gaps):
        needs = f"{template.size} words" + (" or more" if template.gaps else "")
        raise UserError(f"length={words}: the template needs {needs}")
    if not template.gaps:
        return []
    places = spare + template.gaps - 1
    bars = np.sort(rng.choice(places, template.gaps - 1, replace=False))
    return np.diff([-1, *bars, places]).tolist()


def any_word(shape: tuple[int, ...], vocab: int) -> np.ndarray:
    """Returns the mask [*shape v] that allows all but special tokens: a view."""
    word = np.arange(vocab) > max(START, END, UNK, PAD)
    return np.broadcast_to(word, (*shape, vocab))


def allowed_tokens(ids: np.ndarray, known: np.ndarray, vocab: int) -> np.ndarray:
    """Returns the mask [n l v]: the known token, or any word at an unknown position.

    In a gap that runs to the end, whose ids are END, the text may also end, after at
    least one word.
    """
    allowed = any_word(ids.shape, vocab).copy()
    gap = ~known & (ids == END)
    loose = gap & (np.cumsum(gap, -1) > 1)
    for special in (END, PAD):
        allowed[..., special] |= loose
    return np.where(known[..., None], ids[..., None] == np.arange(vocab), allowed)


CONSTRAINTS = (
    "length",
    "contains",
    "lacks",
    "semantic",
    "label",
    "pos",
    "tree",
    "span",
)
POSITIONAL = {"length", "pos", "tree", "span"}  # they count words from the start


def parse_constraints(
    tok: Tokenizer,
    positions: int,
    classifiers: Mapping[str, GuidanceClassifier],
    **wanted: Any,
) -> Constraints:
    """Builds the constraints of one text (n = 1) from names and values:

    length: number of words, or of pieces if those are its tokens. contains: a phrase, or a list of phrases.
    lacks: words, each one token, that must not occur. semantic: {field: value}; label: {column: label};
    pos: the tag of each word; tree: (first, last, label) of each constituent, by word
    indices from 0, inclusive; span: one of these. label, pos, tree and span need a
    classifier. Without one semantic asks for the words of each value, as `contains` does,
    and a field may have any name (but see `check_fields`). Raises UserError.
    """
    if {"tree", "span"} <= wanted.keys():
        raise UserError(
            "span: tree already gives every constituent; set one of the two"
        )
    words = wanted.pop("length", None)
    if words is not None:
        words = integer("length", words, 1, positions - 2, "words")
    phrases = arguments.as_texts("contains", wanted.pop("contains", []))
    lacks = arguments.as_texts("lacks", wanted.pop("lacks", []))
    if "semantic" in wanted and "semantic" not in classifiers:
        phrases += _fields(wanted.pop("semantic")).values()
    by_task = {}
    for name, value in wanted.items():
        classifier = _classifier_for(name, classifiers)
        by_task[classifier.vocab.task] = annotations.TARGET_ENCODERS[name](
            value, classifier.vocab
        )[None]
    phrase_rows = [pieces.encode_phrase(tok, phrase, "contains") for phrase in phrases]
    excluded = sorted({i for w in lacks for i in pieces.encode_avoided(tok, w)})
    _check(tok, positions, words, phrase_rows, excluded, wanted)
    ids = known = allowed = None
    if words is not None:
        ids, known = map(
            np.asarray, guidance.length_template(np.array([words]), positions)
        )
        allowed = allowed_tokens(ids, known, tok.vocab_size)
    return Constraints(
        ids,
        known,
        allowed,
        tuple(map(pad_to_power_of_two, phrase_rows)),
        pad_to_power_of_two(excluded) if excluded else None,
        by_task,
    )


def check_fields(wanted: Mapping[str, Any], source: str) -> None:
    """Raises UserError for a field that no text has, where the fields are known.

    source: config.data.source. Only the grammar's fields are known without a classifier.
    """
    known = [field.lower() for field in grammar.FIELDS]
    for field in _fields(wanted.get("semantic", {})):
        if source == "grammar" and field not in known:
            raise UserError(f"semantic {field!r}: {choices(field, known)}")


def num_words(wanted: Mapping[str, Any]) -> int | None:
    """Returns the number of words that length, pos or tree implies; None if none does."""
    return next(iter(_sizes(wanted).values()), None)


def give_length(wanted: Mapping[str, Any], cfg: DenoiserConfig) -> dict[str, Any]:
    """Adds the length that pos or tree implies, if the network is given the length."""
    words = num_words(wanted) if cfg.known_length else None
    return {**wanted} if words is None else {**wanted, "length": words}


def _sizes(wanted: Mapping[str, Any]) -> dict[str, int]:
    """Returns the number of words that each constraint implies."""
    sizes = {
        "length": wanted.get("length"),
        "pos": len(wanted.get("pos", ())),
        "tree": 1 + max((s[1] for s in wanted.get("tree", ())), default=-1),
    }
    return {name: size for name, size in sizes.items() if size}


def _classifier_for(
    name: str, classifiers: Mapping[str, GuidanceClassifier]
) -> GuidanceClassifier:
    task = "tree" if name == "span" else name
    if task not in classifiers:
        raise UserError(
            f"{name}: needs a classifier, lm.with_classifier(WORKDIR), trained by "
            f"--mode train_classifier --config classifier:{task}"
        )
    return classifiers[task]


def _check(
    tok: Tokenizer,
    positions: int,
    words: Any,
    phrases: list[list[int]],
    excluded: list[int],
    wanted: dict,
) -> None:
    """Raises UserError if no text can satisfy all constraints."""
    most = positions - 2
    for name in (POSITIONAL - {"length"}) & wanted.keys():
        require_word_tokens(tok, name)
    sizes = _sizes(wanted | {"length": words})
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"the constraints imply different numbers of words: {listed}")
    room = max(sizes.values(), default=most)
    longest = max(map(len, phrases), default=0)
    if longest > room:
        raise UserError(
            f"contains: a phrase of {longest} words exceeds the text's {room} words"
        )
    distinct = len({i for phrase in phrases for i in phrase})
    if distinct > room:
        raise UserError(
            f"contains: {distinct} different words exceed the text's {room} words"
        )
    if "span" in wanted and wanted["span"][1] >= room:
        raise UserError(f"span={wanted['span']}: give last < {room}")
    values = _fields(wanted.get("semantic", {})).values()
    inside = {i for phrase in phrases for i in phrase}
    inside |= {i for value in values for i in pieces.encode_value(tok, value)}
    if clash := set(excluded) & inside:
        raise UserError(f"{tok.decode([clash.pop()])!r} must both occur and not occur")


def _fields(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise UserError(f"semantic={value!r}: give {{field: value}}")
    arguments.as_texts("semantic", [*value, *value.values()])
    return value
