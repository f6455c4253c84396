# SPDX-License-Identifier: Apache-2.0
"""The reverse chain a step at a time, for those who watch it; `sampling` scans it whole."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dlm_jax.diffusion import samplers
from dlm_jax.errors import UserError
from dlm_jax.inference import sampling, translation
from dlm_jax.inference.constraints import Constraints, batch_constraints
from dlm_jax.inference.guidance_config import GuidanceConfig
from dlm_jax.inference.request import (
    Request,
    check_count,
    make_request,
    take_constraints,
)
from dlm_jax.inference.sampling_config import SamplingConfig
from dlm_jax.inference.trained_model import TrainedModel
from dlm_jax.runtime import backend, sharding
from dlm_jax.types import Array, Ids, Integer, Latent, Real, Table


class Frame(NamedTuple):
    """n texts after a step, from 1 to num_steps.

    ids [n l]: what x0_hat rounds to. confidence [n l]: from 0 to 1, of each, before the
    clamp (`agreement`); 1 where the token is known.
    """

    step: int
    num_steps: int
    ids: np.ndarray
    confidence: np.ndarray


class Asked(NamedTuple):
    """A request, and for targets of pairs what the placeholders of each hide."""

    request: Request
    hidden: list[dict] | None


def ask(
    lm: TrainedModel,
    n: Integer,
    *,
    template: Any = None,
    sources: Any = None,
    cfg_weight: Real | None = None,
    guidance: GuidanceConfig | None = None,
    **options: Any,
) -> Asked:
    """Checks what a caller of `lm.stream` asks for. Raises UserError."""
    n, hidden = check_count("n", n), None
    if sources is None:
        if cfg_weight is not None:
            raise UserError("cfg_weight: give sources, or a GuidanceConfig")
        rows = take_constraints(lm, n, template, options)
    else:
        rows, guidance, hidden = translation.prepare(
            lm, sources, n, cfg_weight, template, options
        )
        n = len(hidden)
    options |= {"constraints": rows, "guidance": guidance}
    return Asked(make_request(lm, n, **options), hidden)


def texts(lm: TrainedModel, ids: np.ndarray, hidden: list[dict] | None) -> list[str]:
    """Returns the texts of rows [n l], of pairs their targets."""
    if hidden is None:
        return lm.decode(ids)
    return translation.show(lm, translation.target_texts(lm.tokenizer, ids), hidden)


def agreement(table: Table, x0_hat: Latent, ids: Ids) -> Float[Array, "b l"]:
    """Returns how much of each word's vector the estimate holds, from 0 to 1.

    <x0_hat, EMB(w)> / |EMB(w)|^2: 1 if x0_hat = EMB(w). For an estimate that is the mean
    of nearly orthogonal vectors it is close to the probability of w.
    """
    words = table[ids]
    share = jnp.sum(x0_hat * words, -1) / jnp.sum(words * words, -1)
    return jnp.clip(share, 0.0, 1.0)


def stream(lm: TrainedModel, requests: Sequence[Request]) -> Iterator[Frame]:
    """Runs these requests together; yields a frame of all their texts after each step.

    The requests have the same settings, and constraints of the same kinds. Each text is
    the one that `lm.generate` makes. Raises UserError.
    """
    if lm.cfg.causal:
        raise UserError("stream: an autoregressive model has no denoising steps")
    return _frames(lm, requests)


def _frames(lm: TrainedModel, requests: Sequence[Request]) -> Iterator[Frame]:
    s, g = requests[0].sampling, requests[0].guidance
    times, numbers = s.times(lm.schedule), (s.numbers(), g.numbers())
    n, num_steps = sum(one.n for one in requests), len(times.now)
    with backend.settings():
        keys, rows, heads = _inputs(lm, requests, n)
        begin, advance = _programs(lm, s, g, len(keys), rows)
        keys, state = begin(keys)
    for i in range(num_steps):
        now = jax.tree.map(lambda x, i=i: np.float32(x[i]), times)
        with backend.settings():
            state, shown = advance(
                keys, i, now, *numbers, lm.ema, lm.schedule_state, state, rows, heads
            )
            ids, confidence = sharding.gather_to_host(shown)
        yield Frame(i + 1, num_steps, ids[:n], confidence[:n])


def _inputs(lm: TrainedModel, requests: Sequence[Request], n: int) -> tuple:
    """Returns the keys as numbers and the constraints of all texts, and the classifiers.

    Their number of rows is the next power of two, for few compilations.
    """
    keys = np.concatenate([_key_data(one.seed, one.n) for one in requests])
    rows = batch_constraints([one.constraints for one in requests])
    index = np.minimum(np.arange(1 << (n - 1).bit_length()), n - 1)
    both = jax.tree.map(lambda x: np.asarray(x)[index], (keys, rows))
    heads = {task: lm.classifiers[task].params for task in rows.labels}
    return *sharding.shard_rows(both), heads


def _key_data(seed: int, n: int) -> np.ndarray:
    """Returns the keys of samples 0 .. n - 1 as numbers [n ...]."""
    keys = sampling.keys_by_index(sampling.key_of_seed(seed), jnp.arange(n))
    return np.asarray(jax.random.key_data(keys))


def _programs(
    lm: TrainedModel,
    s: SamplingConfig,
    g: GuidanceConfig,
    size: int,
    constraints: Constraints,
) -> tuple[Callable, Callable]:
    """Returns the compiled start and step of chains of these forms, of any length."""
    s, g = s.form().join({"num_steps": 0}), g.form()
    shapes = tuple(np.shape(x)[1:] for x in jax.tree.leaves(constraints))
    kind = (jax.tree.structure(constraints), shapes)

    def begin(data: Any) -> tuple[Array, samplers.State]:
        start, steps = sampling.start_and_step_keys(jax.random.wrap_key_data(data))
        x_T = samplers.standard_normal(start, (lm.length, lm.cfg.dim))
        return jax.random.key_data(steps), samplers.State(x_T, jnp.zeros_like(x_T))

    def advance(
        keys: Any,
        number: Array,
        times: samplers.Times,
        own: dict,
        guiding: dict,
        params: Any,
        schedule_state: Any,
        state: samplers.State,
        *rest: Any,
    ) -> tuple[samplers.State, tuple[Ids, Array]]:
        seen, settings = [], (s.join(own), g.join(guiding))
        step, to_ids = sampling.reverse_step(
            lm, *settings, params, schedule_state, *rest, watch=seen.append
        )
        here = samplers.step_keys(jax.random.wrap_key_data(keys), number)
        state = step(here, state, times)
        ids, known = to_ids(state.x0_hat), rest[0].known
        confidence = agreement(params.table, seen[0], ids)
        if known is not None:
            confidence = jnp.where(known, 1.0, confidence)
        return state, (ids, confidence)

    return (
        lm.cached(("begin", size), lambda: begin),
        lm.cached(("advance", s, g, size, kind), lambda: advance),
    )
