# SPDX-License-Identifier: Apache-2.0
"""The training loop: begins or resumes a run, saves, validates, reports."""

import contextlib
import dataclasses
import functools
import itertools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.data import batching, sources
from dlm_jax.data.array_record import ArrayRecordDataset
from dlm_jax.data.corpus import Corpus, load_corpus
from dlm_jax.data.tokenizer import Tokenizer, from_dict
from dlm_jax.diffusion import model
from dlm_jax.errors import PreemptedError, UserError, choose
from dlm_jax.inference import loading, pipeline
from dlm_jax.runtime import checkpoint, hosts, sharding
from dlm_jax.runtime.logging import Progress
from dlm_jax.training.train_step import (
    StepConfig,
    TrainState,
    init_state,
    loss_fn,
    make_draws,
    train_step,
)
from dlm_jax.training.validate import resolve_config
from dlm_jax.types import Array, Ids, PRNGKey, PyTree


class Validation:
    """The loss on held-out sequences: fixed draws, no dropout, the averaged weights.

    An adaptive run is judged under the schedule that it began with, so that its losses
    can be compared.
    """

    def __init__(self, ids: np.ndarray | ArrayRecordDataset, step_cfg: StepConfig, batches: int):
        self.size = min(step_cfg.batch, len(ids))
        self.step_cfg = step_cfg._replace(batch=self.size, times="low_discrepancy")
        rows = itertools.islice(batching.batches(ids, self.size), batches)
        self.batches = [sharding.shard_rows(row) for row in rows]
        self.run = jax.jit(self._batch)

    def _batch(self, params: PyTree, number: Array, ids: Ids, mask: Array) -> PyTree:
        key = jax.random.fold_in(jax.random.key(0), number)
        draws = make_draws(key, ids, self.step_cfg._replace(known=0.0), 0, ())
        _, terms = loss_fn(params, ids, draws, self.step_cfg)
        named = {"loss": terms.total(), **terms._asdict()}
        del named["weight"]
        return {k: jnp.sum(v * mask) for k, v in named.items()} | {"n": jnp.sum(mask)}

    def __call__(self, params: PyTree) -> dict[str, float]:
        """The loss and its named terms, means over the sequences."""
        sums = [self.run(params, i, *b) for i, b in enumerate(self.batches)]
        total = jax.tree.map(lambda *x: float(sum(x)), *jax.device_get(sums))
        n = total.pop("n")
        return {name: value / n for name, value in total.items()}


class NonFiniteError(UserError):
    """A loss or gradient that is no number: its step, its rows, and what is saved."""

    def __init__(self, run: "Trainer", step: int, name: str, value: float):
        rows = " ".join(map(str, run.index(step - 1, hosts=1).ravel()))
        there = checkpoint.all_steps(run.workdir)
        super().__init__(
            f"{name} is {value} at step {step}: stopped; the last checkpoint is "
            f"{there[-1] if there else 'none'}; lower config.optim.lr, set "
            "config.optim.clip, or config.train.on_nonfinite=skip or rollback; the rows "
            f"of its batch, in the training data: {rows}"
        )
        self.step = step


SKIPS, ROLLBACKS = 10, 3  # in a row, and from one checkpoint


