# SPDX-License-Identifier: Apache-2.0
"""Constraints applied to a reverse chain, as wrappers of the denoiser and the step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dlm_jax.data.annotations import LabelVocab
from dlm_jax.diffusion import classifier, guidance, model
from dlm_jax.diffusion.model import Denoise, Params
from dlm_jax.diffusion.samplers import Step
from dlm_jax.diffusion.schedule import Schedule
from dlm_jax.errors import UserError
from dlm_jax.inference import arguments
from dlm_jax.inference.constraints import Constraints, GuidanceClassifier
from dlm_jax.inference.guidance_config import GuidanceConfig
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.runtime import backend, checkpoint, sharding
from dlm_jax.types import Array, Ids, Logits, Table


@backend.prepared
def load_classifier(workdir: Any, table: Table) -> GuidanceClassifier:
    """Loads a classifier's newest checkpoint; UserError if it is of another table."""
    workdir = arguments.as_folder("workdir", workdir)
    workdir, step = checkpoint.run_directory(workdir)
    step = checkpoint.choose_step(workdir, step)
    record = checkpoint.read_records(workdir, step)
    kind = record.run.get("kind")
    if kind != "classifier":
        raise UserError(
            f"{workdir} holds a {kind} model: train a classifier with "
            "--mode train_classifier"
        )
    if record.run.get("table") != checkpoint.checksum(table):
        raise UserError(
            f"{workdir} was trained on another embedding table than this model's: "
            "train a classifier with config.classifier.model set to this run"
        )
    like = classifier_like(workdir, record.config, record.run)
    parts = sharding.global_like({"ema": like.params})
    return like._replace(params=checkpoint.restore_part(workdir, step, parts)["ema"])


