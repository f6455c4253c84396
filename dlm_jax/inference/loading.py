# SPDX-License-Identifier: Apache-2.0
"""Loads a model from a run's checkpoint, or from one of the published code."""

import dataclasses
import functools
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
from dlm_jax.errors import UserError, choices
from dlm_jax.inference import arguments, conditioning, hub, pretrained, published
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.inference.sampling_config import TRANSLATION
from dlm_jax.inference.trained_model import adapted_schedule
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.ranges import integer
from dlm_jax.runtime import backend, checkpoint, compilation, sharding
from dlm_jax.types import Integer, PyTree


@backend.prepared
def load(workdir: Any, step: Integer | None = None) -> DiffusionLM:
    """Loads a model: of a run, of a folder of `save_pretrained`, or by a name.

    The name is that of a bundled model, or owner/name of the Hugging Face Hub.
    A run's newest checkpoint is loaded, or that of `step`; a run's folder `checkpoints`,
    or that of a step inside it, stands for the run. A folder may also hold a checkpoint
    of the published code. Raises UserError if there is none, or if it is damaged.
    """
    compilation.keep_for_library()
    workdir = arguments.as_folder("workdir", workdir)
    step = None if step is None else integer("step", step)
    folder = pretrained.find(workdir)
    if folder is None and hub.is_name(workdir):
        folder = hub.download(workdir)
    if folder is not None:
        if step is not None:
            raise UserError(f"step={step}: {folder} holds one model, no checkpoints")
        return _from_pretrained(folder)
    if published.is_reference(workdir):
        cfg, params, tok, _ = published.load_reference(workdir)
        return from_parts(cfg, params, tok, published.reference_config(workdir))
    workdir, step = checkpoint.run_directory(workdir, step)
    step = _choose_step(workdir, step)
    record = checkpoint.read_records(workdir, step)
    if record.run.get("kind") == "classifier":
        raise UserError(f"{workdir} is a classifier: pass it to lm.with_classifier")
    tok = tokenizer.from_dict(record.tokenizer)
    cfg, start, like = model_shapes(record.config, tok.vocab_size)
    parts = {"params": like, "ema": like}
    if record.config["schedule"].get("adaptive"):
        parts["schedule_state"] = jax.eval_shape(lambda: adaptive.init(start))
    state = checkpoint.restore_part(workdir, step, sharding.global_like(parts))
    params, lengths = state.pop("params"), tuple(record.run.get("lengths") or ())
    return from_parts(
        cfg, params, tok, record.config, step=step, lengths=lengths, **state
    )


def _choose_step(workdir: checkpoint.PathLike, step: int | None) -> int:
    """Returns a run's step; names the bundled models if there is no such folder."""
    place = checkpoint.resolve_workdir(workdir)
    if place.exists() and not place.is_dir():
        raise UserError(f"{workdir} is a file: give the folder of a run or of a model")
    if not place.exists():
        names = sorted(pretrained.bundled())
        raise UserError(
            f"{workdir}: no such folder, so no checkpoint; give a run's, or of the "
            f"bundled models {choices(workdir, names)}"
        )
    return checkpoint.choose_step(workdir, step)


def _from_pretrained(folder: Path) -> DiffusionLM:
    saved = pretrained.read(folder)
    cfg, start, like = model_shapes(saved.config, saved.tokenizer.vocab_size)
    parts = {"ema": like}
    if saved.config["schedule"]["adaptive"]:
        parts["schedule_state"] = jax.eval_shape(lambda: adaptive.init(start))
    state = pretrained.unflatten(saved.arrays, parts)
    lm = from_parts(
        cfg,
        state.pop("ema"),
        saved.tokenizer,
        saved.config,
        step=saved.step,
        lengths=saved.lengths,
        **state,
    )
    classifiers = {}
    for task, (record, arrays) in saved.classifiers.items():
        like = conditioning.classifier_like(str(folder), record, record)
        params = pretrained.unflatten(arrays, {"ema": like.params})["ema"]
        classifiers[task] = like._replace(params=params)
    return dataclasses.replace(lm, classifiers=classifiers)


MIN_SHARED_VOCAB = 0.9  # of an autoregressive model and the run that it scores


def load_ar_model(name: str, workdir: str, lm: DiffusionLM) -> DiffusionLM | None:
    """Loads the autoregressive model that an option names; None if it is not set.

    Raises UserError if its vocabulary or length does not cover those of lm.
    """
    if not workdir:
        return None
    ar_model, flag = load(workdir), f"{name}={workdir}"
    if not ar_model.cfg.causal:
        raise UserError(f"{flag}: not of objective 'ar'")
    vocab, other = (set(m.tokenizer.tokens()) for m in (lm, ar_model))
    shared, total = len(vocab & other), len(vocab | other)
    if shared < MIN_SHARED_VOCAB * total or ar_model.length < lm.length:
        raise UserError(
            f"{flag}: trained on other text, or shorter ({shared} of {total} words "
            f"shared, length {ar_model.length} for {lm.length}); train one on this "
            "run's data"
        )
    return ar_model


def model_shapes(config: dict, vocab: int) -> tuple[DenoiserConfig, Schedule, PyTree]:
    """Returns (network, schedule, shapes of Params) of a saved config. Raises UserError."""
    try:
        cfg = DenoiserConfig(**config["model"])
        bounds = {
            "layers": 2**10,
            "hidden_dim": 2**20,
            "mlp_dim": 2**22,
            "positions": 2**24,
        }
        for name, most in bounds.items():
            if not 0 < getattr(cfg, name) <= most:
                raise ValueError(f"model.{name}={getattr(cfg, name)}")
        if (config["schedule"].get("num_steps") or 0) > 2**24:
            raise ValueError(f"schedule.num_steps={config['schedule']['num_steps']}")
        noise, key = schedule.make_schedule(**config["schedule"]), jax.random.key(0)
        return cfg, noise, jax.eval_shape(lambda: model.init(key, cfg, vocab))
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(
            f"the saved config is not one of this version: {error}"
        ) from error


# options that the configs of older runs lack
LATER_EVALUATE = {"references": "", "mbr": 10, "gpt2": "", "ode_texts": 0}
LATER = {
    "source_column": "",
    "delexicalize": (),
    "delimiter": "",
    "tokenizer_path": "",
    "byte_fallback": False,
}


def from_parts(
    cfg: DenoiserConfig,
    params: Params,
    tok: tokenizer.Tokenizer,
    config: dict,
    *,
    ema: Params | None = None,
    schedule_state: Any = (),
    step: int = 0,
    lengths: tuple[int, ...] = (),
) -> DiffusionLM:
    """Builds a model from its parts; ema defaults to params. Raises UserError.

    config: the saved one; it gets the options that came later, as they were: off.
    """
    if tok.vocab_size != params.table.shape[0]:
        raise UserError(
            f"the tokenizer has {tok.vocab_size} words and the embedding "
            f"{params.table.shape[0]}: they are not of one checkpoint"
        )
    config = config | {"data": LATER | config["data"]}
    if "evaluate" in config:
        config["evaluate"] = LATER_EVALUATE | config["evaluate"]
    if "sample" in config:
        config["sample"] = TRANSLATION | config["sample"]
    noise_schedule = schedule.make_schedule(**config["schedule"])
    if jax.tree.leaves(schedule_state):
        adapted = jax.jit(functools.partial(adapted_schedule, config))
        noise_schedule = jax.device_get(adapted(schedule_state))
    ema = params if ema is None else ema
    return DiffusionLM(
        params, ema, cfg, noise_schedule, tok, config, step, schedule_state, lengths
    )