class Trainer:
    """A training run in its directory: begins, resumes, saves, reports.

    jumps: (step, batches) of each rollback: from that step on, the data is so many
    batches further.
    """

    def __init__(self, config: Any, workdir: str):
        self.config, self.workdir = config, checkpoint.resolve_workdir(workdir)
        layouts, mode = sharding.LAYOUTS, config.parallel.mode
        self.layout = choose("config.parallel.mode", layouts, mode)
        self.step_cfg = self._recipe()
        self.host, self.hosts = hosts.process_index_and_count()
        self.record = json.loads(config.to_json_best_effort())
        checkpoint.check_config_matches(workdir, self.record)
        self.newest = self._newest()
        tokenizer, saved, self.skipped = None, {}, 0
        if self.newest is not None:
            _, saved = checkpoint.read_json(workdir, self.newest)
            tokenizer = from_dict(saved)
        self.skipped_batches = _jumps(saved.get("jumps") or [], workdir)
        self.corpus = self._corpus(tokenizer)
        record = self.corpus.record()
        for name, what in (("corpus", "text"), ("table", "model's embedding")):
            if saved.get(name) not in (None, record.get(name)):
                raise UserError(
                    f"config.data: its {what} is not the one that {workdir} was begun "
                    "with; restore it or take a fresh --workdir"
                )
        self.state = self._begin()
        self.lm = self._bundle()
        self._claim()
        self.valid = Validation(
            self.corpus.valid, self.step_cfg, config.train.valid_batches
        )

    def _newest(self) -> int | None:
        """The step to go on from: what the first host sees, and all must."""
        there = checkpoint.all_steps(self.workdir)
        step = hosts.broadcast_from_host0(there[-1] if there else -1)
        if step >= 0 and step not in there:
            raise UserError(
                f"--workdir {self.workdir}: host {self.host} does not see step {step}, "
                "the first host's newest: all need one folder, shared or in a bucket"
            )
        return step if step >= 0 else None

    def _claim(self) -> None:
        """The first host writes config.json; the others must see it."""
        if self.host == 0:
            checkpoint.write_run_config(self.workdir, self.record)
        hosts.barrier("claimed")
        for _ in range(100):
            if (self.workdir / "config.json").exists():
                return
            time.sleep(0.3)  # a network's disk may take its time
        raise UserError(
            f"--workdir {self.workdir}: host {self.host} does not see what the first "
            "host wrote there: all need one folder, shared or in a bucket"
        )

    def _recipe(self) -> StepConfig:
        return resolve_config(self.config)

    def _corpus(self, tokenizer: Tokenizer | None) -> Corpus:
        return load_corpus(self.config, tokenizer)

    def _begin(self) -> TrainState:
        vocab, key = self.corpus.tokenizer.vocab_size, jax.random.key(self.config.seed)
        table = sources.load_table(
            self.config.embedding.path, vocab, self.step_cfg.cfg.dim
        )

        def init(key: PRNGKey) -> TrainState:
            return init_state(key, self.step_cfg, vocab, table)

        self.shapes = jax.eval_shape(init, key)
        if self.newest is None:
            return self.layout.begin(key, init)
        return self._restored(self.newest)

    def _restored(self, step: int) -> TrainState:
        like = self.shapes
        found = checkpoint.restore(self.workdir, step, self.layout.like(like))
        return self.layout.loaded(found)

    def _bundle(self) -> pipeline.DiffusionLM | None:
        p, noise = self.layout.whole((self.state.ema, self.state.noise))
        tok, cfg = self.corpus.tokenizer, self.step_cfg.cfg
        lm = loading.from_parts(cfg, p, tok, self.record, noise=noise)
        lm.sampling_config()  # a mistake in config.sample shows before the training
        return lm

    def batch(self, step: int) -> Any:
        """This host's rows of a step, on its devices."""
        return self.layout.rows(self.corpus.train[self.index(step, hosts=self.hosts)])

    def index(self, step: int, *, hosts: int) -> np.ndarray:
        """The training rows [parts b] of a step that are this one's of the hosts."""
        parts = self.layout.parts(self.step_cfg.accumulate)
        step += sum(over for at, over in self.skipped_batches if step >= at)
        rows = [
            batching.batch_index(
                len(self.corpus.train),
                seed=self.config.seed,
                step=step * parts + part,
                batch=self.step_cfg.batch // parts,
                host=self.host % hosts,
                hosts=hosts,
            )
            for part in range(parts)
        ]
        return np.stack(rows)

    def roll_back(self, error: NonFiniteError, writer: Any) -> str:
        """To the newest checkpoint, past the batches that led to the error.

        Raises it again where there is none, or that was tried ROLLBACKS times.
        """
        checkpoint.wait(writer)
        step = (checkpoint.all_steps(self.workdir) or [None])[-1]
        if step is None or [at for at, _ in self.skipped_batches].count(step) == ROLLBACKS:
            raise error
        self.state = self._restored(step)
        self.skipped_batches.append((step, error.step - step))
        return f"step {step}, past {error.step - step} batches"

    def save(self, writer: Any) -> None:
        """A checkpoint of the present step, if its weights are numbers."""
        if not (self.workdir / "config.json").exists():
            raise UserError(
                f"--workdir {self.workdir}: No such file or directory: it vanished during "
                "the run; nothing is saved in it any more; start again"
            )
        state, words = self.layout.whole(self.state), self.corpus.record()
        words |= {"jumps": self.skipped_batches} if self.skipped_batches else {}
        if not sharding.finite((state.params, state.ema)):
            raise UserError(
                f"weights are not finite at step {int(self.state.step)}: stopped, none "
                "saved; take a fresh --workdir and a lower config.optim.lr"
            )
        checkpoint.save(writer, int(self.state.step), state, self.record, words)

    def show(self, progress: Progress, step: int) -> None:
        """Writes samples/<step>.txt and shows a few of them."""
        assert self.lm is not None
        ema, noise = self.layout.whole((self.state.ema, self.state.noise))
        texts = dataclasses.replace(self.lm, ema=ema, noise=noise).sample(16)
        if self.host:
            return
        path = self.workdir / "samples" / f"{step}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(texts) + "\n")
        for text in texts[:3]:
            progress.say(f"  | {text}")


