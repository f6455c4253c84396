# SPDX-License-Identifier: Apache-2.0
"""The protocols that papers on diffusion of text compare on, in two sizes.

    dlm --mode prepare_data --config protocols:lm1b_packed --workdir prepared/lm1b_packed \\
        --config.data.source=tfds --config.data.path=lm1b --config.data.tfds_valid=test \\
        --config.data.tokenizer_path=bert-base-uncased/tokenizer.json
    dlm --config protocols:lm1b_packed --workdir runs/lm1b_packed \\
        --config.data.source=prepared --config.data.path=prepared/lm1b_packed

A variant is a protocol (`:tinystories256`, `:text8`, `:lm1b_packed`, `:lm1b_padded` or `:owt`), then
`-small` (the default) or `-tiny`, then `-ce` (the default:
cross-entropy) or `-likelihood` (the bound is the loss, d = 16). `small` is the size of the
field: 12 layers of width 768, 512 rows per step, AdamW. `tiny` is what a CPU core trains in
about ten minutes. docs/protocols.md has the commands of each protocol.

Published figures that `small` is held against; "<=" marks bounds:

    tinystories256  nats per token: autoregressive 1.190, MDLM <= 1.582, Duo <= 1.634
    text8           bits per character: autoregressive 1.23, RDLM <= 1.32, MD4 <= 1.37,
                    SEDD <= 1.39, MDLM <= 1.40, Plaid <= 1.48
    lm1b_packed     perplexity: autoregressive 22.8, LangFlow 30.0 (by an ODE), MDLM <= 31.0,
                    Plaid <= 32.4, Duo <= 33.6
    lm1b_padded     perplexity: autoregressive 22.3, MDLM <= 27.04, RDLM <= 28.44
    owt             perplexity: RePlaid 22.1, MDLM <= 23.2, LangFlow 24.6 (by an ODE),
                    Duo <= 25.2

docs/protocols.md names the source of each. No `small` run was made here. Of the `tiny` ones
`text8` was run, for 400 steps on a stand-in for its text: 3.63 bits per character
(benchmarks/results/protocols.json).
"""

from typing import Any

from dlm_jax.configs import default, grammar

PROTOCOLS: dict[str, dict[str, Any]] = {
    "tinystories256": {"mode": "wrap", "length": 256, "steps": 30_000},
    "text8": {"mode": "crop", "length": 256, "steps": 1_000_000},
    "lm1b_packed": {"mode": "wrap", "length": 128, "steps": 1_000_000},
    "lm1b_padded": {"mode": "pad", "length": 128, "steps": 1_000_000},
    "owt": {"mode": "wrap", "length": 1024, "steps": 1_000_000},
}


def get_config(variant: str = "lm1b_packed") -> Any:
    """Returns the config of a variant, such as "text8-tiny-likelihood"."""
    name, *options = variant.split("-")
    size = options.pop(0) if options and options[0] in SIZES else "small"
    loss = options.pop(0) if options and options[0] in LOSSES else "ce"
    if name not in PROTOCOLS or options:
        raise ValueError(
            f"variant {variant!r}: choose one of {', '.join(PROTOCOLS)}, then "
            f"{', '.join(f'-{s}' for s in SIZES)} and {', '.join(f'-{s}' for s in LOSSES)}"
        )
    cfg, protocol = default.get_config(), PROTOCOLS[name]
    cfg.seed = 1
    grammar.VARIANTS["modern"](cfg)
    cfg.model.update(known_length=False, positions=protocol["length"])
    cfg.train.total_steps = protocol["steps"]
    SIZES[size](cfg, protocol["length"])
    LOSSES[loss](cfg)
    cfg.data.update(length=protocol["length"], mode=protocol["mode"])
    DATA[name](cfg.data)
    cfg.evaluate.update(n=1024, seeds=1)
    return cfg


def _small(cfg: Any, length: int) -> None:
    """Sets the field's size and optimiser (docs/protocols.md)."""
    cfg.model.update(hidden_dim=768, layers=12, heads=12, mlp_dim=3072, dim=128)
    cfg.model.update(dropout=0.1, attention_dropout=0.0, dtype="bfloat16")
    cfg.optim.update(
        {
            "name": "adamw",
            "lr": 3e-4,
            "decay": "constant",
            "warmup": 2500,
            "b1": 0.9,
            "b2": 0.999,
            "weight_decay": 0.0,
            "clip": 1.0,
            "ema": 0.9999,
        }
    )
    cfg.train.update(batch=512, ckpt_steps=5000, valid_steps=5000, sample_steps=50_000)
    cfg.sample.update(n=64, batch=64)


def _tiny(cfg: Any, length: int) -> None:
    """Sets the quickstart's optimiser, and a size for one core: 2,048 tokens per step."""
    cfg.model.update(hidden_dim=128, layers=4, heads=4, mlp_dim=512, dim=64)
    cfg.model.dtype = "mixed"
    cfg.optim.update(lr=3.5e-3, ema=0.99)
    cfg.train.update(total_steps=2000, batch=max(2, 2048 // length))
    cfg.train.update(ckpt_steps=250, valid_steps=500, sample_steps=1000)
    cfg.sample.update(n=16, batch=16)


def _likelihood(cfg: Any) -> None:
    """Trains the bound itself, with a narrow embedding (arXiv:2305.18619)."""
    cfg.model.dim = 16
    cfg.embedding.normalize = True
    cfg.schedule.adaptive = ""
    cfg.loss.objective = "nelbo"


def _pieces(data: Any) -> None:
    data.update(source="parquet", tokenizer="hf")


def _text8(data: Any) -> None:
    data.update(source="stream", tokenizer="char")


def _lm1b(data: Any) -> None:
    data.update(source="tfds", tfds_valid="test", tokenizer="hf", too_long="truncate")


def _owt(data: Any) -> None:
    _pieces(data)
    data.valid_fraction = 100_000 / 8_013_769  # the last 100,000 of its texts


SIZES = {"small": _small, "tiny": _tiny}
LOSSES = {"ce": lambda cfg: None, "likelihood": _likelihood}
DATA = {
    "tinystories256": _pieces,
    "text8": _text8,
    "lm1b_packed": _lm1b,
    "lm1b_padded": _lm1b,
    "owt": _owt,
}
