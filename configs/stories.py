# SPDX-License-Identifier: Apache-2.0
"""TinyStories on two CPU cores: paragraphs, packed into blocks of 64 tokens.

    python -m dlm_jax.main --config configs/stories.py --workdir runs/stories \\
        --config.data.path=tinystories.lower.4MB.txt

Variants: `:modern`, the default, `:faithful`, `:autoregressive`.
Each line of the file is an example. A SentencePiece model of 2,000 pieces is trained
first. Not yet run to the end.
"""

from typing import Any

from dlm_jax.configs import grammar


def get_config(variant: str = "modern") -> Any:
    """Returns a variant of configs/grammar.py on blocks of 64 tokens."""
    cfg = grammar.get_config(variant)
    cfg.data.update(
        source="text",
        path="data/stories.txt",
        tokenizer="sentencepiece",
        vocab_size=2000,
        mode="block",
        length=64,
    )
    cfg.model.update(positions=64, layers=4, known_length=False)
    cfg.train.update(total_steps=1600, batch=32)
    return cfg
