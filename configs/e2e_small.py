# SPDX-License-Identifier: Apache-2.0
"""E2E on two CPU cores: the quickstart's recipe on real text, 1.5M parameters.

    python -m dlm_jax.main --config configs/e2e_small.py --workdir runs/e2e_small \\
        --config.data.path=FOLDER_OF_src1_train.txt

Two cores of an AMD EPYC, other work running on them (0.6 s a step; 0.3 s when alone).
Held-out cross-entropy, nats per position: 0.961 at step 200, 0.898 at 400, 0.836 at 600,
0.783 at 800 (545 s); the run was ended at step 950, after 686 s. A sample at step 800:
"The Spice is a family restaurant that with a average customer rating ."
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
