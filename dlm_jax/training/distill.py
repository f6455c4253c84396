# SPDX-License-Identifier: Apache-2.0
"""Distillation: a run per student, each starting from the one before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dlm_jax import console
from dlm_jax.data.corpus import Corpus, load_corpus
from dlm_jax.diffusion import distillation
from dlm_jax.errors import UserError
from dlm_jax.inference import loading
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.ranges import integer, real
from dlm_jax.runtime import backend, checkpoint
from dlm_jax.training import loop
from dlm_jax.training.config import refuse_ignored, resolve_config
from dlm_jax.training.train_step import StepConfig, TrainingTask
from dlm_jax.training.trainer import Job, make_preview

PLACES = ("path", "valid_path", "tfds_dir")  # of the teacher's text, which may move
UNREAD = ("loss.objective", "distill.student", "sample.num_steps", "classifier")


@backend.prepared
def distill(
    config: Any,
    workdir: str,
    *,
    allow_fallback: bool = False,
    given: Mapping[str, Any] | None = None,
) -> None:
    """Trains the students of config.distill; arguments and errors as of `loop.train`.

    They are workdir/32_steps, workdir/16_steps, ... for config.distill.num_steps; each
    is a run that all modes load. given: {name: value} of config's flags, of which none
    may be without effect.
    """
    teacher = load_teacher(config)
    student = teacher
    flags = {k: v for k, v in (given or {}).items() if k != "distill.num_steps"}
    refuse_ignored(flags, student_config(config, teacher, 0), UNREAD, "distill.teacher")
    for num_steps in student_steps(config):
        folder = str(Path(workdir) / f"{num_steps}_steps")
        console.say(f"{folder}: a student of {config.distill.teacher}")
        job = distillation_job(config, teacher, student, num_steps)
        loop.run(job, folder, allow_fallback=allow_fallback)
        student = loading.load(folder)


def load_teacher(config: Any) -> DiffusionLM:
    """Loads config.distill.teacher. Raises UserError if it cannot be distilled."""
    if not config.distill.teacher:
        raise UserError("config.distill.teacher: name the model to distil")
    teacher = loading.load(config.distill.teacher)
    if teacher.cfg.causal or teacher.cfg.predicts != "logits":
        raise UserError(
            f"config.distill.teacher={config.distill.teacher}: only a diffusion model "
            "that predicts logits is distilled (config.model.predicts)"
        )
    if teacher.schedule.num_steps is not None:
        raise UserError(
            f"config.distill.teacher={config.distill.teacher}: its times are discrete; "
            "train it with config.schedule.num_steps=0"
        )
    return teacher


def student_steps(config: Any) -> list[int]:
    """Returns the number of steps of each student in turn. Raises UserError."""
    options = config.distill
    real("config.distill.temperature", options.temperature, over=0)
    whole = integer("config.distill.teacher_steps", options.teacher_steps, 2)
    counts = [integer("config.distill.num_steps", n, 1) for n in options.num_steps]
    for n in counts:
        if whole % n or n == whole:
            raise UserError(
                f"config.distill.num_steps: {n} steps do not divide the teacher's "
                f"{whole} (config.distill.teacher_steps)"
            )
    if not counts or counts != sorted(set(counts), reverse=True):
        raise UserError(
            f"config.distill.num_steps={options.num_steps}: give falling numbers"
        )
    return counts


def distillation_job(
    config: Any, teacher: DiffusionLM, student: DiffusionLM, num_steps: int
) -> Job:
    """Returns the job of a student that starts from another's weights."""
    config = student_config(config, teacher, num_steps)
    task = _task(config, teacher, student, num_steps)
    step_cfg = resolve_config(config)._replace(task=task)

    def load(tokenizer: Any) -> Corpus:
        corpus = load_corpus(config, teacher.tokenizer)
        return corpus._replace(metadata={"teacher": checkpoint.checksum(teacher.ema)})

    return Job(config, step_cfg, "diffusion", load, make_preview(config, step_cfg))


def _task(
    config: Any, teacher: DiffusionLM, student: DiffusionLM, num_steps: int
) -> TrainingTask:
    weights, start, state = jax.device_get(
        (teacher.ema, student.ema, teacher.schedule_state)
    )

    def init(key: Any, step_cfg: StepConfig, vocab: int) -> Any:
        return jax.tree.map(jax.numpy.asarray, start)

    def terms(
        key: Any, params: Any, rows: Any, draws: Any, step_cfg: StepConfig
    ) -> Any:
        return distillation.loss(
            params,
            rows,
            draws,
            # constants that XLA would otherwise fold, for minutes
            teacher=jax.lax.optimization_barrier(weights),
            cfg=step_cfg.cfg,
            schedule=step_cfg.schedule,
            num_steps=num_steps,
            parts=config.distill.teacher_steps // num_steps,
            mask_pad=step_cfg.mask_pad,
            cfg_weight=teacher.default("cfg_weight", None),
            gain=1 / config.distill.temperature - 1,
        )

    return TrainingTask(init, terms, schedule_state=state)


def student_config(config: Any, teacher: DiffusionLM, num_steps: int) -> Any:
    """Returns the config of a student: text, network and noise are the teacher's."""
    config, own = config.copy_and_resolve_references(), teacher.config
    moved = {name: config.data[name] for name in PLACES if config.data[name]}
    with config.unlocked():
        for name in ("data", "model", "schedule"):
            config[name].update(own[name])
        config.data.update(moved)
        config.embedding.update(own["embedding"], path="", frozen=True)
        config.loss.update(
            mask_pad=own["loss"]["mask_pad"],
            self_cond_prob=own["loss"]["self_cond_prob"],
        )
        config.sample.update(own["sample"], num_steps=num_steps, cfg_weight=1.0)
        if (
            config.distill.temperature != 1
        ):  # the student's steps are those of the chain
            config.sample.update(solver="ddim", eta=0.0, clamp=-1.0)
            config.sample.temperature = config.distill.temperature
        config.distill.update(student=num_steps, num_steps=(num_steps,))
    return config
