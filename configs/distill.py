# SPDX-License-Identifier: Apache-2.0
"""Students of a model, for few steps: progressive distillation.

    python -m dlm_jax.main --mode distill --config configs/distill.py \\
        --config.distill.teacher=runs/quickstart --workdir runs/few_steps
"""

from typing import Any

from dlm_jax.configs import default, grammar


def get_config() -> Any:
    """Returns the config; text, network and noise schedule are the teacher's."""
    cfg = default.get_config()
    cfg.seed = 1
    cfg.loss.update(objective="ce", time_sampler="low_discrepancy")
    cfg.optim.update(grammar.MUON, lr=1.5e-3, warmup=20)
    cfg.train.update(total_steps=300, batch=32, ckpt_steps=300, log_steps=50)
    cfg.train.update(valid_steps=300, sample_steps=300)
    return cfg
