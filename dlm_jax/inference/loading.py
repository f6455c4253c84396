# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint of ours, or a published one, to a model that samples."""

from pathlib import Path
from typing import Any

import jax

from dlm_jax.data import tokenizer
from dlm_jax.diffusion import (
    adaptive,
    model,
    schedule,
)
from dlm_jax.diffusion.model import Params
from dlm_jax.diffusion.schedule import Schedule
from dlm_jax.errors import UserError
from dlm_jax.inference import published
from dlm_jax.inference.pipeline import DiffusionLM, schedule_from_state
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.runtime import checkpoint, sharding
from dlm_jax.types import PyTree


def load(workdir: str | Path, step: int | None = None) -> DiffusionLM:
    """A run's newest checkpoint (or `step`), or a published checkpoint folder.

    Raises UserError, one line, where there is none or it is damaged.
    """
    if published.is_reference(workdir):
        cfg, params, tok, _ = published.load_reference(workdir)
        return from_parts(cfg, params, tok, published.reference_config(workdir))
    step = checkpoint.latest_step(workdir, step)
    config, words = checkpoint.read_json(workdir, step)
    if "names" in words:
        raise UserError(f"{workdir} is a classifier: give it to bundle.with_classifier")
    tok = tokenizer.from_dict(words)
    cfg, noise, like = model_shapes(config, tok.vocab_size)
    parts = {"params": like, "ema": like}
    if config["schedule"].get("adaptive"):
        parts["noise"] = jax.eval_shape(lambda: adaptive.init(noise))
    found = checkpoint.restore_part(workdir, step, sharding.global_like(parts))
    return from_parts(cfg, found.pop("params"), tok, config, step=step, **found)


MIN_SHARED_VOCAB = 0.9  # share of the words that a teacher and a run have in common


def load_ar_model(name: str, workdir: str, lm: DiffusionLM) -> DiffusionLM | None:
    """The teacher of that option, if it knows the very words and lengths of the run."""
    if not workdir:
        return None
    teacher, flag = load(workdir), f"{name}={workdir}"
    if not teacher.cfg.causal:
        raise UserError(f"{flag}: not of objective 'ar'")
    mine, its = (set(b.tokenizer.tokens()) for b in (lm, teacher))
    if len(mine & its) < MIN_SHARED_VOCAB * len(mine | its) or teacher.length < lm.length:
        raise UserError(
            f"{flag}: trained on other text, or shorter ({len(mine & its)} of "
            f"{len(mine | its)} words shared, length {teacher.length} for "
            f"{lm.length}); train one on this run's data"
        )
    return teacher


def model_shapes(config: dict, vocab: int) -> tuple[DenoiserConfig, Schedule, PyTree]:
    """(network, schedule, shapes of Params) that a resolved config describes."""
    try:
        cfg = DenoiserConfig(**config["model"])
        bounds = {"layers": 2**10, "width": 2**20, "ff": 2**22, "positions": 2**24}
        for name, most in bounds.items():
            if not 0 < getattr(cfg, name) <= most:
                raise ValueError(f"model.{name}={getattr(cfg, name)}")
        if (config["schedule"].get("steps") or 0) > 2**24:
            raise ValueError(f"schedule.steps={config['schedule']['steps']}")
        noise, key = schedule.make_schedule(**config["schedule"]), jax.random.key(0)
        return cfg, noise, jax.eval_shape(lambda: model.init(key, cfg, vocab))
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(
            f"the saved config is not one of this version: {error}"
        ) from error


def from_parts(
    cfg: DenoiserConfig,
    params: Params,
    tok: tokenizer.Tokenizer,
    config: dict,
    *,
    ema: Params | None = None,
    noise: Any = (),
    step: int = 0,
) -> DiffusionLM:
    """A bundle from its parts; ema defaults to params; noise: what the schedule knows."""
    if tok.vocab_size != params.table.shape[0]:
        raise UserError(
            f"the tokenizer has {tok.vocab_size} words and the embedding "
            f"{params.table.shape[0]}: they are not of one checkpoint"
        )
    found = schedule.make_schedule(**config["schedule"])
    if noise:
        found = jax.device_get(schedule_from_state(config, noise))
    ema = params if ema is None else ema
    return DiffusionLM(params, ema, cfg, found, tok, config, step, noise)
