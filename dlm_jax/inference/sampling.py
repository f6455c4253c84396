# SPDX-License-Identifier: Apache-2.0
"""The reverse chain of a model, under its constraints, run in batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dlm_jax.diffusion import autoregressive, guidance, samplers
from dlm_jax.diffusion.embedding import embed
from dlm_jax.diffusion.model import Denoise, Params
from dlm_jax.inference import conditioning
from dlm_jax.inference.constraints import Constraints
from dlm_jax.inference.guidance_config import GuidanceConfig
from dlm_jax.inference.request import Request
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
        k_start, k_steps = start_and_step_keys(keys_by_index(key, index))
        step, to_ids = reverse_step(
            lm, s, g, params, schedule_state, constraints, heads
        )
        x_T = samplers.standard_normal(k_start, (lm.length, lm.cfg.dim))
        now = s.times(lm.schedule) if times is None else times
        trace = (lambda state: to_ids(state.x0_hat)) if s.trajectory else None
        state, trajectory = samplers.sample(k_steps, step, x_T, now, trace=trace)
        if trajectory is not None:
            trajectory = jnp.swapaxes(trajectory, 0, 1)
        return state.x0_hat, to_ids(state.x0_hat), trajectory

    return chain


class Reverse(NamedTuple):
    """A step under all settings and constraints, and the rounding of its estimate."""

    step: samplers.Step
    to_ids: Callable[[Latent], Ids]


def reverse_step(
    lm: TrainedModel,
    s: SamplingConfig,
    g: GuidanceConfig,
    params: Params,
    schedule_state: PyTree,
    constraints: Constraints,
    heads: dict[str, Any],
    *,
    watch: Callable[[Latent], Any] | None = None,
) -> Reverse:
    """Returns the reverse step of these settings.

    heads: classifier parameters by task. watch is called with the estimate before the
    clamp, while the step is traced.
    """
    classifiers = {
        task: lm.classifiers[task]._replace(params=p) for task, p in heads.items()
    }
    schedule, table = lm.schedule_from(schedule_state), params.table
    given = lm.supports_conditioning
    denoise = conditioning.constrain_denoiser(
        params,
        lm.cfg,
        schedule,
        constraints,
        classifiers,
        g,
        supports_conditioning=given,
    )
    if watch is not None:
        denoise = _watched(denoise, watch)
    if s.uses("clamp"):
        options = {"below": s.clamp, "allowed": constraints.allowed}
        denoise = guidance.clamp(denoise, table, **options)
    step = conditioning.constrain_step(
        s.step(denoise, schedule), table, schedule, constraints, classifiers, g
    )
    if s.uses("churn"):
        step = samplers.churn(step, schedule, rate=s.churn)

    def to_ids(x: Latent) -> Ids:
        ids = ROUNDINGS[s.rounding](params, x, constraints.allowed)
        return conditioning.apply_known(ids, constraints)

    return Reverse(step, to_ids)


def _watched(denoise: Denoise, watch: Callable[[Latent], Any]) -> Denoise:
    def watched(x_t: Latent, t: Any, x0_prev: Latent) -> Latent:
        x0_hat = denoise(x_t, t, x0_prev)
        watch(x0_hat)
        return x0_hat

    return watched


def _autoregressive_chain(cfg: DenoiserConfig, length: int) -> Chain:
    """Returns ancestral sampling token by token; it has no steps and no trajectory.

    A pair's source, with PAD after it, is the prefix.
    """

    def chain(key: jax.Array, params: Params, schedule_state: PyTree, index, rows, _):
        keys, prefix = keys_by_index(key, index), rows.ids
        ids = autoregressive.sample(keys, params, cfg, length, prefix=prefix)
        return embed(params.table, ids), ids, None

    return chain


def keys_by_index(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key per sample: sample i depends only on (key, i)."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def start_and_step_keys(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits the keys of samples [b] into those of x_T and those of the steps."""
    start, steps = jax.vmap(jax.random.split, out_axes=1)(keys)
    return start, steps


def key_of_seed(seed: int) -> jax.Array:
    """Returns the key of a seed of 64 bits; below 2**32 it is `jax.random.key(seed)`."""
    with jax.enable_x64(True):  # otherwise JAX drops the upper 32 bits
        return jax.random.key(np.uint64(seed))


def run_chain(
    lm: TrainedModel, request: Request, batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Runs the chain for samples 0 .. n - 1 in batches: (x0_hat, ids, trajectory)."""
    n, seed, constraints, s, g = request
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
