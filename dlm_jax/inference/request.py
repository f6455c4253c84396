# SPDX-License-Identifier: Apache-2.0
"""What a caller asks for: a count, a seed, a template, the constraints of n texts."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from dlm_jax.diffusion import guidance
from dlm_jax.errors import UserError
from dlm_jax.inference import arguments, constraints
from dlm_jax.inference.constraints import CONSTRAINTS, Constraints
from dlm_jax.inference.sampling_config import OPTIONS, check_names
from dlm_jax.inference.trained_model import TrainedModel
from dlm_jax.ranges import integer
from dlm_jax.types import Integer


def draw_lengths(lm: TrainedModel, rows: Constraints, n: int, seed: int) -> Constraints:
    """Fixes START, END and PAD of n texts whose lengths are drawn as in training."""
    counts = range(1, lm.length - 1)
    least = constraints.least_words(rows, n)
    words = constraints.draw_word_counts(lm.lengths, n, seed, counts, least)
    template = guidance.length_template(np.array(words), lm.length)
    ids, known = map(np.asarray, template)
    allowed = constraints.any_word(ids.shape, lm.tokenizer.vocab_size)
    return rows._replace(ids=ids, known=known, allowed=allowed)


def constraints_of(
    lm: TrainedModel, n: int, template: str | None, seed: int, wanted: dict[str, Any]
) -> Constraints:
    """Builds the constraints of n texts; gaps of a template get random widths."""
    positional = template is not None or wanted.keys() & constraints.POSITIONAL
    if positional and lm.config["data"].get("mode") == "block":
        raise UserError(
            "this model was trained on texts packed end to end (data.mode=block): it "
            "takes no constraint on lengths or positions"
        )
    constraints.check_fields(wanted, lm.config["data"].get("source") or "")
    tok, wanted = lm.tokenizer, constraints.give_length(wanted, lm.cfg)
    one = constraints.parse_constraints(tok, lm.length, lm.classifiers, **wanted)
    rows = jax.tree.map(lambda x: np.repeat(x, n, 0), one)
    if template is None:
        return rows
    parts = constraints.parse_template(tok, template, one.excluded)
    words = constraints.num_words(wanted)
    filled = constraints.template_constraints(
        parts, lm.length, tok.vocab_size, n, seed, words, lm.lengths
    )
    return rows._replace(ids=filled.ids, known=filled.known, allowed=filled.allowed)


def take_constraints(
    lm: TrainedModel,
    n: int,
    template: Any,
    options: dict[str, Any],
    names: Iterable[str] = CONSTRAINTS,
) -> Constraints:
    """Moves the constraints of n texts, of these names, out of a caller's options."""
    check_names(options, {*names, *OPTIONS, "seed", "batch"})
    wanted = arguments.plain({name: options.pop(name, None) for name in names})
    template = None if template is None else check_template(template)
    seed = check_seed(lm.default("seed", options.get("seed")))
    return constraints_of(lm, n, template, seed, wanted)


def check_template(value: Any) -> str:
    """Returns a template. Raises UserError unless it is a text."""
    if not isinstance(value, str):
        raise UserError(f"template={value!r}: give a text with ___ or [...]")
    return value


def check_count(name: str, value: Integer) -> int:
    """Returns a number of texts, from 1. Raises UserError."""
    return integer(name, value, 1, 2**31 - 1)


def check_seed(value: Integer) -> int:
    """Returns a seed of 64 bits. Raises UserError."""
    return integer("seed", value, 0, 2**64 - 1)
