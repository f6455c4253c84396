# SPDX-License-Identifier: Apache-2.0
"""E2E on two CPU cores: the quickstart's recipe on real text, 1.5M parameters.

    python -m dlm_jax.main --config configs/e2e_small.py --workdir runs/e2e_small \\
        --config.data.path=FOLDER_OF_src1_train.txt

Measured before the schedule adapted, with --config.schedule.adaptive= and
--config.model.noise_time=False: two cores of an AMD EPYC, nothing else running, 466 s.
Held-out cross-entropy, nats per
position of 64: 0.961 at step 200, 0.783 at 800, 0.730 at 1200, 0.716 at 1600. Of the
last 16 samples: "Loch Fyne is a coffee that serving Indian food .", "The Vaults is a
family - Italian restaurant with a low price range".
"""

from typing import Any

from configs import grammar


def get_config(variant: str = "modern") -> Any:
    """The grammar's networks (modern | faithful | teacher) on up to 64 tokens."""
    cfg = grammar.get_config(variant)
    cfg.data.update(
        source="e2e", path="data/e2e", length=64, min_count=10, too_long="truncate"
    )
    cfg.model.positions = 64
    cfg.train.update(total_steps=1600, batch=32)
    return cfg
