# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, checkpoints, validation, previews, and how a run ends."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dlm_jax import console
from dlm_jax.data import batching
from dlm_jax.diffusion import model
from dlm_jax.errors import PreemptedError, UserError
from dlm_jax.runtime import backend, checkpoint, hosts, ownership, profiling, writers
from dlm_jax.runtime.logging import Progress
from dlm_jax.training.train_step import train_step
from dlm_jax.training.trainer import Job, NonFiniteError, Trainer, language_job
from dlm_jax.types import PyTree

MAX_SKIPPED = 10  # updates in a row


@backend.prepared
def train(config: Any, workdir: str, *, allow_fallback: bool = False) -> None:
    """Trains a language model to config.train.total_steps; see `run`."""
    run(language_job(config), workdir, allow_fallback=allow_fallback)


@backend.prepared
def run(job: Job, workdir: str, *, allow_fallback: bool = False) -> None:
    """Trains to config.train.total_steps, resuming from the checkpoints in workdir.

    allow_fallback: if the newest checkpoint is damaged, move it away and resume from
    the one before. Raises UserError, also if another process trains in workdir;
    PreemptedError after SIGTERM and KeyboardInterrupt after Ctrl-C, once all is saved.
    """
    checkpoint.check_name(workdir)
    first = hosts.process_index_and_count()[0] == 0
    with (
        checkpoint.root_logger_kept(),
        ownership.claim(workdir) if first else contextlib.nullcontext() as check,
    ):
        _run(job, workdir, check or (lambda: None), allow_fallback=allow_fallback)


def _run(
    job: Job, workdir: str, check_owner: Callable[[], None], *, allow_fallback: bool
) -> None:
    try:
        trainer = Trainer(job, workdir, check_owner)
    except checkpoint.CorruptCheckpointError as error:
        if not allow_fallback or hosts.host_loss_reason(error):
            raise
        # several hosts cannot agree on a fallback here
        if hosts.process_index_and_count()[1] > 1:
            raise UserError(
                f"{error.path} is damaged: with several hosts, move it out of its folder "
                "and rerun"
            ) from error
        moved = checkpoint.quarantine(error, workdir)
        console.say(f"{error.path} is damaged: moved to {moved}")
        return _run(job, workdir, check_owner, allow_fallback=True)
    start, total = int(trainer.state.step), job.config.train.total_steps
    if start >= total:
        console.say(f"{workdir}: finished already, at step {start} of {total}")
        return
    console.say(hosts.describe())
    path, main = trainer.workdir / "metrics.jsonl", trainer.host == 0
    names = trainer.config.train.writers if main else ""
    others = writers.open_all(names, trainer.workdir, start, trainer.record)
    progress = Progress(path, total=total, start=start, main=main, writers=others)
    size = model.count(trainer.state.params)
    for line in trainer.corpus.read:
        progress.say(line)
    progress.say(f"{size:,} parameters; from step {start}")
    _run_and_close(trainer, progress, total)


def _run_and_close(trainer: Trainer, progress: Progress, total: int) -> None:
    keep, workdir = trainer.config.train.keep, trainer.workdir
    writer = checkpoint.manager(workdir, keep=keep)
    preemption = hosts.Preemption()
    try:
        _loop(trainer, progress, writer, preemption, total)
        checkpoint.wait(writer)
    except OSError as error:
        saved = checkpoint.all_steps(workdir)
        raise UserError(
            f"--workdir {workdir}: {error}; the last checkpoint is "
            f"{saved[-1] if saved else 'none'}; rerun to resume"
        ) from error
    finally:
        preemption.close()
        progress.close()
        with contextlib.suppress(Exception):  # an earlier error counts more
            writer.close()


def _loop(
    trainer: Trainer,
    progress: Progress,
    writer: Any,
    preemption: hosts.Preemption,
    total: int,
) -> None:
    step = functools.partial(
        train_step, step_cfg=trainer.step_cfg, axis=trainer.layout.axis
    )
    step_fn = trainer.layout.step(step, trainer.state)
    while True:
        try:
            return _steps(trainer, step_fn, progress, writer, preemption, total)
        except NonFiniteError as error:
            if trainer.config.train.on_nonfinite != "rollback":
                raise
            done = trainer.roll_back(error, writer)
            progress.say(f"{error.found}; {done}")


def _steps(
    trainer: Trainer, step_fn, progress: Progress, writer, preemption, total: int
) -> None:
    key, every = jax.random.key(trainer.config.seed), trainer.config.train
    steps = range(int(trainer.state.step), total)
    batches = batching.Prefetcher(trainer.batch, steps)
    report = _Report(trainer, progress)
    traced = every.profile_steps if trainer.host == 0 else 0
    trace = profiling.StepTrace(
        trainer.workdir / "profile", traced, start=steps.start, total=total
    )
    with contextlib.closing(batches), contextlib.closing(trace):
        for step in steps:
            trace(step, trainer.state)
            trainer.state, metrics = step_fn(key, trainer.state, batches())
            done = step + 1
            report(done, metrics)
            if done % every.log_steps == 0:
                checkpoint.check_saves(writer)
            due = {n: every[n] and done % every[n] == 0 for n in every if "_steps" in n}
            last, stop = done == total, preemption(done)
            if due["ckpt_steps"] or last or stop:
                report.flush()  # a state that is not finite is never saved
                trainer.save(writer)
            if stop and not last:
                checkpoint.wait(writer)
                name = "Ctrl-C" if preemption.interrupted else "SIGTERM"
                kind = KeyboardInterrupt if preemption.interrupted else PreemptedError
                raise kind(
                    f"stopped by {name} at step {done} of {total}, which is saved in "
                    f"{trainer.workdir}: rerun the same command to resume"
                )
            if due["valid_steps"] or last:
                values = trainer.valid(trainer.layout.whole(trainer.state.ema))
                progress.record(done, values, kind="valid")
            if due["sample_steps"] or last:
                trainer.show_preview(progress, done)


class _Report:
    """Checks and records the metrics of a step one step later: the device stays busy."""

    def __init__(self, trainer: Trainer, progress: Progress):
        self.trainer, self.progress = trainer, progress
        self.skipped, self.pending = 0, None

    def __call__(self, step: int, metrics: PyTree) -> None:
        self.flush()
        self.pending = (step, metrics)

    def flush(self) -> None:
        """Handles the pending metrics; raises NonFiniteError."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        self.progress.advance(step)
        bad = [n for n in ("loss", "grad_norm") if not np.isfinite(values[n])]
        self.skipped = self.skipped + 1 if bad else 0
        config = self.trainer.config.train
        if bad:
            error = NonFiniteError(self.trainer, step, bad[0], values[bad[0]])
            if config.on_nonfinite != "skip" or self.skipped > MAX_SKIPPED:
                raise error
            self.progress.say(f"{error.found}; the update was skipped")
        if step % config.log_steps == 0 or step == 1:
            self.progress.record(step, values, kind="train")
