# SPDX-License-Identifier: Apache-2.0
"""What a caller asks for: a count, a seed, a template, the constraints of n texts."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from dlm_jax.data import pairs
from dlm_jax.diffusion import guidance
from dlm_jax.errors import UserError
from dlm_jax.inference import arguments, constraints
from dlm_jax.inference.constraints import CONSTRAINTS, UNCONSTRAINED, Constraints
from dlm_jax.inference.guidance_config import DEFAULT_GUIDANCE, GuidanceConfig
from dlm_jax.inference.sampling_config import OPTIONS, SamplingConfig, check_names
from dlm_jax.inference.trained_model import TrainedModel
from dlm_jax.ranges import integer
from dlm_jax.types import Integer


class Request(NamedTuple):
    """A number of texts, their seed, constraints with a row per text, and the settings."""

    n: int
    seed: int
    constraints: Constraints
    sampling: SamplingConfig
    guidance: GuidanceConfig


def make_request(
    lm: TrainedModel,
    n: Integer,
    *,
    seed: Integer | None = None,
    constraints: Constraints | None = None,
    guidance: GuidanceConfig | None = None,
    **options: Any,
) -> Request:
    """Checks what a caller of `lm.generate` asks for. Raises UserError."""
    if asked := sorted(options.keys() & set(CONSTRAINTS)):
        raise UserError(f"{asked[0]}: a constraint; use lm.control({asked[0]}=...)")
    s = SamplingConfig.from_config(lm.config["sample"], **options)
    n, seed = check_count("n", n), check_seed(lm.default("seed", seed))
    constraints = UNCONSTRAINED if constraints is None else constraints
    g = DEFAULT_GUIDANCE if guidance is None else guidance
    check_support(lm, constraints, s, g)
    if lm.cfg.known_length and constraints.known is None:
        constraints = draw_lengths(lm, constraints, n, seed)
    return Request(n, seed, constraints, s, g)


def check_support(
    lm: TrainedModel, constraints: Constraints, s: SamplingConfig, g: GuidanceConfig
) -> None:
    """Raises UserError for a setting that this model cannot follow."""
    for name, value, kind in (
        ("constraints", constraints, Constraints),
        ("guidance", g, GuidanceConfig),
    ):
        if not isinstance(value, kind):
            raise UserError(f"{name}={value!r}: give a {kind.__name__}")
    s.check_schedule(lm.schedule)
    if lm.distilled_steps not in (None, s.num_steps):
        raise UserError(
            f"num_steps={s.num_steps}: this model was distilled for "
            f"{lm.distilled_steps} steps; leave num_steps out, or load another student"
        )
    beyond = constraints
    if lm.cfg.known_source:
        beyond = constraints._replace(ids=None, known=None)
        if constraints.known is None or not pairs.are_pairs(constraints.ids):
            raise UserError(
                "this model was trained on pairs: give it sources, lm.translate(sources)"
            )
    if lm.cfg.causal and jax.tree.leaves(beyond):
        raise UserError("an autoregressive model takes no constraints")
    if lm.cfg.causal and g.cfg_weight != 1:
        raise UserError("cfg_weight: an autoregressive model does not take it")
    if lm.cfg.causal and s.trajectory:
        raise UserError("trajectory: an autoregressive model has no denoising steps")
    if g.token_time_floor < 1 and lm.cfg.marks_known:
        raise UserError(
            f"guidance.token_time_floor={g.token_time_floor}: a model with known_length "
            "or known_source has one time per text; leave it at 1"
        )
    if g.cfg_weight != 1 and not lm.supports_guidance:
        raise UserError(
            f"guidance.cfg_weight={g.cfg_weight}: this model was not trained with given "
            "tokens; train one with config.loss.conditioning_prob > 0"
        )


def draw_lengths(lm: TrainedModel, rows: Constraints, n: int, seed: int) -> Constraints:
    """Fixes START, END and PAD of n texts whose lengths are drawn as in training.

    The tokens that rows allow stay as they are, without special tokens.
    """
    counts = range(1, lm.length - 1)
    least = constraints.least_words(rows, n)
    words = constraints.draw_word_counts(lm.lengths, n, seed, counts, least)
    template = guidance.length_template(np.array(words), lm.length)
    ids, known = map(np.asarray, template)
    allowed = constraints.any_word(ids.shape, lm.tokenizer.vocab_size)
    if rows.allowed is not None:
        allowed = allowed & np.asarray(rows.allowed)
    return rows._replace(ids=ids, known=known, allowed=allowed)


def constraints_of(
    lm: TrainedModel, n: int, template: str | None, seed: int, wanted: dict[str, Any]
) -> Constraints:
    """Builds the constraints of n texts; gaps of a template get random widths."""
    positional = template is not None or wanted.keys() & constraints.POSITIONAL
    mode = lm.config["data"].get("mode") or "pad"
    if positional and mode != "pad":
        raise UserError(
            f"this model was trained on texts packed end to end (data.mode={mode}): it "
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
