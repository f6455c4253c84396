# SPDX-License-Identifier: Apache-2.0
"""A run of seconds that uses every part, for tests and CI; it learns next to nothing.

python -m dlm_jax.main --config configs/smoke.py --workdir runs/smoke
"""

from typing import Any

from dlm_jax.configs import grammar


def get_config() -> Any:
    """Returns the quickstart's config, shrunk."""
    cfg = grammar.get_config()
    cfg.data.update(size=500, valid_size=64)
    cfg.model.update(dim=8, hidden_dim=32, layers=2, heads=2, mlp_dim=64, time_dim=16)
    cfg.model.known_length = False
    cfg.model.time_input, cfg.schedule.adaptive = "t", ""  # some tests set other values
    cfg.model.dtype = "float32"
    cfg.train.update(
        total_steps=20,
        batch=16,
        ckpt_steps=10,
        log_steps=5,
        valid_steps=10,
        valid_batches=2,
        sample_steps=10,
    )
    cfg.sample.update(n=4, batch=16, num_steps=8)
    cfg.evaluate.update(n=8, seeds=2, nll_texts=16, draws=2, num_steps=(2, 4))
    return cfg
