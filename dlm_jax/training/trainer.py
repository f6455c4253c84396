# SPDX-License-Identifier: Apache-2.0
"""Training: a pure step, and the loop that drives it."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dlm_jax.data import array_record, batching, encoding, sources
from dlm_jax.data.array_record import Rows
from dlm_jax.data.tokenizer import Tokenizer, from_dict
from dlm_jax.diffusion import adaptive, losses, model, schedule
from dlm_jax.diffusion.embedding import unit_rows
from dlm_jax.diffusion.model import Params
from dlm_jax.diffusion.schedule import Schedule
from dlm_jax.errors import PreemptedError, UserError, choose
from dlm_jax.inference import pipeline
from dlm_jax.nn import transformer
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.runtime import checkpoint, parallel
from dlm_jax.runtime.logging import Progress
from dlm_jax.training import optimizer
from dlm_jax.types import Array, Ids, PRNGKey, PyTree


class TrainState(NamedTuple):
    """Everything a resumed run needs; keys and data order follow from the step.

    step: updates done; ema: the average used for sampling; moments: () or the losses'
    history for importance sampling of t; noise: () or what the schedule adapts to.
    """

    step: Array
    params: Any
    ema: Any
    opt: PyTree
    moments: Any
    noise: Any = ()


class Work(NamedTuple):
    """What is learnt. A row of data is a text's ids, then `labels` more numbers.

    init(key, recipe, vocab): parameters; terms(key, params, rows, draws, recipe): the
    named terms of each row, with their `total()`.
    """

    init: Callable[..., Any]
    terms: Callable[..., Any]
    labels: int = 0


def _init(key: PRNGKey, recipe: "Recipe", vocab: int) -> Params:
    return model.init(key, recipe.cfg, vocab, normalize=recipe.normalize)


def _end_to_end(key, params, rows, draws, recipe) -> losses.Terms:
    return losses.end_to_end(
        params,
        rows,
        draws,
        cfg=recipe.cfg,
        schedule=recipe.schedule,
        objective=recipe.objective,
        key=key,
        mask_pad=recipe.mask_pad,
        normalize=recipe.normalize,
    )


LANGUAGE = Work(_init, _end_to_end)


class Recipe(NamedTuple):
    """What a step needs besides arrays: the static choices of the run."""

    cfg: DenoiserConfig
    schedule: Schedule
    optimizer: optax.GradientTransformation
    objective: str
    batch: int  # global
    times: str = "uniform"
    mask_pad: bool = False
    self_cond: float = 0.0
    truncate: float = 0.0
    known: float = 0.0
    adaptive: str = ""
    normalize: bool = False
    frozen: bool = False
    ema: float = 0.9999
    accumulate: int = 1
    skip: bool = False  # an update whose loss or gradient is no number
    work: Work = LANGUAGE

    def at(self, noise: Any) -> "Recipe":
        """The recipe with the schedule that the state's `noise` gives."""
        if not self.adaptive:
            return self
        return self._replace(schedule=adaptive.ADAPTIVE[self.adaptive](noise))


def init_state(
    key: PRNGKey, recipe: Recipe, vocab: int, table: Any = None
) -> TrainState:
    """Step 0; table: a fixed start for the embedding [v d]."""
    params = recipe.work.init(key, recipe, vocab)
    if table is not None:
        table = (
            unit_rows(jnp.asarray(table)) if recipe.normalize else jnp.asarray(table)
        )
        params = params._replace(table=table)
    opt = recipe.optimizer.init(params)
    moments = ()
    if recipe.times == "importance":
        moments = losses.init_moments(recipe.schedule.steps or 0)
    noise = adaptive.init(recipe.schedule) if recipe.adaptive else ()
    copy = jax.tree.map(jnp.copy, params)  # a donated buffer may not appear twice
    return TrainState(jnp.zeros((), jnp.int32), params, copy, opt, moments, noise)


