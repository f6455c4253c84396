# SPDX-License-Identifier: Apache-2.0
"""The built-in grammar: the cross-entropy recipe, the paper's, autoregression, and pairs.

    python -m dlm_jax.main --config configs/grammar.py --workdir runs/quickstart
    python -m dlm_jax.main --config configs/grammar.py:faithful --workdir runs/faithful
    python -m dlm_jax.main --config configs/grammar.py:autoregressive --workdir runs/ar
    python -m dlm_jax.main --config configs/grammar.py:fields --workdir runs/fields

Variants: `:modern`, the default, `:faithful`, `:autoregressive`, `:fields`.

docs/results.md and docs/study.md hold the numbers, each with its command. The quickstart's
weights (263 s on two cores, seed 1) are the bundled model `grammar`, whose
model.safetensors has a SHA-256 that begins with 5e15d48f.
"""

from typing import Any

from dlm_jax.configs import default

MUON = {
    "name": "muon",
    "lr": 5e-3,
    "decay": "cosine",
    "warmup": 100,
    "b2": 0.98,
    "clip": 1.0,
    "ema": 0.99,
}


def _modern(cfg: Any) -> None:
    """Sets the cross-entropy recipe of the quickstart (docs/method.md, section 10)."""
    cfg.model.update(
        dim=32,
        trunk="adaln",
        predicts="logits",
        known_length=True,
        self_cond=True,
        token_posterior_input=True,
        time_input="log_snr",
        dropout=0.0,
        attention_dropout=0.0,
    )
    cfg.embedding.normalize = True
    cfg.schedule.update(
        name="logistic", num_steps=0, mean=2.0, scale=1.2, adaptive="warp"
    )
    cfg.loss.update(objective="ce", time_sampler="low_discrepancy", self_cond_prob=0.5)
    cfg.optim.update(MUON)
    cfg.sample.update(num_steps=64, solver="marginal", rounding="nearest")


def _faithful(cfg: Any) -> None:
    """Sets the paper's recipe; lr, warm-up and EMA are adapted to the small size."""
    cfg.optim.update(lr=4e-3, warmup=100, ema=0.99)


def _autoregressive(cfg: Any) -> None:
    """Sets an autoregressive model of the same layers, the baseline of likelihoods."""
    _modern(cfg)
    cfg.model.update(dim=128, self_cond=False, token_posterior_input=False, causal=True)
    cfg.model.update(known_length=False, time_input="t")
    cfg.embedding.normalize = False
    cfg.schedule.adaptive = ""
    cfg.loss.update(objective="ar", self_cond_prob=0.0)


def _fields(cfg: Any) -> None:
    """Sets the quickstart's recipe on pairs: from the fields of a text to the text."""
    _modern(cfg)
    cfg.data.update(source_column="fields", length=64, too_long="drop")
    cfg.model.update(known_length=False, known_source=True, positions=64)
    cfg.loss.source_drop_prob = 0.1


VARIANTS = {
    "modern": _modern,
    "faithful": _faithful,
    "autoregressive": _autoregressive,
    "fields": _fields,
}


def get_config(variant: str = "modern") -> Any:
    """Returns a variant: three layers of width 128 on texts of up to 32 tokens."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    cfg = default.get_config()
    cfg.seed = 1
    cfg.data.update(source="grammar", length=32, min_count=0)
    cfg.model.update(
        hidden_dim=128, layers=3, heads=4, mlp_dim=512, positions=32, dtype="mixed"
    )
    cfg.sample.update(n=16, batch=32, seed=0)  # a batch of 32 fits in a core's cache
    VARIANTS[variant](cfg)
    cfg.train.update(
        total_steps=3000,
        batch=64,
        ckpt_steps=500,
        log_steps=50,
        valid_steps=500,
        sample_steps=1500,
    )
    return cfg
