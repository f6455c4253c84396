# SPDX-License-Identifier: Apache-2.0
"""The reverse chain of a model, under its constraints, run in batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dlm_jax.data import pairs
from dlm_jax.diffusion import autoregressive, guidance, samplers
from dlm_jax.diffusion.embedding import embed
from dlm_jax.diffusion.model import Params
from dlm_jax.errors import UserError
from dlm_jax.inference import conditioning
from dlm_jax.inference.constraints import Constraints
from dlm_jax.inference.guidance_config import GuidanceConfig
from dlm_jax.inference.sampling_config import ROUNDINGS, SamplingConfig
from dlm_jax.inference.trained_model import TrainedModel
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.runtime import sharding
from dlm_jax.types import Array, Ids, Latent, PyTree

Trajectory = Int[Array, "b n l"]
# (key, params, schedule_state, index [b], constraints, classifier parameters by task)
# -> (x0_hat [b l d], ids [b l], trajectory [b n l] or None)
Chain = Callable[..., tuple[Latent, Ids, Trajectory | None]]


def make_chain(
    lm: TrainedModel,
    s: SamplingConfig,
    g: GuidanceConfig,
    times: samplers.Times | None = None,
) -> Chain:
    """Returns the reverse chain of these settings as a pure function; see `Chain`.

    times: of its steps; without them, those of s. Numbers of s and g may be traced.
    """
    if lm.cfg.causal:
        return _autoregressive_chain(lm.cfg, lm.length)

    def chain(
        key: jax.Array,
        params: Params,
        schedule_state: PyTree,
        index: jax.Array,
        constraints: Constraints,
        heads: dict[str, Any],
    ) -> tuple[Latent, Ids, Trajectory | None]:
        cfg, table = lm.cfg, params.table
        classifiers = {
            task: lm.classifiers[task]._replace(params=p) for task, p in heads.items()
        }
        schedule = lm.schedule_from(schedule_state)
        keys = _keys_by_index(key, index)
        k_start, k_steps = jax.vmap(jax.random.split, out_axes=1)(keys)
        given = lm.supports_conditioning
        denoise = conditioning.constrain_denoiser(
            params,
            cfg,
            schedule,
            constraints,
            classifiers,
            g,
            supports_conditioning=given,
        )
        if s.uses("clamp"):
            options = {"below": s.clamp, "allowed": constraints.allowed}
            denoise = guidance.clamp(denoise, table, **options)
        step = s.step(denoise, schedule)
        step = conditioning.constrain_step(
            step, table, schedule, constraints, classifiers, g
        )
        if s.uses("churn"):
            step = samplers.churn(step, schedule, rate=s.churn)

        def to_ids(x: Latent) -> Ids:
            ids = ROUNDINGS[s.rounding](params, x, constraints.allowed)
            return conditioning.apply_known(ids, constraints)

        x_T = samplers.standard_normal(k_start, (lm.length, cfg.dim))
        now = s.times(schedule) if times is None else times
        trace = (lambda state: to_ids(state.x0_hat)) if s.trajectory else None
        state, trajectory = samplers.sample(k_steps, step, x_T, now, trace=trace)
        if trajectory is not None:
            trajectory = jnp.swapaxes(trajectory, 0, 1)
        return state.x0_hat, to_ids(state.x0_hat), trajectory

    return chain


def _autoregressive_chain(cfg: DenoiserConfig, length: int) -> Chain:
    """Returns ancestral sampling token by token; it has no steps and no trajectory.

    A pair's source, with PAD after it, is the prefix.
    """

    def chain(key: jax.Array, params: Params, schedule_state: PyTree, index, rows, _):
        keys, prefix = _keys_by_index(key, index), rows.ids
        ids = autoregressive.sample(keys, params, cfg, length, prefix=prefix)
        return embed(params.table, ids), ids, None

    return chain


def _keys_by_index(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key per sample: sample i depends only on (key, i)."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def key_of_seed(seed: int) -> jax.Array:
    """Returns the key of a seed of 64 bits; below 2**32 it is `jax.random.key(seed)`."""
    with jax.enable_x64(True):  # otherwise JAX drops the upper 32 bits
        return jax.random.key(np.uint64(seed))


def run_chain(
    lm: TrainedModel,
    n: int,
    seed: int,
    batch: int,
    constraints: Constraints,
    s: SamplingConfig,
    g: GuidanceConfig,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Runs the chain for samples 0 .. n - 1 in batches: (x0_hat, ids, trajectory)."""
    size = min(batch, 1 << (n - 1).bit_length())  # few batch sizes, few compilations
    heads = {task: lm.classifiers[task].params for task in constraints.labels}
    run = _program(lm, s, g, size, constraints)
    data = (s.numbers(), g.numbers(), s.times(lm.schedule))
    key, parts = key_of_seed(seed), []
    for first in range(0, n, size):
        index = first + np.arange(size)
        last = np.minimum(index, n - 1)
        rows = jax.tree.map(lambda x, i=last: np.asarray(x)[i], constraints)
        index, rows = sharding.shard_rows((index, rows))
        out = run(*data, key, lm.ema, lm.schedule_state, index, rows, heads)
        parts.append(sharding.gather_to_host(out))
    return jax.tree.map(lambda *x: np.concatenate(x)[:n], *parts)


