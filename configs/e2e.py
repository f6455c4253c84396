# SPDX-License-Identifier: Apache-2.0
"""The paper's recipe on E2E: 87M parameters, 200,000 steps of 64 x 64 tokens.

    python -m dlm_jax.main --config configs/e2e.py --workdir runs/e2e \\
        --config.data.path=FOLDER_OF_src1_train.txt

`:pad`, the default, pads each text, as for the published checkpoint of the paper's
control experiments. `:block` packs texts into blocks, as the command of the published
README does. `:modern` is the cross-entropy recipe (docs/method.md, section 10) and
`:autoregressive` its baseline, both of the same size and compute.
Published hardware and time: one A100, 5 hours. Not yet run here to the end.
"""

from typing import Any

from dlm_jax.configs import default, grammar


def get_config(variant: str = "pad") -> Any:
    """Returns the config of a variant: pad | block | modern | autoregressive."""
    cfg = default.get_config()
    cfg.data.update(source="e2e", path="data/e2e", too_long="truncate")
    if variant in ("modern", "autoregressive"):
        grammar.VARIANTS[variant](cfg)
        cfg.model.update(dim=128, dropout=0.1, attention_dropout=0.1)
        cfg.optim.update(lr=1e-3, warmup=2000, ema=0.9999)
    elif variant in ("pad", "block"):
        cfg.data.mode = variant
    else:
        raise ValueError(
            f"variant {variant!r}: choose one of pad, block, modern, autoregressive"
        )
    return cfg
