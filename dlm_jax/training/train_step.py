# SPDX-License-Identifier: Apache-2.0
"""A training step: gradients, update, moving average and schedule; a pure function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dlm_jax.diffusion import adaptive, losses, model, time_sampling
from dlm_jax.diffusion.embedding import unit_rows
from dlm_jax.diffusion.model import Params
from dlm_jax.diffusion.schedule import Schedule
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.training import optimizer
from dlm_jax.types import Array, Ids, PRNGKey, PyTree


class TrainState(NamedTuple):
    """The arrays that resuming needs; keys and rows follow from seed, step, rollbacks.

    step: number of steps done, skipped ones included. ema: moving average of params,
    used for sampling. opt: optimiser state. moments: () or the loss history for
    importance sampling of t. schedule_state: () or the statistics of an adaptive
    schedule.
    """

    step: Array
    params: Any
    ema: Any
    opt: PyTree
    moments: Any
    schedule_state: Any = ()


class TrainingTask(NamedTuple):
    """Initialization and loss of what is trained.

    A row of data is a text's ids, then `labels` numbers.

    init(key, step_cfg, vocab): returns parameters. terms(key, params, rows, draws,
    step_cfg): returns a NamedTuple of loss terms by row, with `weight` and `total()`.
    schedule_state: of an adaptive schedule that stays as it is; (): one is adapted.
    """

    init: Callable[..., Any]
    terms: Callable[..., Any]
    labels: int = 0
    schedule_state: Any = ()


def _init(key: PRNGKey, step_cfg: "StepConfig", vocab: int) -> Params:
    return model.init(key, step_cfg.cfg, vocab, normalize=step_cfg.normalize)


def _end_to_end(key, params, rows, draws, step_cfg) -> losses.LossTerms:
    return losses.end_to_end(
        params,
        rows,
        draws,
        cfg=step_cfg.cfg,
        schedule=step_cfg.schedule,
        objective=step_cfg.objective,
        key=key,
        mask_pad=step_cfg.mask_pad,
        normalize=step_cfg.normalize,
    )


DIFFUSION_LM = TrainingTask(_init, _end_to_end)


class StepConfig(NamedTuple):
    """The settings of a step: all it needs besides the state, rows and key."""

    cfg: DenoiserConfig
    schedule: Schedule
    optimizer: optax.GradientTransformation
    objective: str
    batch: int  # rows per step, over all devices
    time_sampler: str = "uniform"
    mask_pad: bool = False
    self_cond_prob: float = 0.0
    truncate_prob: float = 0.0
    source_drop_prob: float = 0.0
    conditioning_prob: float = 0.0
    adaptive: str = ""
    normalize: bool = False
    frozen: bool = False
    ema: float = 0.9999
    accumulate: int = 1
    skip: bool = False  # skip updates whose loss or gradient is not finite
    task: TrainingTask = DIFFUSION_LM

    def at(self, schedule_state: Any) -> "StepConfig":
        """Returns the settings with the schedule of a state's `schedule_state`."""
        if not self.adaptive:
            return self
        schedule = adaptive.ADAPTIVE_SCHEDULES[self.adaptive](schedule_state)
        return self._replace(schedule=schedule)


def init_state(
    key: PRNGKey, step_cfg: StepConfig, vocab: int, table: Any = None
) -> TrainState:
    """Returns the state of step 0. table: the initial embedding [v d], or random."""
    params = step_cfg.task.init(key, step_cfg, vocab)
    if table is not None:
        table = jnp.asarray(table)
        table = unit_rows(table) if step_cfg.normalize else table
        params = params._replace(table=table)
    opt = step_cfg.optimizer.init(params)
    moments = ()
    if step_cfg.time_sampler == "importance":
        moments = time_sampling.init_moments(step_cfg.schedule.num_steps or 0)
    adapted = step_cfg.task.schedule_state
    if step_cfg.adaptive and not adapted:
        adapted = adaptive.init(step_cfg.schedule)
    copy = jax.tree.map(jnp.copy, params)  # a donated buffer may not appear twice
    return TrainState(jnp.zeros((), jnp.int32), params, copy, opt, moments, adapted)


def make_draws(
    key: PRNGKey, ids: Ids, step_cfg: StepConfig, first: Any, moments: Any
) -> time_sampling.NoiseDraws:
    """Draws times and noise for rows first, first + 1, ... of the global batch."""
    importance = step_cfg.time_sampler == "importance"
    return time_sampling.draw_noise(
        key,
        (ids.shape[0], ids.shape[1] - step_cfg.task.labels, step_cfg.cfg.dim),
        first=first,
        total=step_cfg.batch,
        time_sampler="uniform" if importance else step_cfg.time_sampler,
        num_steps=step_cfg.schedule.num_steps,
        self_cond_prob=step_cfg.self_cond_prob,
        conditioning_prob=step_cfg.conditioning_prob,
        moments=moments if importance else None,
    )


def loss_fn(
    params: PyTree,
    ids: Ids,
    draws: time_sampling.NoiseDraws,
    step_cfg: StepConfig,
    *,
    key: PRNGKey | None = None,
) -> tuple[Array, Any]:
    """Returns the mean loss of the rows, and its terms [b]; a key turns dropout on."""
    terms = step_cfg.task.terms(key, params, ids, draws, step_cfg)
    return jnp.mean(terms.total()), terms