def classifier_like(
    where: str, config: Mapping[str, Any], run: Mapping[str, Any]
) -> GuidanceClassifier:
    """Returns a saved classifier with the shapes of its parameters. Raises UserError.

    config: with its section model; run: with its labels; where: named in the error.
    """
    try:
        vocab = LabelVocab(**run["labels"])
        cfg = DenoiserConfig(**config["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: saved by another version of dlm_jax ({error}); train it again"
        ) from error
    key, spec = jax.random.key(0), vocab.head_spec
    params: Any = jax.eval_shape(lambda: classifier.init(key, cfg, spec))
    return GuidanceClassifier(params, cfg, vocab)


def label_log_prob(
    constraints: Constraints,
    classifiers: Mapping[str, GuidanceClassifier],
    schedule: Schedule,
    *,
    mean: bool = False,
) -> guidance.LogProb:
    """Returns log p(all target labels | x_t) in nats.

    mean: average over the labels of each classifier instead of summing.
    """
    terms = []
    for task, labels in constraints.labels.items():
        params, cfg, vocab = classifiers[task]
        log_prob = classifier.log_prob(
            params, cfg, vocab.head_spec, labels, schedule, mean=mean
        )
        terms.append((log_prob, 1.0))
    return guidance.weighted_sum(*terms)


def constrain_denoiser(
    params: Params,
    cfg: DenoiserConfig,
    schedule: Schedule,
    constraints: Constraints,
    classifiers: Mapping[str, GuidanceClassifier],
    config: GuidanceConfig,
    *,
    supports_conditioning: bool = False,
) -> Denoise:
    """Returns the model's denoiser, wrapped for every constraint on x0_hat.

    supports_conditioning: the model was trained with tokens given at time 0.
    """
    denoise = _constrain_tokens(
        params, cfg, schedule, constraints, config, supports_conditioning
    )
    if not constraints.labels:
        return denoise
    log_prob = label_log_prob(constraints, classifiers, schedule)
    if config.uses("token_time_floor"):
        denoise = guidance.token_time_guidance(
            denoise, log_prob, floor=config.token_time_floor
        )
    if config.uses("x0_weight"):
        denoise = guidance.classifier_guidance_x0(
            denoise, log_prob, schedule, weight=config.x0_weight
        )
    return denoise


def _constrain_tokens(
    params: Params,
    cfg: DenoiserConfig,
    schedule: Schedule,
    constraints: Constraints,
    config: GuidanceConfig,
    supports_conditioning: bool,
) -> Denoise:
    """Returns the denoiser under the constraints on tokens: known, allowed, phrases."""
    conditions = [(guidance.contains_phrase(ids), 1.0) for ids in constraints.phrases]
    if constraints.excluded is not None:
        conditions.append((guidance.excludes_tokens(constraints.excluded), 1.0))
    if conditions and cfg.known_source:
        conditions = [
            (_in_target(condition, constraints.ids), w) for condition, w in conditions
        ]
    conditioned = supports_conditioning or cfg.marks_known
    condition_on_known = conditioned and constraints.known is not None
    if not (condition_on_known or constraints.allowed is not None or conditions):
        return model.bind(params, cfg, schedule=schedule)
    denoise_logits = model.bind_logits(params, cfg, schedule=schedule)
    if constraints.allowed is not None:  # before guidance, which mixes the estimates
        denoise_logits = guidance.restrict_tokens(
            denoise_logits, params.table, constraints.allowed
        )
    if condition_on_known:
        denoise_logits = _condition_on_known(
            denoise_logits,
            params.table,
            constraints,
            config,
            cfg=cfg,
            words=supports_conditioning,
        )
    if not conditions:
        return guidance.drop_logits(denoise_logits)
    return guidance.token_guidance(
        denoise_logits,
        guidance.weighted_sum(*conditions),
        schedule,
        weight=config.token_weight,
    )


def _in_target(condition: guidance.TokenLogProb, ids: Ids) -> guidance.TokenLogProb:
    """Returns the condition on the tokens of a pair's target alone."""
    source = model.source(ids)[..., None]

    def inside(log_p: Logits) -> Array:
        return condition(jnp.where(source, -1e9, log_p))

    return inside


def _condition_on_known(
    denoise_logits: model.DenoiseLogits,
    table: Table,
    constraints: Constraints,
    config: GuidanceConfig,
    *,
    cfg: DenoiserConfig,
    words: bool,
) -> model.DenoiseLogits:
    """Conditions on known tokens, with classifier-free guidance of weight cfg_weight.

    words: the model was trained with known words, besides what it is always given.
    """
    ids, fixed = constraints.ids, constraints.known
    given = model.given_tokens(ids, cfg)
    outside = None if given is None else given[1] & fixed
    always = None if given is None else given[0] & fixed

    def condition(ids: Ids, known: Any) -> model.DenoiseLogits:
        return guidance.condition_on_tokens(
            denoise_logits, table, ids, known, outside=outside
        )

    conditional = condition(ids, fixed if words else always)
    if not config.uses("cfg_weight"):
        return conditional
    if cfg.known_source:  # the template stays
        free = condition(model.empty_source(ids), fixed if words else always)
    else:
        free = denoise_logits if always is None else condition(ids, always)
    return guidance.classifier_free_guidance(
        conditional, free, weight=config.cfg_weight
    )


def constrain_step(
    step: Step,
    table: Table,
    schedule: Schedule,
    constraints: Constraints,
    classifiers: Mapping[str, GuidanceClassifier],
    config: GuidanceConfig,
) -> Step:
    """Returns the step, followed by classifier guidance, then by the known tokens."""
    if constraints.labels and config.num_updates:
        log_prob = label_log_prob(
            constraints, classifiers, schedule, mean=config.mean_over_labels
        )
        step = guidance.gradient_guidance(
            step,
            log_prob,
            schedule,
            rule=config.rule,
            lr=config.lr,
            num_updates=config.num_updates,
            fluency=config.fluency,
            t_range=config.t_range,
        )
    if constraints.known is None:
        return step
    # the unconditional half of classifier-free guidance must not see clean known tokens
    noised = config.noise_known or config.uses("cfg_weight")
    return guidance.infill(
        step, table, constraints.ids, constraints.known, schedule, noised=noised
    )


def apply_known(ids: Array, constraints: Constraints) -> Array:
    """Returns the ids with the known tokens in their places [n l]."""
    if constraints.known is None:
        return ids
    return jnp.where(constraints.known, constraints.ids, ids)
