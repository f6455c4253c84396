# SPDX-License-Identifier: Apache-2.0
"""The programmatic API: generate with a trained model, control it, score texts.

lm = dlm_jax.load("runs/quickstart")
lm.sample(4, seed=0, num_steps=64)
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from dlm_jax.data import encoding
from dlm_jax.diffusion import guidance
from dlm_jax.errors import UserError
from dlm_jax.inference import (
    arguments,
    conditioning,
    constraints,
    pretrained,
    sampling,
    scoring,
)
from dlm_jax.inference.constraints import CONSTRAINTS, UNCONSTRAINED, Constraints
from dlm_jax.inference.guidance_config import DEFAULT_GUIDANCE, GuidanceConfig
from dlm_jax.inference.sampling_config import OPTIONS, SamplingConfig, check_names
from dlm_jax.inference.trained_model import TrainedModel
from dlm_jax.ranges import integer, real
from dlm_jax.runtime import backend
from dlm_jax.types import AnyIds, Integer, Real


class Samples(NamedTuple):
    """Generated texts [n], their ids [n l], and latents [n l d]: the last x0_hat.

    trajectory [n num_steps l]: the ids that x0_hat rounds to after every step, or None.
    """

    texts: list[str]
    ids: np.ndarray
    latents: np.ndarray
    trajectory: np.ndarray | None


class DiffusionLM(TrainedModel):
    """A trained model, diffusion or autoregressive: generates, controls, scores texts.

    Its fields, such as params, ema, cfg, schedule and tokenizer, are `TrainedModel`'s.
    """

    def with_classifier(self, *workdirs: Any) -> "DiffusionLM":
        """Returns this model with the classifiers of runs of --mode train_classifier."""
        loaded = [conditioning.load_classifier(w, self.ema.table) for w in workdirs]
        by_task = dict(self.classifiers) | {c.vocab.task: c for c in loaded}
        return dataclasses.replace(self, classifiers=by_task, compiled={})

    @backend.prepared
    def save_pretrained(self, folder: Any, *, dtype: Any = "bfloat16") -> None:
        """Saves the averaged weights and what sampling needs, for `dlm_jax.load`.

        dtype: bfloat16 or float32, of the weights. Classifiers are not saved. Raises
        UserError if the folder holds anything.
        """
        folder = arguments.as_folder("folder", folder)
        parts = {"ema": self.ema, "schedule_state": self.schedule_state}
        arrays = pretrained.flatten(parts)
        saved = pretrained.Pretrained(
            self.config, self.tokenizer, arrays, self.step, self.lengths
        )
        pretrained.write(folder, saved, dtype)

    def sample(self, n: Integer, **options: Any) -> list[str]:
        """Generates n texts; options: those of `generate`."""
        return self.generate(n, **options).texts

    @backend.prepared
    def generate(
        self,
        n: Integer,
        *,
        seed: Integer | None = None,
        batch: Integer | None = None,
        constraints: Constraints | None = None,
        guidance: GuidanceConfig | None = None,
        **options: Any,
    ) -> Samples:
        """Generates n samples as texts, ids and latents. Raises UserError.

        Sample i depends only on (seed, i), not on n or the batch size. seed: from 0 to
        2**64 - 1. options: fields of `SamplingConfig`, such as num_steps, solver and
        clamp, and the solver's own, such as eta; what is not given comes from the run's
        config. trajectory=True also returns the ids of every step.
        """
        if asked := sorted(options.keys() & set(CONSTRAINTS)):
            raise UserError(f"{asked[0]}: a constraint; use lm.control({asked[0]}=...)")
        s = SamplingConfig.from_config(self.config["sample"], **options)
        n, batch = _count("n", n), _count("batch", self._default("batch", batch))
        seed = _seed(self._default("seed", seed))
        constraints = UNCONSTRAINED if constraints is None else constraints
        guidance = DEFAULT_GUIDANCE if guidance is None else guidance
        sampling.check_support(self, constraints, s, guidance)
        if self.cfg.known_length and constraints.known is None:
            constraints = _draw_lengths(self, constraints, n, seed)
        latents, ids, trajectory = sampling.run_chain(
            self, n, seed, batch, constraints, s, guidance
        )
        return Samples(list(map(self.tokenizer.decode, ids)), ids, latents, trajectory)

    def infill(self, template: Any, n: Integer = 5, **options: Any) -> list[str]:
        """Generates n texts from a template such as "The ___ is a pub [...]".

        ___ stands for one word, [...] for 1 to 10, drawn per text as room allows; at the
        end, or if the length is given or drawn, 1 or more. The other words come back
        exactly. options: those of `control`.
        """
        return self.control(n, template=_template(template), **options)

    @backend.prepared
    def control(
        self,
        n: Integer = 5,
        *,
        template: Any = None,
        guidance: GuidanceConfig | None = None,
        **options: Any,
    ) -> list[str]:
        """Generates n texts under constraints, such as lm.control(length=12).

        options: those of `constraints.parse_constraints` and of `generate`.
        """
        check_names(options, {*CONSTRAINTS, *OPTIONS, "seed", "batch"})
        named = {name: options.pop(name, None) for name in CONSTRAINTS}
        wanted = arguments.plain(named)
        template = None if template is None else _template(template)
        n, seed = _count("n", n), _seed(self._default("seed", options.get("seed")))
        rows = _constraints(self, n, template, seed, wanted)
        return self.generate(n, constraints=rows, guidance=guidance, **options).texts

    @backend.prepared
    def nll(
        self,
        ids: AnyIds,
        *,
        draws: Integer = 8,
        seed: Integer = 0,
        tolerance: Real | None = None,
    ) -> scoring.EstimatedBound:
        """Estimates the bound on -log p of each row of ids [n l]: nats, as named terms [n].

        Its field stderr [n] is the standard error of `total()`. draws: noise levels per
        row. tolerance: nats; repeats the estimate of each row until its standard error
        is at most this, or until `scoring.MAX_DRAWS`. For an autoregressive model
        -log p is exact, stored whole in the field `rounding`. Raises UserError.
        """
        ids = arguments.check_ids(ids, self.length, self.tokenizer.vocab_size)
        tolerance = None if tolerance is None else real("tolerance", tolerance, over=0)
        key = sampling.key_of_seed(_seed(seed))
        return scoring.nll(key, self, ids, _count("draws", draws), tolerance)

    @backend.prepared
    def features(self, ids: AnyIds) -> np.ndarray:
        """Returns an autoregressive model's mean hidden state of each row [n h]."""
        if not self.cfg.causal:
            raise UserError("features: needs an autoregressive model (objective 'ar')")
        ids = arguments.check_ids(ids, self.length, self.tokenizer.vocab_size)
        return scoring.features(self, ids)

    def encode(self, texts: Any) -> np.ndarray:
        """Encodes texts as ids [n l] with START and END, padded or packed as in training.

        In pad mode a text that is too long is truncated. A single string is one text.
        Raises UserError.
        """
        texts = arguments.as_texts("texts", texts)
        layout = {"length": self.length, "mode": self.config["data"]["mode"]}
        return encoding.encode(texts, self.tokenizer, **layout, too_long="truncate")

    def denoising_trajectory(self, n: Integer, **options: Any) -> list[list[str]]:
        """Returns, for each of n samples, the text that x0_hat rounds to at every step."""
        options["trajectory"] = True
        ids = self.generate(n, **options).trajectory
        assert ids is not None
        return [[self.tokenizer.decode(row) for row in rows] for rows in ids]

    def sampling_config(self, **options: Any) -> SamplingConfig:
        """Returns the run's sampling settings with these options. Raises UserError."""
        s = SamplingConfig.from_config(self.config["sample"], **options)
        s.check_schedule(self.schedule)
        return s

    def _default(self, name: str, value: Integer | None) -> Integer:
        if value is None and name not in self.config["sample"]:
            raise UserError(f"{name}: the saved config does not set it; pass it")
        return self.config["sample"][name] if value is None else value


