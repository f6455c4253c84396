# SPDX-License-Identifier: Apache-2.0
"""Classifiers on a model's noisy latents, trained for guidance by --mode control.

    python -m dlm_jax.main --mode train_classifier --config configs/classifier.py:tree \\
        --config.classifier.model=runs/quickstart --workdir runs/tree

Variants: `:semantic`, the default, `:pos`, `:tree`, `:label`.
"""

from typing import Any

from dlm_jax.configs import default, grammar

TASKS = ("semantic", "pos", "tree", "label")


def get_config(task: str = "semantic") -> Any:
    """Returns the config: two layers of width 128; data and noise are the model's."""
    if task not in TASKS:
        raise ValueError(f"task {task!r}: choose one of {', '.join(TASKS)}")
    cfg = default.get_config()
    cfg.seed = 1
    cfg.classifier.task = task
    cfg.classifier.texts = 20_000
    cfg.model.update(
        hidden_dim=128,
        layers=2,
        heads=4,
        mlp_dim=512,
        trunk="adaln",
        dropout=0.0,
        attention_dropout=0.0,
        dtype="mixed",
    )
    cfg.loss.time_sampler = "low_discrepancy"
    cfg.optim.update(grammar.MUON, warmup=50)
    cfg.train.update(
        total_steps=800, batch=64, ckpt_steps=400, log_steps=50, valid_steps=200
    )
    return cfg