def _jumps(saved: Any, workdir: Any) -> list[tuple[int, int]]:
    try:
        return [(int(at), int(over)) for at, over in saved]
    except (TypeError, ValueError) as error:
        raise UserError(f"{workdir}: its record of rollbacks is damaged") from error


def train(
    config: Any, workdir: str, make: type[Trainer] = Trainer, *, allow_fallback: bool = False
) -> None:
    """Trains to config.train.total_steps, resuming what lies in workdir.

    allow_fallback: a damaged newest checkpoint is set aside for the one before it.
    Raises UserError; PreemptedError after SIGTERM, with all of it saved.
    """
    try:
        task = make(config, workdir)
    except checkpoint.CorruptCheckpointError as error:
        if not allow_fallback or hosts.host_loss_reason(error):
            raise
        if (
            hosts.process_index_and_count()[1] > 1
        ):  # they would have to agree, and one may be waiting
            raise UserError(
                f"{error.path} is damaged: on several hosts nobody sets it aside, move it "
                "out of its folder and start again"
            ) from error
        print(f"{error}: moved to {checkpoint.quarantine(error, workdir)}", flush=True)
        return train(config, workdir, make, allow_fallback=True)
    start, total = int(task.state.step), config.train.total_steps
    if start >= total:
        print(f"{workdir}: finished already, at step {start} of {total}")
        return
    print(hosts.describe(), flush=True)
    progress = Progress(
        task.workdir / "metrics.jsonl", total=total, start=start, main=task.host == 0
    )
    count = model.count(task.state.params)
    progress.say(f"{count:,} parameters; from step {start}")
    writer = checkpoint.manager(workdir, keep=config.train.keep)
    asked = hosts.Preemption()
    try:
        _loop(task, progress, writer, asked, total)
        checkpoint.wait(writer)
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: {error}; the last checkpoint is "
            f"{checkpoint.all_steps(workdir)[-1:] or 'none'}, start again to go on from it"
        ) from error
    finally:
        asked.close()
        progress.close()
        with contextlib.suppress(Exception):  # what is wrong with it was said above
            writer.close()


def _loop(
    task: Trainer, progress: Progress, writer: Any, asked: hosts.Preemption, total: int
) -> None:
    one = functools.partial(train_step, step_cfg=task.step_cfg, axis=task.layout.axis)
    step_fn = task.layout.step(one, task.state)
    while True:
        try:
            return _steps(task, step_fn, progress, writer, asked, total)
        except NonFiniteError as error:
            if task.config.train.on_nonfinite != "rollback":
                raise
            progress.say(f"{error}; going back to {task.roll_back(error, writer)}")


def _steps(task: Trainer, step_fn, progress: Progress, writer, asked, total: int) -> None:
    key, every, before = jax.random.key(task.config.seed), task.config.train, None
    steps = range(int(task.state.step), total)
    batches = batching.Prefetcher(task.batch, steps)
    with contextlib.closing(batches):
        for step in steps:
            task.state, metrics = step_fn(key, task.state, batches())
            if before is not None:
                _report(task, progress, step, before)  # of the step before: never waits
            before, done = metrics, step + 1
            if done % every.log_steps == 0:
                checkpoint.check_saves(writer)
            due = {n: every[n] and done % every[n] == 0 for n in every if "_steps" in n}
            last, stop = done == total, asked(done)
            if due["ckpt_steps"] or last or stop:
                _report(task, progress, done, before)  # a bad state is never saved
                before = None
                task.save(writer)
            if stop and not last:
                checkpoint.wait(writer)
                raise PreemptedError(
                    f"stopped by SIGTERM at step {done} of {total}, which is saved in "
                    f"{task.workdir}: the same command goes on from there"
                )
            if due["valid_steps"] or last:
                values = task.valid(task.layout.whole(task.state.ema))
                progress.record(done, values, kind="valid")
            if due["sample_steps"] or last:
                task.show(progress, done)


def _report(task: Trainer, progress: Progress, step: int, metrics: PyTree) -> None:
    """Checks and records the metrics of `step`, waiting for them."""
    values = {name: float(x) for name, x in jax.device_get(metrics).items()}
    progress.advance(step)
    bad = [name for name in ("loss", "grad_norm") if not np.isfinite(values[name])]
    task.skipped = task.skipped + 1 if bad else 0
    if bad:
        error = NonFiniteError(task, step, bad[0], values[bad[0]])
        if task.config.train.on_nonfinite != "skip" or task.skipped > SKIPS:
            raise error
        progress.say(f"{error}; the update was skipped")
    if step % task.config.train.log_steps == 0 or step == 1:
        progress.record(step, values, kind="train")
