# SPDX-License-Identifier: Apache-2.0
"""Paraphrase: from one question to another, on Quora Question Pairs (QQP), for a GPU.

    python -m dlm_jax.main --config configs/paraphrase.py --workdir runs/paraphrase \\
        --config.data.path=train.jsonl --config.data.valid_path=valid.jsonl

The files are those of DiffuSeq (arXiv:2210.08933): a line is {"src": ..., "trg": ...}.
Published BLEU of one sample and of MBR-10: DiffuSeq 18.47 and 24.13, and Difformer
(arXiv:2212.09412) 30.43 of its own protocol. Not yet run here.
"""

from typing import Any

from dlm_jax.configs import e2e


def get_config() -> Any:
    """Returns the cross-entropy recipe at the published size, on pairs of 128 tokens."""
    cfg = e2e.get_config("modern")
    cfg.data.update(
        source="jsonl", path="data/qqp/train.jsonl", source_column="src", column="trg",
        length=128, too_long="drop", tokenizer="sentencepiece", byte_fallback=True,
    )  # fmt: skip
    cfg.model.update(known_length=False, known_source=True, dtype="bfloat16")
    cfg.loss.source_drop_prob = 0.1
    cfg.train.update(total_steps=50_000, batch=256)
    return cfg
