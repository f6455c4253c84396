# SPDX-License-Identifier: Apache-2.0
"""E2E's records to text: sequence to sequence on two CPU cores.

    python -m dlm_jax.main --config configs/e2e_mr.py --workdir runs/e2e_mr \\
        --config.data.path=FOLDER_OF_src1_train.txt

Variants: `:modern`, the default, and `:autoregressive`.
The latter is its baseline, of the same blocks. 38 minutes on one core of an AMD EPYC,
beside other work; seed 1. Held-out cross-entropy in nats per position: 0.540 at step 2,000,
0.374 at 10,000, 0.373 at 12,000; BLEU 58.1 of one sample and 63.4 of MBR-10 on the official
test set (docs/conditional.md). The weights are the bundled model `e2e_mr`, whose
model.safetensors has a SHA-256 that begins with b5e91fdc.
"""

from typing import Any

from dlm_jax.configs import e2e_small


def get_config(variant: str = "modern") -> Any:
    """Returns a variant of configs/e2e_small.py on pairs of up to 72 tokens."""
    cfg = e2e_small.get_config(variant)
    cfg.data.update(source_column="fields", length=72, min_count=2, too_long="drop")
    cfg.data.delexicalize = ("name", "near")
    cfg.model.update(positions=72, known_length=False, known_source=True)
    cfg.loss.source_drop_prob = 0.1
    if variant != "autoregressive":  # chosen on validation records
        cfg.sample.update(solver="ddim", eta=0.0, temperature=0.85, clamp=-1.0)
        cfg.sample.update(num_steps=32, cfg_weight=2.0)
    cfg.train.update(total_steps=12_000, batch=32, ckpt_steps=500, sample_steps=2000)
    return cfg
