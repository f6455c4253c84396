# SPDX-License-Identifier: Apache-2.0
"""The programmatic API: generate with a trained model, control it, score texts.

lm = dlm_jax.load("runs/quickstart")
lm.sample(4, seed=0, num_steps=64)
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dlm_jax.data import encoding, pairs
from dlm_jax.errors import UserError
from dlm_jax.inference import (
    arguments,
    card,
    conditioning,
    pretrained,
    request,
    sampling,
    scoring,
    streaming,
    translation,
)
from dlm_jax.inference.guidance_config import GuidanceConfig
from dlm_jax.inference.trained_model import TrainedModel
from dlm_jax.ranges import real
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

        Classifiers come along, and a model card. dtype: bfloat16 or float32, of the
        weights. Raises UserError if the folder holds anything.
        """
        folder = arguments.as_folder("folder", folder)
        pretrained.write(folder, card.contents(self, dtype), dtype)

    def sample(self, n: Integer, **options: Any) -> list[str]:
        """Generates n texts; options: those of `generate`."""
        return self.generate(n, **options).texts

    @backend.prepared
    def generate(
        self,
        n: Integer,
        *,
        batch: Integer | None = None,
        **options: Any,
    ) -> Samples:
        """Generates n samples as texts, ids and latents. Raises UserError.

        Sample i depends only on (seed, i), not on n or the batch size. options: seed,
        from 0 to 2**64 - 1; constraints, a `Constraints`; guidance, a `GuidanceConfig`;
        fields of `SamplingConfig`, such as num_steps, solver and clamp, and the solver's
        own, such as eta. What is not given comes from the run's config.
        trajectory=True also returns the ids of every step.
        """
        batch = request.check_count("batch", self.default("batch", batch))
        wanted = request.make_request(self, n, **options)
        latents, ids, trajectory = sampling.run_chain(self, wanted, batch)
        return Samples(self.decode(ids), ids, latents, trajectory)

    def infill(self, template: Any, n: Integer = 5, **options: Any) -> list[str]:
        """Generates n texts from a template such as "The ___ is a pub [...]".

        ___ stands for one word, [...] for 1 to 10, drawn per text as room allows; at the
        end, or if the length is given or drawn, 1 or more. The other words come back
        exactly. options: those of `control`.
        """
        return self.control(n, template=request.check_template(template), **options)

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
        n = request.check_count("n", n)
        rows = request.take_constraints(self, n, template, options)
        return self.generate(n, constraints=rows, guidance=guidance, **options).texts

    @backend.prepared
    def stream(self, n: Integer = 1, **options: Any) -> Iterator[streaming.Frame]:
        """Generates as `control` does, or `translate` given sources=, a step at a time.

        Yields ids [n l] and their confidence [n l] after each step. options: those of
        `control` or `translate`, but mbr and batch. Raises UserError.
        """
        return streaming.stream(self, [streaming.ask(self, n, **options).request])

    @backend.prepared
    def translate(self, sources: Any, **options: Any) -> Any:
        """Generates the target of each source, for a model of pairs; see `translation`."""
        return translation.translate(self, sources, **options)

    @backend.prepared
    def nll(
        self,
        ids: AnyIds,
        *,
        draws: Integer = 8,
        seed: Integer = 0,
        tolerance: Real | None = None,
        estimator: str = "variational",
        num_steps: Integer | None = None,
    ) -> scoring.EstimatedBound:
        """Estimates the bound on -log p of each row of ids [n l]: nats, as named terms [n].

        Its field stderr [n] is the standard error of `total()`, over draws of the noise
        for each row, and tokens [n l] are the nats of each token, without those of the
        length. estimator, num_steps: see `scoring.Estimator`. tolerance: nats; repeats
        the estimate of each row until its error is at most this, or until
        `scoring.MAX_DRAWS`. An autoregressive model's -log p is exact, in the field
        `rounding`. Of a pair it is that of the target given the source. Raises UserError.
        """
        ids = arguments.check_ids(ids, self.length, self.tokenizer.vocab_size)
        if self.cfg.known_source and not pairs.are_pairs(ids):
            raise UserError("ids: not pairs; give lm.encode(targets, sources=...)")
        how = scoring.choose_estimator(self, estimator, draws, num_steps)
        tolerance = None if tolerance is None else real("tolerance", tolerance, over=0)
        key = sampling.key_of_seed(request.check_seed(seed))
        return scoring.nll(key, self, ids, how, tolerance)

    @backend.prepared
    def features(self, ids: AnyIds) -> np.ndarray:
        """Returns an autoregressive model's mean hidden state of each row [n h]."""
        if not self.cfg.causal:
            raise UserError("features: needs an autoregressive model (objective 'ar')")
        ids = arguments.check_ids(ids, self.length, self.tokenizer.vocab_size)
        return scoring.features(self, ids)

    def encode(self, texts: Any, sources: Any = None) -> np.ndarray:
        """Encodes texts as ids [n l] with START and END, padded or packed as in training.

        In pad mode a text that is too long is truncated. A single string is one text.
        sources: of these targets, for a model of pairs. Raises UserError.
        """
        texts = arguments.as_texts("texts", texts)
        if self.cfg.known_source or sources is not None:
            return translation.encode_pairs(self, sources, texts)
        layout = {"length": self.length, "mode": self.config["data"]["mode"]}
        return encoding.encode(texts, self.tokenizer, **layout, too_long="truncate")

    def denoising_trajectory(self, n: Integer, **options: Any) -> list[list[str]]:
        """Returns, for each of n samples, the text that x0_hat rounds to at every step."""
        options["trajectory"] = True
        ids: Any = self.generate(n, **options).trajectory
        return [self.decode(rows) for rows in ids]
