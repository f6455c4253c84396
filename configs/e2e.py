# SPDX-License-Identifier: Apache-2.0
"""The paper's recipe on E2E: 87M parameters, 200,000 steps of 64 x 64 tokens.

    python -m dlm_jax.main --config configs/e2e.py --workdir runs/e2e \\
        --config.data.path=FOLDER_OF_src1_train.txt

`configs/e2e.py:block` packs texts into blocks, the published README's command; the
default pads, as the checkpoint of the paper's control experiments (REFERENCE 2).
Published hardware and time: one A100, 5 hours. Not yet run here to the end.
"""

from typing import Any

from configs import default


def get_config(mode: str = "pad") -> Any:
    """mode: pad | block."""
    cfg = default.get_config()
    cfg.data.update(
        source="e2e", path="data/e2e", mode=mode or "pad", too_long="truncate"
    )
    return cfg
