# SPDX-License-Identifier: Apache-2.0
"""The dlm_jax contender of the speed benchmarks."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from dlm_jax.diffusion import classifier, guidance, model, samplers
from dlm_jax.nn import ops
from dlm_jax.nn.transformer import DenoiserConfig
from dlm_jax.runtime import sharding
from dlm_jax.training import train_step
from dlm_jax.training.config import resolve_config
from dlm_jax.types import HeadSpec
from lib import alternate
from lib.alternate import Case

CLASSES = 17
if (
    "DLM_PLAIN_ATTENTION" in os.environ
):  # set by accelerator.py if fused attention fails
    ops.FUSED_ATTENTION.clear()
TAGGER = {"hidden_dim": 128, "layers": 2, "heads": 4, "mlp_dim": 512, "trunk": "adaln"}


def ids_of(config: Any, vocab: int) -> np.ndarray:
    """Returns random ids [b l]; reads no data."""
    shape = (config.train.batch, config.data.length)
    return np.random.default_rng(0).integers(4, vocab, shape, dtype=np.int32)


def tagger_config(config: Any) -> DenoiserConfig:
    """Returns the network of `configs/classifier.py:pos` for this config's texts."""
    return DenoiserConfig(
        **TAGGER,
        dim=config.model.dim,
        positions=config.data.length,
        dropout=0.0,
        attention_dropout=0.0,
        dtype=config.model.dtype,
    )


class Training:
    """A training step in the config's layout, on all devices; a call waits for it."""

    def __init__(self, config: Any, vocab: int):
        step_cfg, self.key = resolve_config(config), jax.random.key(0)
        layout = sharding.LAYOUTS[config.parallel.mode]
        init = partial(train_step.init_state, step_cfg=step_cfg, vocab=vocab)
        self.state = layout.begin(self.key, init)
        one = partial(train_step.train_step, step_cfg=step_cfg, axis=layout.axis)
        self.step: Any = layout.step(one, self.state)
        self.rows = layout.rows(ids_of(config, vocab)[None])

    def __call__(self) -> None:
        self.state, metrics = self.step(self.key, self.state, self.rows)
        jax.block_until_ready(metrics["loss"])

    def compiled(self) -> Any:
        """Returns the compiled step."""
        return self.step.lower(self.key, self.state, self.rows).compile()


def chain(case: Case) -> Callable[[], Any]:
    """Returns a function that samples a batch, with or without clamp and classifier."""
    config = alternate.settings(case)
    step_cfg = resolve_config(config)
    cfg, schedule = step_cfg.cfg, step_cfg.schedule
    params = model.init(jax.random.key(0), cfg, case.vocab)
    ids = ids_of(config, case.vocab)
    tagger, layout = (
        tagger_config(config),
        HeadSpec("tags", ids.shape[1:], CLASSES),
    )
    head = classifier.init(jax.random.key(1), tagger, layout)
    options = {"eta": config.sample.eta} if config.sample.solver == "ddim" else {}
    times = samplers.schedule_timesteps(schedule, case.num_steps)

    def whole(params: Any, head: Any, labels: Any, keys: Any, x_T: Any) -> Any:
        denoise = model.bind(params, cfg, schedule=schedule)
        if case.clamp:
            denoise = guidance.clamp(denoise, params.table)
        step = samplers.SOLVERS[config.sample.solver](denoise, schedule, **options)
        if case.job == "guided":
            log_prob = classifier.log_prob(head, tagger, layout, labels, schedule)
            step = guidance.gradient_guidance(
                step, log_prob, schedule, lr=0.2, num_updates=case.updates
            )
        return samplers.sample(keys, step, x_T, times)[0].x0_hat

    keys = samplers.per_example_keys(jax.random.key(1), len(ids))
    x_T = samplers.standard_normal(keys, (ids.shape[1], cfg.dim))
    inputs = sharding.shard_rows((ids % CLASSES, keys, x_T))
    run = partial(jax.jit(whole), params, head, *inputs)
    return lambda: jax.block_until_ready(run())


def make(case: Case, variant: str) -> Callable[[], Any]:
    """Returns a function that does the work of a case once."""
    if case.job == "train":
        return Training(alternate.settings(case), case.vocab)
    return chain(case)


if __name__ == "__main__":
    alternate.serve(make)
