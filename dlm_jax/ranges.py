# SPDX-License-Identifier: Apache-2.0
"""The range of every number in a config, and the check against it."""

import math
from collections.abc import Mapping
from typing import Any

from dlm_jax.errors import UserError

COUNT, ZERO_OR_MORE, TWO_OR_MORE = (1, math.inf), (0, math.inf), (2, math.inf)
PROBABILITY, BELOW_ONE = (0, 1), (0, 1 - 1e-9)
RANGES: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "train": {
        **dict.fromkeys(("batch", "total_steps", "log_steps", "keep"), COUNT),
        **dict.fromkeys(("ckpt_steps", "valid_steps", "sample_steps"), ZERO_OR_MORE),
        "valid_batches": COUNT,
    },
    "model": {
        **dict.fromkeys(("dim", "hidden_dim", "layers", "heads", "mlp_dim"), COUNT),
        **dict.fromkeys(("positions", "time_dim"), COUNT),
        **dict.fromkeys(("dropout", "attention_dropout"), BELOW_ONE),
    },
    "optim": {
        **dict.fromkeys(("lr", "warmup", "weight_decay", "clip", "eps"), ZERO_OR_MORE),
        **dict.fromkeys(("b1", "b2"), BELOW_ONE),
        "ema": PROBABILITY,
        "accumulate": COUNT,
    },
    "loss": {
        "self_cond_prob": PROBABILITY,
        "truncate_prob": PROBABILITY,
        "conditioning_prob": PROBABILITY,
    },
    "data": {"seed": ZERO_OR_MORE, "valid_fraction": PROBABILITY},
    "classifier": {"texts": ZERO_OR_MORE},
    "evaluate": {"n": TWO_OR_MORE, "seeds": COUNT, "draws": COUNT}
    | {"nll_texts": TWO_OR_MORE},
    "control": {"n": COUNT, "samples": COUNT, "seeds": COUNT},
}


def check_ranges(config: Any, *sections: str) -> None:
    """Raises UserError for the first number of these sections out of its range."""
    for section in sections:
        for name, (least, most) in RANGES[section].items():
            value = config[section][name]
            if not least <= value <= most:
                bound = f"at most {most:g}" if value > most else f"{least} or more"
                bound = "below 1" if value > most == BELOW_ONE[1] else bound
                raise UserError(f"config.{section}.{name}={value}: must be {bound}")
