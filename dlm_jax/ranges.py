# SPDX-License-Identifier: Apache-2.0
"""The range of every number in a config or an argument, and the check against it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dlm_jax.errors import UserError
from dlm_jax.types import Integer, Real

COUNT, ZERO_OR_MORE, TWO_OR_MORE = (1, math.inf), (0, math.inf), (2, math.inf)
PROBABILITY, BELOW_ONE = (0, 1), (0, 1 - 1e-9)
RANGES: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "train": {
        **dict.fromkeys(("batch", "total_steps", "log_steps", "keep"), COUNT),
        **dict.fromkeys(("ckpt_steps", "valid_steps", "sample_steps"), ZERO_OR_MORE),
        "profile_steps": ZERO_OR_MORE,
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
        "source_drop_prob": PROBABILITY,
        "conditioning_prob": PROBABILITY,
    },
    "data": {"seed": ZERO_OR_MORE, "valid_fraction": PROBABILITY},
    "classifier": {"texts": ZERO_OR_MORE},
    "evaluate": {"n": TWO_OR_MORE, "seeds": COUNT, "draws": COUNT}
    | {"nll_texts": TWO_OR_MORE, "ode_texts": ZERO_OR_MORE, "mbr": COUNT},
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


def integer(
    name: str,
    value: Integer,
    least: Real = -math.inf,
    most: Real = math.inf,
    unit: str = "",
) -> int:
    """Returns a whole number of Python, NumPy or JAX as an int from least to most.

    unit: what it counts, for the message. Raises UserError for anything else.
    """
    number = _number(value)
    if number is None or number != number // 1:
        raise UserError(f"{name}={value}: must be a whole number")
    if not least <= number <= most:
        raise UserError(f"{name}={value}: must be {_span(least, most)} {unit}")
    return int(number)


def real(
    name: str,
    value: Real,
    least: Real = -math.inf,
    most: Real = math.inf,
    over: Real = -math.inf,
) -> float:
    """Returns a finite number of Python, NumPy or JAX as a float from least to most.

    over: a bound that is excluded. Raises UserError for anything else.
    """
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise UserError(f"{name}={value}: must be a finite number")
    if number <= over:
        raise UserError(f"{name}={value}: must be over {over:g}")
    if not least <= number <= most:
        raise UserError(f"{name}={value}: must be {_span(least, most)}")
    return float(number)


def flag(name: str, value: Any) -> bool:
    """Returns a bool of Python or NumPy as a bool. Raises UserError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"{name}={value}: must be True or False")
    return bool(value)


def _number(value: Any) -> int | float | None:
    """Returns a scalar as a number of Python; None if it is no number, or a bool."""
    try:
        item = np.asarray(value).item() if np.ndim(value) == 0 else None
    except (TypeError, ValueError):  # such as a key of JAX, or a list of lists
        return None
    good = isinstance(item, int | float) and not isinstance(item, bool)
    return item if good else None


def _span(least: Real, most: Real) -> str:
    if most == math.inf:
        return f"{least} or more"
    return f"from {least} to {most}" if least > -math.inf else f"at most {most}"
