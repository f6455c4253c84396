# SPDX-License-Identifier: Apache-2.0
"""The quickstart: the embedded grammar, cross-entropy and self-conditioning.

python -m dlm_jax.main --config configs/grammar.py --workdir runs/quickstart
"""

from typing import Any

from configs import default


def get_config() -> Any:
    """The recipe that speaks soonest on two cores."""
    cfg = default.get_config()
    cfg.seed = 1
    cfg.data.update(source="grammar", length=32, min_count=0)
    cfg.model.update(
        dim=32,
        width=128,
        layers=4,
        heads=4,
        ff=512,
        positions=32,
        trunk="adaln",
        predicts="logits",
        self_cond=True,
        output_prior=True,
        dropout=0.0,
        attention_dropout=0.0,
    )
    cfg.embedding.normalize = True
    cfg.schedule.update(name="logistic", steps=0, mean=2.0, scale=1.2)
    cfg.loss.update(objective="ce", times="low_discrepancy", self_cond=0.5)
    cfg.optim.update(
        name="muon",
        lr=5e-3,
        decay="cosine",
        warmup=100,
        b2=0.98,
        clip=1.0,
        ema=0.99,
    )
    cfg.train.update(
        total_steps=2000,
        batch=64,
        ckpt_steps=400,
        log_steps=50,
        valid_steps=400,
        sample_steps=800,
    )
    cfg.sample.update(
        n=16, batch=256, steps=64, solver="marginal", rounding="nearest", seed=0
    )
    return cfg