def make_draws(
    key: PRNGKey, ids: Ids, recipe: Recipe, first: Any, moments: Any
) -> losses.Draws:
    """The draws of rows first ... of the recipe's batch."""
    importance = recipe.times == "importance"
    return losses.draw(
        key,
        (ids.shape[0], ids.shape[1] - recipe.work.labels, recipe.cfg.dim),
        first=first,
        total=recipe.batch,
        times="uniform" if importance else recipe.times,
        steps=recipe.schedule.steps,
        self_cond=recipe.self_cond,
        known=recipe.known,
        moments=moments if importance else None,
    )


def loss_fn(
    params: PyTree,
    ids: Ids,
    draws: losses.Draws,
    recipe: Recipe,
    *,
    key: PRNGKey | None = None,
) -> tuple[Array, Any]:
    """The batch's mean loss, and its terms; a key turns dropout on."""
    terms = recipe.work.terms(key, params, ids, draws, recipe)
    return jnp.mean(terms.total()), terms


def _gradients(key, state, ids, recipe, first):
    """Mean gradient over the microbatches, each with a key of its own."""
    k_draw, k_drop = jax.random.split(key)
    k_cut = jax.random.fold_in(key, 2)
    micro = ids.reshape(recipe.accumulate, -1, ids.shape[-1])
    dropout = max(recipe.cfg.dropout, recipe.cfg.attention_dropout) > 0

    def one(carry, inputs):
        i, rows = inputs
        start = first + i * rows.shape[0]
        if recipe.truncate:
            size = rows.shape[1] - recipe.work.labels
            cut = losses.truncate(k_cut, rows[:, :size], recipe.truncate, first=start)
            rows = jnp.concatenate([cut, rows[:, size:]], -1)
        draws = make_draws(k_draw, rows, recipe, start, state.moments)
        k = jax.random.fold_in(k_drop, start) if dropout else None
        value = jax.value_and_grad(loss_fn, has_aux=True)
        (_, terms), grads = value(state.params, rows, draws, recipe, key=k)
        return jax.tree.map(jnp.add, carry, grads), (terms, draws.t, draws.weight)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    numbered = (jnp.arange(recipe.accumulate), micro)
    if recipe.accumulate == 1:
        grads, seen = one(zeros, jax.tree.map(lambda x: x[0], numbered))
    else:
        grads, seen = jax.lax.scan(one, zeros, numbered)
    grads = jax.tree.map(lambda g: g / recipe.accumulate, grads)
    return grads, jax.tree.map(lambda x: x.reshape(-1), seen)