def _program(
    lm: TrainedModel,
    s: SamplingConfig,
    g: GuidanceConfig,
    size: int,
    constraints: Constraints,
) -> Callable:
    """Returns the compiled chain of these forms: of (numbers, numbers, times, *chain's).

    size: of a batch. The settings' numbers and times are data, so a new temperature
    compiles nothing.
    """
    s, g = s.form(), g.form()
    shapes = tuple(np.shape(x)[1:] for x in jax.tree.leaves(constraints))
    kind = (jax.tree.structure(constraints), shapes)

    def chain(own: dict, guiding: dict, times: samplers.Times, *rest: Any) -> Any:
        return make_chain(lm, s.join(own), g.join(guiding), times)(*rest)

    return lm.cached((s, g, size, kind), lambda: chain)


def check_support(
    lm: TrainedModel, constraints: Constraints, s: SamplingConfig, g: GuidanceConfig
) -> None:
    """Raises UserError for a setting that this model cannot follow."""
    for name, value, kind in (
        ("constraints", constraints, Constraints),
        ("guidance", g, GuidanceConfig),
    ):
        if not isinstance(value, kind):
            raise UserError(f"{name}={value!r}: give a {kind.__name__}")
    s.check_schedule(lm.schedule)
    if lm.distilled_steps not in (None, s.num_steps):
        raise UserError(
            f"num_steps={s.num_steps}: this model was distilled for "
            f"{lm.distilled_steps} steps; leave num_steps out, or load another student"
        )
    beyond = constraints
    if lm.cfg.known_source:
        beyond = constraints._replace(ids=None, known=None)
        if constraints.known is None or not pairs.are_pairs(constraints.ids):
            raise UserError(
                "this model was trained on pairs: give it sources, lm.translate(sources)"
            )
    if lm.cfg.causal and jax.tree.leaves(beyond):
        raise UserError("an autoregressive model takes no constraints")
    if lm.cfg.causal and g.cfg_weight != 1:
        raise UserError("cfg_weight: an autoregressive model does not take it")
    if lm.cfg.causal and s.trajectory:
        raise UserError("trajectory: an autoregressive model has no denoising steps")
    if g.token_time_floor < 1 and lm.cfg.marks_known:
        raise UserError(
            f"guidance.token_time_floor={g.token_time_floor}: a model with known_length "
            "or known_source has one time per text; leave it at 1"
        )
    if g.cfg_weight != 1 and not lm.supports_guidance:
        raise UserError(
            f"guidance.cfg_weight={g.cfg_weight}: this model was not trained with given "
            "tokens; train one with config.loss.conditioning_prob > 0"
        )
