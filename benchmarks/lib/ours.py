# SPDX-License-Identifier: Apache-2.0
"""Our side of the speed benchmarks: a contender of `alternate`."""

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
if "DLM_PLAIN_ATTENTION" in os.environ:  # accelerator.py found that it does not run
    ops.FUSED_ATTENTION.clear()
TAGGER = {"hidden_dim": 128, "layers": 2, "heads": 4, "mlp_dim": 512, "trunk": "adaln"}


def ids_of(config: Any, vocab: int) -> np.ndarray:
    """Random words [b l]; no data is read."""
    shape = (config.train.batch, config.data.length)
    return np.random.default_rng(0).integers(4, vocab, shape, dtype=np.int32)


def tagger_config(config: Any) -> DenoiserConfig:
    """The network of `configs/classifier.py:pos` on this text."""
    return DenoiserConfig(
        **TAGGER,
        dim=config.model.dim,
        positions=config.data.length,
        dropout=0.0,
        attention_dropout=0.0,
        dtype=config.model.dtype,
    )


class Training:
    """A step of the run's own layout, on all devices; waits for its end."""

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
        """The step as XLA has it."""
        return self.step.lower(self.key, self.state, self.rows).compile()


def chain(case: Case) -> Callable[[], Any]:
    """The config's solver over a grid, with or without clamp and classifier."""
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
            of = classifier.log_prob(head, tagger, layout, labels, schedule)
            step = guidance.gradient_guidance(
                step, of, schedule, lr=0.2, num_updates=case.updates
            )
        return samplers.sample(keys, step, x_T, times)[0].x0_hat

    keys = samplers.per_example_keys(jax.random.key(1), len(ids))
    x_T = samplers.standard_normal(keys, (ids.shape[1], cfg.dim))
    inputs = sharding.shard_rows((ids % CLASSES, keys, x_T))
    run = partial(jax.jit(whole), params, head, *inputs)
    return lambda: jax.block_until_ready(run())


def make(case: Case, variant: str) -> Callable[[], Any]:
    """The work of a case."""
    if case.job == "train":
        return Training(alternate.settings(case), case.vocab)
    return chain(case)


if __name__ == "__main__":
    alternate.serve(make)