def train_step(
    key: PRNGKey,
    state: TrainState,
    ids: Ids,
    *,
    recipe: Recipe,
    axis: str | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One update from this device's rows [b l]; axis: the mapped axis, None under jit.

    Metrics (means over the global batch): the loss, its named terms, the gradient norm.
    """
    key, recipe = jax.random.fold_in(key, state.step), recipe.at(state.noise)
    first = 0 if axis is None else jax.lax.axis_index(axis) * ids.shape[0]
    grads, (terms, t, weight) = _gradients(key, state, ids, recipe, first)
    metrics = {"loss": terms.total(), **terms._asdict()}
    del metrics["weight"]
    metrics = jax.tree.map(jnp.mean, metrics)
    if axis is not None and jax.lax.axis_size(axis) > 1:
        grads, metrics = jax.lax.pmean((grads, metrics), axis)
    metrics["grad_norm"] = optimizer.norm(grads)
    if recipe.frozen:
        grads = grads._replace(table=jnp.zeros_like(grads.table))
    updates, opt = recipe.optimizer.update(grads, state.opt, state.params)
    moved: Any = optax.apply_updates(state.params, updates)
    params = _constrain(moved, state.params, recipe)
    ema = _constrain(
        optimizer.average(state.ema, params, recipe.ema), state.ema, recipe
    )
    moments = _remember(state.moments, terms, t, weight, axis)
    noise = _adapt(state.noise, terms, t, recipe, axis)
    new = TrainState(state.step + 1, params, ema, opt, moments, noise)
    return _unless_bad(new, state, metrics) if recipe.skip else new, metrics


def _unless_bad(new: TrainState, state: TrainState, metrics: dict) -> TrainState:
    """The new state, or the old one where loss or gradient are no numbers."""
    good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, state)
    return kept._replace(step=new.step)


def _constrain(params: Any, before: Any, recipe: Recipe) -> Any:
    """The table's constraint: frozen, or on the sphere."""
    if recipe.frozen:
        return params._replace(table=before.table)
    return (
        params._replace(table=unit_rows(params.table)) if recipe.normalize else params
    )


def _remember(moments, terms: Any, t, weight, axis):
    """The history with these losses, as they are without importance weights."""
    if not isinstance(moments, losses.Moments):
        return moments
    error = (terms.diffusion + terms.t0) * terms.weight / weight  # see losses._vlb
    loss = error + terms.rounding + terms.prior
    if axis is not None:
        t, loss = (jax.lax.all_gather(x, axis, tiled=True) for x in (t, loss))
    return losses.update_moments(moments, t, loss)


def _adapt(noise, terms: Any, t, recipe: Recipe, axis):
    """What the schedule knows of the loss, with that of this batch."""
    if not recipe.adaptive:
        return noise
    u, loss = -recipe.schedule.log_snr(t), terms.diffusion + terms.t0
    if axis is not None:
        u, loss = (jax.lax.all_gather(x, axis, tiled=True) for x in (u, loss))
    return adaptive.update(noise, u, loss)


# --- the loop


def recipe_of(config: Any) -> Recipe:
    """The static choices of a resolved config; UserError names a wrong key."""
    _check_ranges(config)
    cfg, noise = network(config), schedule.named(**config.schedule)
    choose("config.loss.objective", losses.OBJECTIVES, config.loss.objective)
    times = {**losses.TIMES, "importance": None}
    choose("config.loss.times", times, config.loss.times)
    losses.check(config.loss.objective, cfg, noise)
    if config.schedule.adaptive:
        choose("config.schedule.adaptive", adaptive.ADAPTIVE, config.schedule.adaptive)
        if config.loss.objective in ("nelbo", "ar"):
            raise UserError(
                f"config.schedule.adaptive={config.schedule.adaptive!r}: objective "
                f"{config.loss.objective!r} is no function of the noise alone; set ''"
            )
    if config.loss.times == "importance" and noise.steps is None:
        raise UserError(
            "config.loss.times='importance' needs config.schedule.steps > 0"
        )
    if config.loss.self_cond and not cfg.self_cond:
        raise UserError("config.loss.self_cond > 0 needs config.model.self_cond=True")
    if config.loss.known and cfg.causal:
        raise UserError("config.loss.known > 0: a teacher is given what stands before")
    choose("config.train.on_nonfinite", ON_NONFINITE, config.train.on_nonfinite)
    parallel.check_batch(config.train.batch, config.optim.accumulate)
    return Recipe(
        cfg=cfg,
        schedule=noise,
        optimizer=optimizer.make(config.optim, config.train.total_steps),
        batch=config.train.batch,
        normalize=config.embedding.normalize,
        frozen=config.embedding.frozen,
        ema=config.optim.ema,
        adaptive=config.schedule.adaptive,
        accumulate=config.optim.accumulate,
        skip=config.train.on_nonfinite == "skip",
        **config.loss,
    )


ON_NONFINITE: dict[str, Any] = dict.fromkeys(("stop", "skip", "rollback"))
COUNT, ZERO_OR_MORE = (1, math.inf), (0, math.inf)
RATE, BELOW_ONE = (0, 1), (0, 1 - 1e-9)
RANGES = {
    "train": {
        **dict.fromkeys(("batch", "total_steps", "log_steps", "keep"), COUNT),
        **dict.fromkeys(("ckpt_steps", "valid_steps", "sample_steps"), ZERO_OR_MORE),
        "valid_batches": COUNT,
    },
    "model": {
        **dict.fromkeys(("dim", "width", "layers", "heads", "ff", "positions"), COUNT),
        **dict.fromkeys(("dropout", "attention_dropout"), BELOW_ONE),
        "time_dim": COUNT,
    },
    "optim": {
        **dict.fromkeys(("lr", "warmup", "weight_decay", "clip", "eps"), ZERO_OR_MORE),
        **dict.fromkeys(("b1", "b2"), BELOW_ONE),
        "ema": RATE,
        "accumulate": COUNT,
    },
    "loss": dict.fromkeys(("self_cond", "truncate", "known"), RATE),
    "data": {"seed": ZERO_OR_MORE, "valid_fraction": RATE},
}


def _check_ranges(config: Any) -> None:
    """UserError for the first number that cannot be."""
    for section, ranges in RANGES.items():
        for name, (least, most) in ranges.items():
            value = config[section][name]
            if not least <= value <= most:
                bound = f"at most {most:g}" if value > most else f"{least} or more"
                bound = "below 1" if value > most == BELOW_ONE[1] else bound
                raise UserError(f"config.{section}.{name}={value}: must be {bound}")


def network(config: Any) -> DenoiserConfig:
    """config.model as a DenoiserConfig, checked against the data's length."""
    cfg = DenoiserConfig(**config.model)
    choose("config.model.trunk", transformer.BLOCKS, cfg.trunk)
    choose("config.model.predicts", model.TO_X0, cfg.predicts)
    choose("config.model.dtype", transformer.DTYPES, cfg.dtype)
    if config.data.length > cfg.positions:
        raise UserError(
            f"config.data.length={config.data.length} exceeds "
            f"config.model.positions={cfg.positions}: raise the latter"
        )
    if cfg.width % cfg.heads:
        raise UserError(
            f"config.model.heads={cfg.heads} does not divide width={cfg.width}"
        )
    if cfg.trunk == "adaln" and cfg.width % (2 * cfg.heads):
        raise UserError(
            f"config.model.width={cfg.width}: rotary positions need a multiple of 2 x "
            f"config.model.heads={cfg.heads}"
        )
    return cfg


class Corpus(NamedTuple):
    """Token ids of both splits [n l], and what made them; about: more to record."""

    train: np.ndarray | Rows
    valid: np.ndarray | Rows
    tokenizer: Tokenizer
    about: dict | None = None

    def record(self) -> dict:
        """The tokenizer's, and a checksum of what it was trained and used on."""
        record = {**self.tokenizer.to_dict(), **(self.about or {})}
        if isinstance(self.train, np.ndarray):
            record["corpus"] = zlib.crc32(self.train.tobytes())
        return record


def corpus_of(config: Any, tokenizer: Tokenizer | None = None) -> Corpus:
    """Reads, tokenises and encodes both splits; a saved tokenizer is kept."""
    if config.data.source == "prepared":
        return _prepared(config.data)
    texts = sources.load_texts(config.data, "train")
    held_out = sources.load_texts(config.data, "valid")
    tokenizer = tokenizer or sources.train_tokenizer(config.data, texts)
    layout = {name: config.data[name] for name in ("length", "mode", "too_long")}
    train, valid = (encoding.encode(t, tokenizer, **layout) for t in (texts, held_out))
    return Corpus(train, valid, tokenizer)


def _prepared(cfg: Any) -> Corpus:
    """What --mode prepare_data wrote; UserError where the config has another layout."""
    about = array_record.manifest(Path(cfg.path))
    for name in ("length", "mode"):
        if cfg[name] != about[name]:
            raise UserError(
                f"config.data.{name}={cfg[name]}: {cfg.path} was prepared with "
                f"{about[name]}; take that, or prepare it again"
            )
    return Corpus(*array_record.load(cfg.path))


class Validation:
    """The loss on held-out sequences: fixed draws, no dropout, the averaged weights.

    An adaptive run is judged under the schedule that it began with, so that its losses
    can be compared.
    """

    def __init__(self, ids: np.ndarray | Rows, recipe: Recipe, batches: int):
        self.size = min(recipe.batch, len(ids))
        self.recipe = recipe._replace(batch=self.size, times="low_discrepancy")
        rows = itertools.islice(batching.batches(ids, self.size), batches)
        self.batches = [parallel.spread(row) for row in rows]
        self.run = jax.jit(self._batch)

    def _batch(self, params: PyTree, number: Array, ids: Ids, mask: Array) -> PyTree:
        key = jax.random.fold_in(jax.random.key(0), number)
        draws = make_draws(key, ids, self.recipe._replace(known=0.0), 0, ())
        _, terms = loss_fn(params, ids, draws, self.recipe)
        named = {"loss": terms.total(), **terms._asdict()}
        del named["weight"]
        return {k: jnp.sum(v * mask) for k, v in named.items()} | {"n": jnp.sum(mask)}

    def __call__(self, params: PyTree) -> dict[str, float]:
        """The loss and its named terms, means over the sequences."""
        sums = [self.run(params, i, *b) for i, b in enumerate(self.batches)]
        total = jax.tree.map(lambda *x: float(sum(x)), *jax.device_get(sums))
        n = total.pop("n")
        return {name: value / n for name, value in total.items()}


class NonFinite(UserError):
    """A loss or gradient that is no number: its step, its rows, and what is saved."""

    def __init__(self, run: "Run", step: int, name: str, value: float):
        rows = " ".join(map(str, run.index(step - 1, hosts=1).ravel()))
        there = checkpoint.steps(run.workdir)
        super().__init__(
            f"{name} is {value} at step {step}: stopped; the last checkpoint is "
            f"{there[-1] if there else 'none'}; lower config.optim.lr, set "
            "config.optim.clip, or config.train.on_nonfinite=skip or rollback; the rows "
            f"of its batch, in the training data: {rows}"
        )
        self.step = step


SKIPS, ROLLBACKS = 10, 3  # in a row, and from one checkpoint


class Run:
    """A training run in its directory: begins, resumes, saves, reports.

    jumps: (step, batches) of each rollback: from that step on, the data is so many
    batches further.
    """

    def __init__(self, config: Any, workdir: str):
        self.config, self.workdir = config, checkpoint.place(workdir)
        layouts, mode = parallel.LAYOUTS, config.parallel.mode
        self.layout = choose("config.parallel.mode", layouts, mode)
        self.recipe = self._recipe()
        self.host, self.hosts = parallel.hosts()
        self.record = json.loads(config.to_json_best_effort())
        checkpoint.check(workdir, self.record)
        self.newest = self._newest()
        tokenizer, saved, self.skipped = None, {}, 0
        if self.newest is not None:
            _, saved = checkpoint.read_json(workdir, self.newest)
            tokenizer = from_dict(saved)
        self.jumps = _jumps(saved.get("jumps") or [], workdir)
        self.corpus = self._corpus(tokenizer)
        record = self.corpus.record()
        for name, what in (("corpus", "text"), ("table", "model's embedding")):
            if saved.get(name) not in (None, record.get(name)):
                raise UserError(
                    f"config.data: its {what} is not the one that {workdir} was begun "
                    "with; restore it or take a fresh --workdir"
                )
        self.state = self._begin()
        self.bundle = self._bundle()
        self._claim()
        self.valid = Validation(
            self.corpus.valid, self.recipe, config.train.valid_batches
        )

    def _newest(self) -> int | None:
        """The step to go on from: what the first host sees, and all must."""
        there = checkpoint.steps(self.workdir)
        step = parallel.of_first(there[-1] if there else -1)
        if step >= 0 and step not in there:
            raise UserError(
                f"--workdir {self.workdir}: host {self.host} does not see step {step}, "
                "the first host's newest: all need one folder, shared or in a bucket"
            )
        return step if step >= 0 else None

    def _claim(self) -> None:
        """The first host writes config.json; the others must see it."""
        if self.host == 0:
            checkpoint.claim(self.workdir, self.record)
        parallel.wait_for_all("claimed")
        for _ in range(100):
            if (self.workdir / "config.json").exists():
                return
            time.sleep(0.3)  # a network's disk may take its time
        raise UserError(
            f"--workdir {self.workdir}: host {self.host} does not see what the first "
            "host wrote there: all need one folder, shared or in a bucket"
        )

    def _recipe(self) -> Recipe:
        return recipe_of(self.config)

    def _corpus(self, tokenizer: Tokenizer | None) -> Corpus:
        return corpus_of(self.config, tokenizer)

    def _begin(self) -> TrainState:
        vocab, key = self.corpus.tokenizer.vocab_size, jax.random.key(self.config.seed)
        table = sources.load_table(
            self.config.embedding.path, vocab, self.recipe.cfg.dim
        )

        def init(key: PRNGKey) -> TrainState:
            return init_state(key, self.recipe, vocab, table)

        self.shapes = jax.eval_shape(init, key)
        if self.newest is None:
            return self.layout.begin(key, init)
        return self._restored(self.newest)

    def _restored(self, step: int) -> TrainState:
        like = self.shapes
        found = checkpoint.restore(self.workdir, step, self.layout.like(like))
        return self.layout.loaded(found)

    def _bundle(self) -> pipeline.Bundle | None:
        p, noise = self.layout.whole((self.state.ema, self.state.noise))
        tok, cfg = self.corpus.tokenizer, self.recipe.cfg
        bundle = pipeline.from_parts(cfg, p, tok, self.record, noise=noise)
        bundle.settings()  # a mistake in config.sample shows before the training
        return bundle

    def batch(self, step: int) -> Any:
        """This host's rows of a step, on its devices."""
        return self.layout.rows(self.corpus.train[self.index(step, hosts=self.hosts)])

    def index(self, step: int, *, hosts: int) -> np.ndarray:
        """The training rows [parts b] of a step that are this one's of the hosts."""
        parts = self.layout.parts(self.recipe.accumulate)
        step += sum(over for at, over in self.jumps if step >= at)
        rows = [
            batching.batch_index(
                len(self.corpus.train),
                seed=self.config.seed,
                step=step * parts + part,
                batch=self.recipe.batch // parts,
                host=self.host % hosts,
                hosts=hosts,
            )
            for part in range(parts)
        ]
        return np.stack(rows)

    def roll_back(self, error: NonFinite, writer: Any) -> str:
        """To the newest checkpoint, past the batches that led to the error.

        Raises it again where there is none, or that was tried ROLLBACKS times.
        """
        checkpoint.finish(writer)
        step = (checkpoint.steps(self.workdir) or [None])[-1]
        if step is None or [at for at, _ in self.jumps].count(step) == ROLLBACKS:
            raise error
        self.state = self._restored(step)
        self.jumps.append((step, error.step - step))
        return f"step {step}, past {error.step - step} batches"

    def save(self, writer: Any) -> None:
        """A checkpoint of the present step, if its weights are numbers."""
        if not (self.workdir / "config.json").exists():
            raise UserError(
                f"--workdir {self.workdir}: No such file or directory: it vanished during "
                "the run; nothing is saved in it any more; start again"
            )
        state, words = self.layout.whole(self.state), self.corpus.record()
        words |= {"jumps": self.jumps} if self.jumps else {}
        if not parallel.finite((state.params, state.ema)):
            raise UserError(
                f"weights are not finite at step {int(self.state.step)}: stopped, none "
                "saved; take a fresh --workdir and a lower config.optim.lr"
            )
        checkpoint.save(writer, int(self.state.step), state, self.record, words)

    def show(self, progress: Progress, step: int) -> None:
        """Writes samples/<step>.txt and shows a few of them."""
        assert self.bundle is not None
        ema, noise = self.layout.whole((self.state.ema, self.state.noise))
        texts = dataclasses.replace(self.bundle, ema=ema, noise=noise).sample(16)
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


def run(
    config: Any, workdir: str, make: type[Run] = Run, *, allow_fallback: bool = False
) -> None:
    """Trains to config.train.total_steps, resuming what lies in workdir.

    allow_fallback: a damaged newest checkpoint is set aside for the one before it.
    Raises UserError; PreemptedError after SIGTERM, with all of it saved.
    """
    try:
        task = make(config, workdir)
    except checkpoint.Damaged as error:
        if not allow_fallback or parallel.lost(error):
            raise
        if parallel.hosts()[1] > 1:  # they would have to agree, and one may be waiting
            raise UserError(
                f"{error.path} is damaged: on several hosts nobody sets it aside, move it "
                "out of its folder and start again"
            ) from error
        print(f"{error}: moved to {checkpoint.set_aside(error, workdir)}", flush=True)
        return run(config, workdir, make, allow_fallback=True)
    start, total = int(task.state.step), config.train.total_steps
    if start >= total:
        print(f"{workdir}: finished already, at step {start} of {total}")
        return
    print(parallel.describe(), flush=True)
    progress = Progress(
        task.workdir / "metrics.jsonl", total=total, start=start, main=task.host == 0
    )
    count = model.count(task.state.params)
    progress.say(f"{count:,} parameters; from step {start}")
    writer = checkpoint.manager(workdir, keep=config.train.keep)
    asked = parallel.Preemption()
    try:
        _loop(task, progress, writer, asked, total)
        checkpoint.finish(writer)
    except OSError as error:
        raise UserError(
            f"--workdir {workdir}: {error}; the last checkpoint is "
            f"{checkpoint.steps(workdir)[-1:] or 'none'}, start again to go on from it"
        ) from error
    finally:
        asked.close()
        progress.close()
        with contextlib.suppress(Exception):  # what is wrong with it was said above
            writer.close()


def _loop(
    task: Run, progress: Progress, writer: Any, asked: parallel.Preemption, total: int
) -> None:
    one = functools.partial(train_step, recipe=task.recipe, axis=task.layout.axis)
    step_fn = task.layout.step(one, task.state)
    while True:
        try:
            return _steps(task, step_fn, progress, writer, asked, total)
        except NonFinite as error:
            if task.config.train.on_nonfinite != "rollback":
                raise
            progress.say(f"{error}; going back to {task.roll_back(error, writer)}")


def _steps(task: Run, step_fn, progress: Progress, writer, asked, total: int) -> None:
    key, every, before = jax.random.key(task.config.seed), task.config.train, None
    steps = range(int(task.state.step), total)
    batches = batching.Ahead(task.batch, steps)
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
                checkpoint.finish(writer)
                raise PreemptedError(
                    f"stopped by SIGTERM at step {done} of {total}, which is saved in "
                    f"{task.workdir}: the same command goes on from there"
                )
            if due["valid_steps"] or last:
                values = task.valid(task.layout.whole(task.state.ema))
                progress.record(done, values, kind="valid")
            if due["sample_steps"] or last:
                task.show(progress, done)


def _report(task: Run, progress: Progress, step: int, metrics: PyTree) -> None:
    """Checks and records the metrics of `step`, waiting for them."""
    values = {name: float(x) for name, x in jax.device_get(metrics).items()}
    progress.advance(step)
    bad = [name for name in ("loss", "grad_norm") if not np.isfinite(values[name])]
    task.skipped = task.skipped + 1 if bad else 0
    if bad:
        error = NonFinite(task, step, bad[0], values[bad[0]])
        if task.config.train.on_nonfinite != "skip" or task.skipped > SKIPS:
            raise error
        progress.say(f"{error}; the update was skipped")
    if step % task.config.train.log_steps == 0 or step == 1:
        progress.record(step, values, kind="train")
