# SPDX-License-Identifier: Apache-2.0
"""Training: a pure step, and the loop that drives it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dlm_jax import losses, model, optim
from dlm_jax.denoiser import DenoiserConfig
from dlm_jax.embedding import unit_rows
from dlm_jax.model import Params
from dlm_jax.schedule import Schedule
from dlm_jax.types import Array, Ids, PRNGKey, PyTree


class TrainState(NamedTuple):
    """Everything a resumed run needs; keys and data order follow from the step.

    step: updates done; ema: the average used for sampling; moments: () or the losses'
    history for importance sampling of t.
    """

    step: Array
    params: Params
    ema: Params
    opt: PyTree
    moments: Any


class Recipe(NamedTuple):
    """What a step needs besides arrays: static, hashable choices of the run."""

    cfg: DenoiserConfig
    schedule: Schedule
    optimizer: optax.GradientTransformation
    objective: str
    batch: int  # global
    times: str = "uniform"
    mask_pad: bool = False
    self_cond: float = 0.0
    normalize: bool = False
    frozen: bool = False
    ema: float = 0.9999
    accumulate: int = 1


def init_state(
    key: PRNGKey, recipe: Recipe, vocab: int, table: Any = None
) -> TrainState:
    """Step 0; table: a fixed start for the embedding [v d]."""
    params = model.init(key, recipe.cfg, vocab, normalize=recipe.normalize)
    if table is not None:
        params = params._replace(table=jnp.asarray(table))
    opt = recipe.optimizer.init(params)
    moments = ()
    if recipe.times == "importance":
        moments = losses.init_moments(recipe.schedule.steps or 0)
    copy = jax.tree.map(jnp.copy, params)  # a donated buffer may not appear twice
    return TrainState(jnp.zeros((), jnp.int32), params, copy, opt, moments)


def make_draws(
    key: PRNGKey, ids: Ids, recipe: Recipe, first: Any, moments: Any
) -> losses.Draws:
    """The draws of rows first ... of the recipe's batch."""
    importance = recipe.times == "importance"
    return losses.draw(
        key,
        (*ids.shape, recipe.cfg.dim),
        first=first,
        total=recipe.batch,
        times="uniform" if importance else recipe.times,
        steps=recipe.schedule.steps,
        self_cond=recipe.self_cond,
        moments=moments if importance else None,
    )


def loss_fn(
    params: Params,
    ids: Ids,
    draws: losses.Draws,
    recipe: Recipe,
    key: PRNGKey | None = None,
) -> tuple[Array, losses.Terms]:
    """The batch's mean loss, and its terms; a key turns dropout on."""
    terms = losses.end_to_end(
        params,
        ids,
        draws,
        cfg=recipe.cfg,
        schedule=recipe.schedule,
        objective=recipe.objective,
        key=key,
        mask_pad=recipe.mask_pad,
        normalize=recipe.normalize,
    )
    return jnp.mean(terms.total()), terms


def _gradients(key, state, ids, recipe, first):
    """Mean gradient over the microbatches, each with a key of its own."""
    k_draw, k_drop = jax.random.split(key)
    micro = ids.reshape(recipe.accumulate, -1, ids.shape[-1])
    dropout = max(recipe.cfg.dropout, recipe.cfg.attention_dropout) > 0

    def one(carry, inputs):
        i, rows = inputs
        start = first + i * rows.shape[0]
        draws = make_draws(k_draw, rows, recipe, start, state.moments)
        k = jax.random.fold_in(k_drop, start) if dropout else None
        value = jax.value_and_grad(loss_fn, has_aux=True)
        (_, terms), grads = value(state.params, rows, draws, recipe, k)
        return jax.tree.map(jnp.add, carry, grads), (terms, draws.t)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    numbered = (jnp.arange(recipe.accumulate), micro)
    if recipe.accumulate == 1:
        grads, (terms, t) = one(zeros, jax.tree.map(lambda x: x[0], numbered))
    else:
        grads, (terms, t) = jax.lax.scan(one, zeros, numbered)
    grads = jax.tree.map(lambda g: g / recipe.accumulate, grads)
    return grads, jax.tree.map(lambda x: x.reshape(-1), terms), t.reshape(-1)


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
    key = jax.random.fold_in(key, state.step)
    first = 0 if axis is None else jax.lax.axis_index(axis) * ids.shape[0]
    grads, terms, t = _gradients(key, state, ids, recipe, first)
    metrics = {"loss": terms.total(), **terms._asdict()}
    del metrics["weight"]
    metrics = jax.tree.map(jnp.mean, metrics)
    if axis is not None:
        grads, metrics = jax.lax.pmean((grads, metrics), axis)
    metrics["grad_norm"] = optax.tree.norm(grads)
    if recipe.frozen:
        grads = grads._replace(table=jnp.zeros_like(grads.table))
    updates, opt = recipe.optimizer.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    params = _constrain(params, state.params, recipe)
    ema = _constrain(optim.average(state.ema, params, recipe.ema), state.ema, recipe)
    moments = _remember(state.moments, t, terms, axis)
    return TrainState(state.step + 1, params, ema, opt, moments), metrics


def _constrain(params: Params, before: Params, recipe: Recipe) -> Params:
    """The table's constraint: frozen, or on the sphere."""
    if recipe.frozen:
        return params._replace(table=before.table)
    return (
        params._replace(table=unit_rows(params.table)) if recipe.normalize else params
    )


def _remember(moments, t, terms: losses.Terms, axis):
    if not isinstance(moments, losses.Moments):
        return moments
    loss = terms.total() / terms.weight
    if axis is not None:
        t, loss = (jax.lax.all_gather(x, axis, tiled=True) for x in (t, loss))
    return losses.update_moments(moments, t, loss)