def _draw_lengths(
    lm: TrainedModel, rows: Constraints, n: int, seed: int
) -> Constraints:
    """Fixes START, END and PAD of n texts whose lengths are drawn as in training."""
    counts = range(1, lm.length - 1)
    least = constraints.least_words(rows, n)
    words = constraints.draw_word_counts(lm.lengths, n, seed, counts, least)
    template = guidance.length_template(np.array(words), lm.length)
    ids, known = map(np.asarray, template)
    allowed = constraints.any_word(ids.shape, lm.tokenizer.vocab_size)
    return rows._replace(ids=ids, known=known, allowed=allowed)


def _constraints(
    lm: TrainedModel, n: int, template: str | None, seed: int, wanted: dict[str, Any]
) -> Constraints:
    """Builds the constraints of n texts; gaps of a template get random widths."""
    positional = template is not None or wanted.keys() & constraints.POSITIONAL
    if positional and lm.config["data"].get("mode") == "block":
        raise UserError(
            "this model was trained on texts packed end to end (data.mode=block): it "
            "takes no constraint on lengths or positions"
        )
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


def _template(value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"template={value!r}: give a text with ___ or [...]")
    return value


def _count(name: str, value: Integer) -> int:
    return integer(name, value, 1, 2**31 - 1)


def _seed(value: Integer) -> int:
    return integer("seed", value, 0, 2**64 - 1)
