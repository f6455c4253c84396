# SPDX-License-Identifier: Apache-2.0
"""A training run: starts or resumes it in its directory, saves it, reports on it."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dlm_jax import console
from dlm_jax.data import batching, pairs, sources, tokenizer_files
from dlm_jax.data.corpus import Corpus, load_corpus
from dlm_jax.data.tokenizer import Tokenizer, from_dict
from dlm_jax.errors import UserError, choose
from dlm_jax.inference import loading
from dlm_jax.inference.sampling_config import SamplingConfig
from dlm_jax.runtime import backend, checkpoint, hosts, paths, sharding
from dlm_jax.runtime.logging import Progress
from dlm_jax.training.config import resolve_config
from dlm_jax.training.train_step import StepConfig, TrainState, init_state
from dlm_jax.training.validation import Validation
from dlm_jax.types import PRNGKey, PyTree

MAX_ROLLBACKS = 3  # from one checkpoint
OTHER_MODES = (  # (section, option, mode)
    ("distill", "student", "distill"),
    ("distill", "teacher", "distill"),
    ("classifier", "model", "train_classifier"),
)


class Job(NamedTuple):
    """What a run trains, and on what.

    config: the resolved ConfigDict; kind: of model, in the checkpoint's run record;
    load_corpus(tokenizer): reads the data, with the saved tokenizer on resume;
    preview(corpus, ema, schedule_state): samples texts by the EMA; None: no previews.
    """

    config: Any
    step_cfg: StepConfig
    kind: str
    load_corpus: Callable[[Tokenizer | None], Corpus]
    preview: Callable[[Corpus, PyTree, PyTree], list[str]] | None = None


def language_job(config: Any) -> Job:
    """Returns the job of a config: a diffusion or an autoregressive model."""
    step_cfg = resolve_config(config)
    for section, option, mode in OTHER_MODES:
        if value := config[section][option]:
            raise UserError(
                f"config.{section}.{option}={value}: only --mode {mode} reads it; give "
                "that mode, or leave it out"
            )
    # a mistake in config.sample is reported now, not at the first preview
    sampling = SamplingConfig.from_config(config.sample.to_dict())
    sampling.check_schedule(step_cfg.schedule)
    kind = "autoregressive" if step_cfg.cfg.causal else "diffusion"
    preview = make_preview(config, step_cfg)
    return Job(config, step_cfg, kind, lambda tok: load_corpus(config, tok), preview)


def make_preview(
    config: Any, step_cfg: StepConfig
) -> Callable[[Corpus, PyTree, PyTree], list[str]]:
    """Returns the function that samples 16 texts for `Job.preview`."""
    record, compiled = _to_dict(config), {}

    def preview(corpus: Corpus, ema: PyTree, schedule_state: PyTree) -> list[str]:
        parts = {"schedule_state": schedule_state}
        if step_cfg.cfg.known_length:
            parts["lengths"] = batching.count_lengths(corpus.train)
        lm = loading.from_parts(step_cfg.cfg, ema, corpus.tokenizer, record, **parts)
        lm = dataclasses.replace(lm, compiled=compiled)
        if not step_cfg.cfg.known_source:
            return lm.sample(16)
        rows = (pairs.source_and_target(row)[0] for row in corpus.valid[::97][:16])
        sources = list(map(corpus.tokenizer.decode, rows))
        return [
            f"{a} || {b}" for a, b in zip(sources, lm.translate(sources), strict=True)
        ]

    return preview


def _to_dict(config: Any) -> dict:
    return json.loads(config.to_json_best_effort())


class NonFiniteError(UserError):
    """A loss or gradient is not finite at `step`; found: the message minus the remedy."""

    def __init__(self, trainer: "Trainer", step: int, name: str, value: float):
        rows = " ".join(map(str, trainer.row_index(step - 1, hosts=1).ravel()))
        saved = checkpoint.all_steps(trainer.workdir)
        super().__init__(
            f"{name} is {value} at step {step}: stopped; the last checkpoint is "
            f"{saved[-1] if saved else 'none'}; rerun with another "
            "config.train.on_nonfinite (stop, skip or rollback), or in a new --workdir with "
            "a lower config.optim.lr; the rows "
            f"of its batch, in the training data: {rows}"
        )
        self.step = step
        self.found = f"{name} is {value} at step {step} (batch rows {rows})"


class Trainer:
    """A training run in its directory: starts, resumes, saves, previews.

    skipped_batches: (step, n) of each rollback: n batches are skipped at that step.
    check_owner: called before each save; raises if another process has the directory.
    """

    def __init__(
        self, job: Job, workdir: str, check_owner: Callable[[], None] = lambda: None
    ):
        self.check_owner = check_owner
        self.job, self.config, self.step_cfg = job, job.config, job.step_cfg
        self.workdir = checkpoint.resolve_workdir(workdir)
        self.layout = choose(
            "config.parallel.mode", sharding.LAYOUTS, self.config.parallel.mode
        )
        self.host, self.hosts = hosts.process_index_and_count()
        self.record = paths.absolute(_to_dict(self.config))
        checkpoint.check_config_matches(workdir, self.record)
        self.newest = _newest_step(self.workdir, self.host)
        tokenizer, saved, same_table = None, {}, False
        if self.newest is not None:
            records = checkpoint.read_records(workdir, self.newest)
            tokenizer, saved = from_dict(records.tokenizer), records.run
            before = records.config["data"].get("tokenizer_path") or ""
            check_same_tokenizer(self.config.data, tokenizer, before, workdir)
            same_table = records.config["embedding"] == self.record["embedding"]
        _check_random_settings(saved, workdir)
        self.skipped_batches = _skipped_batches(saved, workdir)
        self.corpus = job.load_corpus(tokenizer)
        table, first = None, {k: saved[k] for k in ("embedding",) if k in saved}
        if not same_table:
            table, first = _first_table(self.config, self.corpus.tokenizer)
        self.identity = self.corpus.identity() | first
        check_same_data(self.identity, saved, workdir)
        crops = self.config.data.mode == "crop"
        self.rows: Any = (
            batching.Windows(self.corpus.train) if crops else self.corpus.train
        )
        self.lengths = None
        if self.step_cfg.cfg.known_length:
            self.lengths = batching.row_lengths(self.corpus.train)
            self.widths = batching.row_widths(self.lengths, self.config.data.length)
        self.state = self._start(table)
        _write_run_config(self.workdir, self.record, self.host)
        self.valid = Validation(
            self.corpus.valid, self.step_cfg, self.config.train.valid_batches
        )

    def _start(self, table: np.ndarray | None) -> TrainState:
        vocab = self.corpus.tokenizer.vocab_size

        def init(key: PRNGKey) -> TrainState:
            return init_state(key, self.step_cfg, vocab, table)

        key = jax.random.key(self.config.seed)
        self.shapes = jax.eval_shape(init, key)
        if self.newest is None:
            return self.layout.begin(key, init)
        return self._restore(self.newest)

    def _restore(self, step: int) -> TrainState:
        like = self.layout.like(self.shapes)
        return self.layout.loaded(checkpoint.restore(self.workdir, step, like))

    def batch(self, step: int) -> Any:
        """Returns this host's rows of a step, as the step's input."""
        index = self.row_index(step, hosts=self.hosts)
        rows = self.rows[index]
        if self.lengths is not None:
            longest = self.lengths[self.row_index(step, hosts=1)].max()
            rows = rows[..., : min(w for w in self.widths if w >= longest)]
        return self.layout.rows(rows)

    def row_index(self, step: int, *, hosts: int) -> np.ndarray:
        """Returns row indices [parts b]: this host's; with hosts=1 the whole batch's."""
        parts = self.layout.parts(self.step_cfg.accumulate)
        step += sum(n for at, n in self.skipped_batches if step >= at)
        rows = [
            batching.batch_index(
                len(self.rows),
                seed=self.config.seed,
                step=step * parts + part,
                batch=self.step_cfg.batch // parts,
                host=self.host % hosts,
                hosts=hosts,
                lengths=self.lengths,
            )
            for part in range(parts)
        ]
        return np.stack(rows)

    def roll_back(self, error: NonFiniteError, writer: Any) -> str:
        """Restores the newest checkpoint and skips the batches after it; returns a message.

        Raises the error again if there is no checkpoint, or after MAX_ROLLBACKS times.
        """
        checkpoint.wait(writer)
        saved = checkpoint.all_steps(self.workdir)
        if not saved:
            raise error
        step = saved[-1]
        if [at for at, _ in self.skipped_batches].count(step) == MAX_ROLLBACKS:
            raise error
        self.state = self._restore(step)
        self.skipped_batches.append((step, error.step - step))
        return f"back to step {step}, skipping {error.step - step} batches"

    def save(self, writer: Any) -> None:
        """Starts saving the current step. Raises UserError if a weight is not finite."""
        if not (self.workdir / "config.json").exists():
            raise UserError(
                f"--workdir {self.workdir}: No such file or directory: it vanished "
                "during the run; nothing is saved in it any more; start again"
            )
        self.check_owner()
        state = self.layout.whole(self.state)
        if not sharding.finite((state.params, state.ema)):
            raise UserError(
                f"weights are not finite at step {int(self.state.step)}: stopped, not "
                "saved; use a new --workdir and a lower config.optim.lr"
            )
        run: dict[str, Any] = {
            "kind": self.job.kind,
            "skipped_batches": self.skipped_batches,
            "jax": backend.random_settings(),
        }
        if self.lengths is not None:
            run["lengths"] = np.bincount(self.lengths).tolist()
        records = checkpoint.Records(
            self.record, self.corpus.tokenizer.to_dict(), run | self.identity
        )
        checkpoint.save(writer, int(self.state.step), state, records)

    def show_preview(self, progress: Progress, step: int) -> None:
        """Writes samples/<step>.txt and shows a few of them."""
        if self.job.preview is None:
            return
        ema, state = self.layout.whole((self.state.ema, self.state.schedule_state))
        texts = self.job.preview(self.corpus, ema, state)
        if self.host:
            return
        path = self.workdir / "samples" / f"{step}.txt"
        path.parent.mkdir(exist_ok=True)
        lines = "".join(f"{console.one_line(text)}\n" for text in texts)
        path.write_text(lines, encoding="utf-8")
        for text in texts[:3]:
            progress.say(f"  | {text}")


def _newest_step(workdir: Any, host: int) -> int | None:
    """Returns the step to resume from: host 0's newest, which all must see."""
    saved = checkpoint.all_steps(workdir)
    step = hosts.broadcast_from_host0(saved[-1] if saved else -1)
    if step >= 0 and step not in saved:
        raise UserError(
            f"--workdir {workdir}: host {host} does not see step {step}, the first "
            "host's newest: all need one folder, shared or in a bucket"
        )
    return step if step >= 0 else None


