# SPDX-License-Identifier: Apache-2.0
"""Constraints applied to a chain: wrappers of the denoiser and of the step."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from dlm_jax.data.annotations import LabelVocab
from dlm_jax.diffusion import classifier, guidance, model
from dlm_jax.diffusion.model import Denoise, Params
from dlm_jax.diffusion.samplers import Step
from dlm_jax.diffusion.schedule import Schedule
from dlm_jax.errors import UserError
from dlm_jax.inference.constraints import GuidanceClassifier, GuidanceConfig, Constraints
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.runtime import checkpoint, sharding
from dlm_jax.types import Array, Table


def load_classifier(workdir: str | Path, table: Table) -> GuidanceClassifier:
    """A classifier's newest checkpoint; UserError where it is of another table."""
    step = checkpoint.latest_step(workdir)
    config, words = checkpoint.read_json(workdir, step)
    if not {"names", "table"} <= words.keys():
        raise UserError(
            f"{workdir} is no classifier: train one, --mode train_classifier"
        )
    if words["table"] != checkpoint.checksum(table):
        raise UserError(
            f"{workdir} was trained on another embedding table than this model's: "
            "train a classifier with config.classifier.model set to this run"
        )
    try:
        names, cfg = LabelVocab(**words["names"]), DenoiserConfig(**config["model"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{workdir}: not one of this version: {error}") from error
    like = jax.eval_shape(lambda: classifier.init(jax.random.key(0), cfg, names.head_spec))
    found = checkpoint.restore_part(workdir, step, sharding.global_like({"ema": like}))
    return GuidanceClassifier(found["ema"], cfg, names)


def label_log_prob(
    wishes: Constraints,
    classifiers: Mapping[str, GuidanceClassifier],
    schedule: Schedule,
    *,
    mean: bool = False,
) -> guidance.LogProb:
    """log p of all labels that are asked, nats; mean: over a classifier's labels."""
    terms = [
        (
            classifier.log_prob(
                classifiers[task].params,
                classifiers[task].cfg,
                classifiers[task].names.layout,
                asked,
                schedule,
                mean=mean,
            ),
            1.0,
        )
        for task, asked in wishes.labels.items()
    ]
    return guidance.weighted_sum(*terms)


def constrain_denoiser(
    params: Params,
    cfg: DenoiserConfig,
    schedule: Schedule,
    wishes: Constraints,
    classifiers: Mapping[str, GuidanceClassifier],
    plan: GuidanceConfig,
    *,
    given: bool = False,
) -> Denoise:
    """The model's estimate given the wishes about words, and leaning to the labels.

    given: it learned to be given tokens.
    """
    denoise = model.bind(params, cfg, schedule=schedule)
    about_words = [(guidance.contains_phrase(phrase), 1.0) for phrase in wishes.phrases]
    if wishes.excluded is not None:
        about_words.append((guidance.excludes_tokens(wishes.excluded), 1.0))
    tells = given and wishes.known is not None
    if tells or wishes.allowed is not None or about_words:
        read = model.bind_logits(params, cfg, schedule=schedule)
        if tells:
            read = _condition_on_known(read, params.table, wishes, plan)
        if wishes.allowed is not None:
            read = guidance.restrict_tokens(read, params.table, wishes.allowed)
        denoise = guidance.drop_logits(read)
        if about_words:
            wish = guidance.weighted_sum(*about_words)
            denoise = guidance.token_guidance(read, wish, schedule, weight=plan.weight)
    of = label_log_prob(wishes, classifiers, schedule)
    if wishes.labels and plan.share < 1:
        denoise = guidance.token_time_guidance(denoise, of, share=plan.share)
    if wishes.labels and plan.lean:
        denoise = guidance.classifier_guidance_x0(denoise, of, schedule, weight=plan.lean)
    return denoise


def _condition_on_known(read: model.DenoiseLogits, table: Table, wishes: Constraints, plan: GuidanceConfig) -> model.DenoiseLogits:
    """The model told the known tokens, plan.scale times as much as it makes of them."""
    told = guidance.condition_on_tokens(read, table, wishes.ids, wishes.known)
    if plan.scale == 1:
        return told
    return guidance.classifier_free_guidance(told, read, weight=plan.scale)


def constrain_step(
    step: Step,
    table: Table,
    schedule: Schedule,
    wishes: Constraints,
    classifiers: Mapping[str, GuidanceClassifier],
    plan: GuidanceConfig,
) -> Step:
    """The step, then the classifiers' push, then the known tokens."""
    if wishes.labels and plan.updates:
        step = guidance.gradient_guidance(
            step,
            label_log_prob(wishes, classifiers, schedule, mean=plan.mean),
            schedule,
            rule=plan.rule,
            lr=plan.lr,
            updates=plan.updates,
            fluency=plan.fluency,
            between=plan.between,
        )
    if wishes.known is None:
        return step
    # where a free reading is compared with one that is told, it may not see them clean
    noised = plan.noised or plan.scale != 1
    return guidance.infill(
        step, table, wishes.ids, wishes.known, schedule, noised=noised
    )


def apply_known(ids: Array, wishes: Constraints) -> Array:
    """The ids with the known tokens in their places [n l]."""
    if wishes.known is None:
        return ids
    return jnp.where(wishes.known, wishes.ids, ids)
