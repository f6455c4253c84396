# SPDX-License-Identifier: Apache-2.0
"""From a source to its target: the constraints of pairs, and their targets as texts."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dlm_jax.data import files, pairs
from dlm_jax.data.normalization import normalize
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.diffusion import autoregressive
from dlm_jax.errors import UserError
from dlm_jax.inference import arguments, request
from dlm_jax.inference import mbr as bayes_risk
from dlm_jax.inference.constraints import Constraints
from dlm_jax.inference.guidance_config import GuidanceConfig
from dlm_jax.inference.trained_model import TrainedModel
from dlm_jax.types import PAD, UNK, Integer, Real

BATCH = 32  # rows of a beam search
CONSTRAINTS = ("length", "contains", "lacks")  # on targets


def as_sources(value: Any) -> list[str]:
    """Returns sources as texts; a record {field: value} is linearized. Raises UserError."""
    if isinstance(value, str | Mapping):
        value = [value]
    try:
        given = list(value)
    except TypeError as error:
        raise UserError(f"sources={value!r}: give texts, or records") from error
    texts = [
        pairs.linearize(_record(one)) if isinstance(one, Mapping) else one
        for one in given
    ]
    texts = arguments.as_texts("sources", texts)
    if not texts:
        raise UserError("sources: give one or more")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise UserError(f"sources: text {number} is empty")
    return [
        normalize(text.strip(), f"sources: text {i}") for i, text in enumerate(texts, 1)
    ]


def _record(value: Mapping) -> dict[str, str]:
    """Returns a record of texts that its linear form keeps apart. Raises UserError."""
    for text in arguments.as_texts("sources", [*value, *value.values()]):
        if not text.strip() or "|" in text:
            raise UserError(
                f"sources: {text!r} in a record: give names and values that are not empty "
                "and hold no |, which separates them"
            )
    return {name.strip(): text.strip() for name, text in value.items()}


def encode_sources(tok: Tokenizer, sources: Sequence[str], length: int) -> np.ndarray:
    """Returns rows [n l] of START, source, START and PAD, l = `length`.

    Warns of unknown words. Raises UserError for a source that leaves no room for a token
    and END.
    """
    rows = np.full((len(sources), length), PAD, np.int32)
    for number, (row, source) in enumerate(zip(rows, sources, strict=True), 1):
        ids = pairs.encode_source(tok, source)
        if len(ids) + 2 > length:
            raise UserError(
                f"sources: text {number} has {len(ids) - 2} tokens, and the model has "
                f"room for {length - 4}: {source[:60]!r}"
            )
        row[: len(ids)] = ids
    _warn_of_unknown(tok, sources, rows)
    return rows


def _warn_of_unknown(tok: Tokenizer, sources: Sequence[str], rows: np.ndarray) -> None:
    """Warns of words of sources that the model reads as UNK."""
    numbers = np.flatnonzero(np.any(rows == UNK, -1))
    if len(numbers):
        words = sources[int(numbers[0])].split()
        word = next((w for w in words if UNK in tok.encode(w)), words[0])
        warnings.warn(
            f"{len(numbers)} of {len(sources)} sources hold what the model does not know, "
            f"first {word[:40]!r} in text {numbers[0] + 1}: it reads UNK there",
            stacklevel=2,
        )


def encode_pairs(lm: TrainedModel, sources: Any, targets: list[str]) -> np.ndarray:
    """Encodes pairs as rows [n l]; a long target is truncated. Raises UserError."""
    if (sources is not None) != lm.cfg.known_source:
        raise UserError(
            "encode: a model of pairs needs sources, and another takes none"
        )
    sources = as_sources(sources)
    if len(sources) != len(targets):
        raise UserError(
            f"{len(sources)} sources and {len(targets)} texts: give as many"
        )
    both = map(pairs.Pair, sources, targets)
    options = {"length": lm.length, "too_long": "truncate"}
    options["delexicalize"] = lm.config["data"]["delexicalize"]
    return pairs.encode_pairs(both, lm.tokenizer, **options)


def with_targets(rows: np.ndarray, targets: Constraints) -> Constraints:
    """Returns the constraints of whole pairs: the sources, then these targets.

    rows [n l]: as of `encode_sources`; targets: of texts that begin with START, which is
    here the second one. Raises UserError for a template that does not fit.
    """
    sizes = np.sum(rows != PAD, -1)
    ids, known = rows.copy(), np.arange(rows.shape[1]) < sizes[:, None]
    if targets.known is None:
        return targets._replace(ids=ids, known=known)
    allowed = np.array(targets.allowed)
    for i, size in enumerate(sizes):
        shift, room = size - 1, rows.shape[1] - size + 1
        if np.any(targets.known[i, room:] & (targets.ids[i, room:] != PAD)):
            raise UserError(
                f"sources: text {i + 1} leaves {room - 2} tokens for its target, fewer "
                "than the template or the length asks for"
            )
        ids[i, shift:] = targets.ids[i, :room]
        known[i, shift:] = targets.known[i, :room]
        allowed[i, shift:] = targets.allowed[i, :room]
        allowed[i, :shift] = np.arange(allowed.shape[-1]) == rows[i, :shift, None]
    return targets._replace(ids=ids, known=known, allowed=allowed)


def target_texts(tok: Tokenizer, ids: np.ndarray) -> list[str]:
    """Returns the targets of rows [n l]."""
    return [tok.decode(pairs.source_and_target(row)[1]) for row in ids]


def hidden_values(lm: TrainedModel, sources: Any) -> list[dict]:
    """Returns for each source {value: the placeholder that hides it}."""
    fields = lm.config["data"]["delexicalize"]
    return [pairs.placeholders(source, fields) for source in as_sources(sources)]


def _read(lm: TrainedModel, sources: list[str]) -> tuple[np.ndarray, list[dict]]:
    """Returns the rows of sources, and the values that placeholders hide in each."""
    hidden = hidden_values(lm, sources)
    read = list(map(pairs.replace_words, sources, hidden))
    return encode_sources(lm.tokenizer, read, lm.length), hidden


def _bar(lm: TrainedModel, given: Constraints, hidden: list[dict]) -> Constraints:
    """Bars, per row, the placeholders of fields that its source lacks."""
    words = set(map(pairs.placeholder, lm.config["data"]["delexicalize"]))
    free = np.ones((len(hidden), 1, lm.tokenizer.vocab_size), bool)
    for row, new in zip(free, hidden, strict=True):
        for word in words - set(new.values()):
            ids = lm.tokenizer.encode(word)
            if len(ids) == 1 and ids != [UNK]:  # not pieces, which other words need
                row[:, ids] = False
    if lm.cfg.causal or free.all():
        return given
    allowed = free if given.allowed is None else free & given.allowed
    shape = (len(hidden), lm.length, lm.tokenizer.vocab_size)
    return given._replace(allowed=np.broadcast_to(allowed, shape))


def show(lm: TrainedModel, texts: list[str], hidden: list[dict]) -> list[str]:
    """Puts the values in the place of their placeholders, of which none stays."""
    words = map(pairs.placeholder, lm.config["data"]["delexicalize"])
    none = dict.fromkeys(words, "")
    shown = (none | {word: value for value, word in new.items()} for new in hidden)
    return [
        pairs.replace_words(text, new).strip() if new else text
        for text, new in zip(texts, shown, strict=True)
    ]


class Targets(NamedTuple):
    """Constraints with a row per target, their guidance, and what placeholders hide."""

    constraints: Constraints
    guidance: GuidanceConfig
    hidden: list[dict]


def prepare(
    lm: TrainedModel,
    sources: Any,
    n: int,
    cfg_weight: Real | None,
    template: Any,
    options: dict[str, Any],
) -> Targets:
    """Returns what `lm.generate` needs for n targets of each source; see `translate`.

    Takes the constraints out of the options. Raises UserError.
    """
    if not lm.cfg.known_source:
        raise UserError(
            "translate: this model was not trained on pairs; train one with "
            "config.model.known_source=True, as configs/e2e_mr.py does"
        )
    given_texts = as_sources(sources)
    rows, hidden = _read(lm, given_texts)
    if template is not None and len(given_texts) == 1:
        template = normalize(request.check_template(template), "template")
        template = pairs.replace_words(template, hidden[0])
    rows, hidden = rows.repeat(n, 0), [new for new in hidden for _ in range(n)]
    targets = request.take_constraints(lm, len(rows), template, options, CONSTRAINTS)
    guidance = GuidanceConfig(cfg_weight=lm.default("cfg_weight", cfg_weight))
    return Targets(_bar(lm, with_targets(rows, targets), hidden), guidance, hidden)


def translate(
    lm: Any,
    sources: Any,
    *,
    n: Integer = 1,
    mbr: Integer | None = None,
    cfg_weight: Real | None = None,
    template: Any = None,
    **options: Any,
) -> list[str] | list[list[str]]:
    """Generates the target of each source: texts, or for n > 1 lists of n texts.

    lm: a `DiffusionLM` of pairs (config.model.known_source). sources: texts, or records
    {field: value}. mbr: candidates per target, of which minimum Bayes risk selects one.
    cfg_weight: of classifier-free guidance by the source; 1 is none. What is not given
    comes from the run's config. template, length, contains, lacks: constraints on the
    target, as of `lm.control`; the other options are those of `lm.generate`. Raises
    UserError.
    """
    n, mbr = (
        request.check_count(name, value)
        for name, value in (("n", n), ("mbr", lm.default("mbr", mbr)))
    )
    asked = prepare(lm, sources, n * mbr, cfg_weight, template, options)
    count = len(asked.hidden)
    made = lm.generate(
        count, constraints=asked.constraints, guidance=asked.guidance, **options
    )
    texts = target_texts(lm.tokenizer, made.ids)
    texts = show(lm, texts, asked.hidden)
    if mbr > 1:
        texts = [
            bayes_risk.select(texts[i : i + mbr]) for i in range(0, len(texts), mbr)
        ]
    return texts if n == 1 else [texts[i : i + n] for i in range(0, len(texts), n)]


def beam_search(lm: TrainedModel, sources: Any, *, beams: int) -> list[str]:
    """Returns the most likely target of each source under an autoregressive model."""
    rows, hidden = _read(lm, as_sources(sources))
    search = lm.cached(
        ("beam search", beams),
        lambda: (
            lambda params, rows: autoregressive.beam_search(
                params, lm.cfg, lm.length, prefix=rows, beams=beams
            )
        ),
    )
    parts = np.array_split(rows, -(-len(rows) // BATCH))
    ids = np.concatenate([search(lm.ema, part) for part in parts])
    return show(lm, target_texts(lm.tokenizer, ids), hidden)


def translate_file(lm: Any, path: str) -> list[str]:
    """Generates the target of each line of a file of sources, as config.sample says.

    For a model of E2E's records what follows `||` is no part of the source. Raises
    UserError, also for an empty line: outputs stand in the lines of their sources.
    """
    return lm.translate(read_sources(lm, path))


def read_sources(lm: Any, path: str) -> list[str]:
    """Reads a file of sources, one a line. Raises UserError, also for an empty line."""
    place = files.existing(path, "sources", "a file of sources", "sample")
    sources = list(files.every_line(place))
    if lm.config["data"]["source"] == "e2e":
        sources = [source.partition("||")[0].strip() for source in sources]
    if "" in sources:
        raise UserError(
            f"{path} line {sources.index('') + 1} holds no source: remove or complete it"
        )
    return sources