def _first_table(config: Any, tokenizer: Tokenizer) -> tuple[np.ndarray | None, dict]:
    """Returns the table that a run begins with, or None, and what identifies it."""
    table = sources.load_table(
        config.embedding.path, tokenizer.vocab_size, config.model.dim
    )
    return table, {} if table is None else {"embedding": checkpoint.checksum(table)}


def _skipped_batches(saved: dict, workdir: Any) -> list[tuple[int, int]]:
    try:
        pairs = saved.get("skipped_batches") or []
        return [(int(at), int(n)) for at, n in pairs]
    except (TypeError, ValueError) as error:
        raise UserError(f"{workdir}: its record of rollbacks is damaged") from error


def _check_random_settings(saved: dict, workdir: Any) -> None:
    """Raises UserError if JAX would continue the run with other random numbers."""
    for name, value in backend.random_settings().items():
        before = (saved.get("jax") or {}).get(name)
        if before not in (None, value):
            raise UserError(
                f"--workdir {workdir} was begun under {name.upper()}={before}, not "
                f"{value}: set this environment variable as it was, or choose another "
                "--workdir"
            )


def check_same_tokenizer(cfg: Any, saved: Tokenizer, before: str, workdir: Any) -> None:
    """Raises UserError if config.data names another tokenizer than the run's.

    cfg: config.data. before: the path that the run has; its file may have vanished.
    """
    path = cfg.tokenizer_path
    if not path and not before:
        return
    if os.path.abspath(path) == before and not os.path.exists(path):
        return
    if not path or tokenizer_files.load(cfg.tokenizer, path) != saved:
        raise UserError(
            f"config.data.tokenizer_path={path}: not the tokenizer that {workdir} was "
            f"begun with, of {before or 'its own training'}; restore it or take a fresh "
            "--workdir"
        )


def check_same_data(identity: dict, saved: dict, workdir: Any) -> None:
    """Raises UserError if the data is not what the run was started with.

    identity: that of `Corpus.identity`; saved: the run record of a checkpoint.
    """
    for name, what in (
        ("corpus", "config.data: its text"),
        ("valid", "config.data: its validation text"),
        ("embedding", "config.embedding.path: its table"),
        ("table", "config.classifier.model: its embedding"),
        ("teacher", "config.distill.teacher: its weights"),
    ):
        if saved.get(name) not in (None, identity.get(name)):
            raise UserError(
                f"{what} is not the one that {workdir} was begun "
                "with; restore it or take a fresh --workdir"
            )


def _write_run_config(workdir: Any, record: dict, host: int) -> None:
    """Host 0 writes config.json; the others wait until they see it."""
    hosts.barrier("read")  # nothing is written if another host cannot start
    if host == 0:
        checkpoint.write_run_config(workdir, record)
    hosts.barrier("claimed")
    for _ in range(100):
        if (workdir / "config.json").exists():
            return
        time.sleep(0.3)  # a network file system may take its time
    raise UserError(
        f"--workdir {workdir}: host {host} does not see what the first host wrote "
        "there: all need one folder, shared or in a bucket"
    )
