# SPDX-License-Identifier: Apache-2.0
"""The optimiser of config.optim as an optax chain, and the average of the weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dlm_jax.errors import choose
from dlm_jax.types import PyTree

# the learning rate after warm-up, over `steps`
DECAYS = {
    "linear": lambda lr, steps: optax.linear_schedule(lr, 0.0, steps),
    "cosine": lambda lr, steps: optax.cosine_decay_schedule(lr, steps),
    "constant": lambda lr, steps: optax.constant_schedule(lr),
}


def learning_rate(cfg: Any, total_steps: int) -> optax.Schedule:
    """Returns step -> learning rate: linear warm-up, then decay to the last step."""
    after = choose("config.optim.decay", DECAYS, cfg.decay)(
        cfg.lr, max(1, total_steps - cfg.warmup)
    )
    if not cfg.warmup:
        return after
    rise = optax.linear_schedule(cfg.lr / cfg.warmup, cfg.lr, cfg.warmup)
    return optax.join_schedules([rise, after], [cfg.warmup])


def _adamw(cfg: Any, lr: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        lr, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay
    )


def _muon(cfg: Any, lr: optax.Schedule) -> optax.GradientTransformation:
    """Muon on the trunk's matrices; AdamW with Nesterov momentum on the rest.

    At the same learning rate, consistent_rms=0.2 gives both updates the same root mean
    square (arXiv:2502.16982). Three Newton-Schulz iterations for the usual five: as good
    on the grammar (docs/study.md), and a tenth of a small network's step cheaper.
    """
    return optax.contrib.muon(
        lr,
        ns_steps=3,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        adam_weight_decay=cfg.weight_decay,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )


def _matrices(params: PyTree) -> PyTree:
    """Marks Muon's parameters: the kernels inside the layers, except modulation."""

    def spec(path, leaf):
        names = [str(getattr(part, "key", "")) for part in path]
        inside = any(name.startswith("layer_") for name in names)
        matrix = inside and names[-1] == "kernel" and "modulation" not in names
        return optax.contrib.MuonDimensionNumbers() if matrix else None

    return jax.tree_util.tree_map_with_path(spec, params)


OPTIMIZERS = {"adamw": _adamw, "muon": _muon}


def make(cfg: Any, total_steps: int) -> optax.GradientTransformation:
    """Returns clipping, then the optimiser, of config.optim. Raises UserError."""
    lr = learning_rate(cfg, total_steps)
    update = choose("config.optim.name", OPTIMIZERS, cfg.name)(cfg, lr)
    if not cfg.clip:
        return update
    return optax.chain(optax.clip_by_global_norm(cfg.clip), update)


def norm(tree: PyTree) -> jax.Array:
    """Computes the global L2 norm of all leaves, without an array of their squares."""
    squares = [jnp.vdot(x, x, precision="highest") for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.zeros(())))


def average(ema: PyTree, params: PyTree, rate: float) -> PyTree:
    """Returns rate * ema + (1 - rate) * params.

    As in the published code, it starts at the initial weights and is not debiased.
    """
    return jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, ema, params)