def _gradients(key, state, ids, step_cfg, first):
    """Returns the mean gradient over microbatches, and (terms, t, weight) per row."""
    k_draw, k_drop = jax.random.split(key)
    k_cut = jax.random.fold_in(key, 2)  # 0 and 1 are the split keys
    micro = ids.reshape(step_cfg.accumulate, -1, ids.shape[-1])
    dropout = max(step_cfg.cfg.dropout, step_cfg.cfg.attention_dropout) > 0

    def one(carry, inputs):
        i, rows = inputs
        start = first + i * rows.shape[0]
        if step_cfg.truncate_prob:
            size = rows.shape[1] - step_cfg.task.labels
            cut = time_sampling.truncate(
                k_cut, rows[:, :size], step_cfg.truncate_prob, first=start
            )
            rows = jnp.concatenate([cut, rows[:, size:]], -1)
        if step_cfg.source_drop_prob:
            rows = time_sampling.drop_sources(
                k_cut, rows, step_cfg.source_drop_prob, first=start
            )
        draws = make_draws(k_draw, rows, step_cfg, start, state.moments)
        k = jax.random.fold_in(k_drop, start) if dropout else None
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (_, terms), grads = grad_fn(state.params, rows, draws, step_cfg, key=k)
        return jax.tree.map(jnp.add, carry, grads), (terms, draws.t, draws.weight)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    numbered = (jnp.arange(step_cfg.accumulate), micro)
    if step_cfg.accumulate == 1:
        grads, per_row = one(zeros, jax.tree.map(lambda x: x[0], numbered))
    else:
        grads, per_row = jax.lax.scan(one, zeros, numbered)
    grads = jax.tree.map(lambda g: g / step_cfg.accumulate, grads)
    return grads, jax.tree.map(lambda x: x.reshape(-1), per_row)


def train_step(
    key: PRNGKey,
    state: TrainState,
    ids: Ids,
    *,
    step_cfg: StepConfig,
    axis: str | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Performs one update on a device's rows [b l]; fsdp: all, [parts b l].

    axis: the mapped axis, None under jit. Returns the new state and the metrics:
    the loss and its named terms, means over the global batch, and the gradient norm.
    """
    key = jax.random.fold_in(key, state.step)
    step_cfg = step_cfg.at(state.schedule_state)
    first = 0 if axis is None else jax.lax.axis_index(axis) * ids.shape[0]
    grads, (terms, t, weight) = _gradients(key, state, ids, step_cfg, first)
    metrics = {"loss": terms.total(), **terms._asdict()}
    del metrics["weight"]
    metrics = jax.tree.map(jnp.mean, metrics)
    if axis is not None and jax.lax.axis_size(axis) > 1:
        grads, metrics = jax.lax.pmean((grads, metrics), axis)
    metrics["grad_norm"] = optimizer.norm(grads)
    if step_cfg.frozen:
        grads = grads._replace(table=jnp.zeros_like(grads.table))
    updates, opt = step_cfg.optimizer.update(grads, state.opt, state.params)
    moved: Any = optax.apply_updates(state.params, updates)
    params = _fix_table(moved, state.params, step_cfg)
    ema = optimizer.average(state.ema, params, step_cfg.ema)
    ema = _fix_table(ema, state.ema, step_cfg)
    moments = _update_moments(state.moments, terms, t, weight, axis)
    adapted = _update_schedule_state(state.schedule_state, terms, t, step_cfg, axis)
    new = TrainState(state.step + 1, params, ema, opt, moments, adapted)
    return _skip_nonfinite(new, state, metrics) if step_cfg.skip else new, metrics


def _skip_nonfinite(new: TrainState, state: TrainState, metrics: dict) -> TrainState:
    """Returns the new state; if loss or gradient is not finite, the old at the new step."""
    good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, state)
    return kept._replace(step=new.step)


def _fix_table(params: Any, before: Any, step_cfg: StepConfig) -> Any:
    """Applies the constraint on the table: frozen, or rows of norm sqrt(d)."""
    if step_cfg.frozen:
        return params._replace(table=before.table)
    if step_cfg.normalize:
        return params._replace(table=unit_rows(params.table))
    return params


def _update_moments(moments, terms: Any, t, weight, axis):
    """Adds this batch's losses, without importance weights, to the history."""
    if not isinstance(moments, time_sampling.LossMoments):
        return moments
    error = (terms.diffusion + terms.t0) * terms.weight / weight  # undoes _vlb's
    loss = error + terms.rounding + terms.prior
    if axis is not None:
        t, loss = (jax.lax.all_gather(x, axis, tiled=True) for x in (t, loss))
    return time_sampling.update_moments(moments, t, loss)


def _update_schedule_state(schedule_state, terms: Any, t, step_cfg: StepConfig, axis):
    """Updates the adaptive schedule's statistics with this batch's losses."""
    if not step_cfg.adaptive or step_cfg.task.schedule_state:
        return schedule_state
    u, loss = -step_cfg.schedule.log_snr(t), terms.diffusion + terms.t0
    if axis is not None:
        u, loss = (jax.lax.all_gather(x, axis, tiled=True) for x in (u, loss))
    return adaptive.update(schedule_state, u, loss)
