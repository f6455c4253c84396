# SPDX-License-Identifier: Apache-2.0
"""E2E on two CPU cores in ten minutes: the quickstart's recipe on real text.

    python -m dlm_jax.main --config configs/e2e_small.py --workdir runs/e2e_small \\
        --config.data.path=FOLDER_OF_src1_train.txt
"""

from typing import Any

from configs import grammar


def get_config() -> Any:
    """The quickstart's network on texts of up to 64 tokens."""
    cfg = grammar.get_config()
    cfg.data.update(
        source="e2e", path="data/e2e", length=64, min_count=10, too_long="truncate"
    )
    cfg.model.positions = 64
    cfg.train.update(total_steps=1600, batch=32)
    return cfg
