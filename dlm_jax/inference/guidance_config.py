# SPDX-License-Identifier: Apache-2.0
"""How strongly, and by which rule, constraints steer a reverse chain."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from dlm_jax.diffusion.guidance import UPDATE_RULES
from dlm_jax.errors import UserError, choose
from dlm_jax.inference.settings import Settings
from dlm_jax.ranges import flag, integer, real
from dlm_jax.types import Integer, Real


@dataclasses.dataclass(frozen=True)
class GuidanceConfig(Settings):
    """Settings of guidance, the same for all samples of a batch. Raises UserError.

    rule, lr, num_updates, fluency, t_range: gradient updates of the noisy sample by
    classifiers (`guidance.gradient_guidance`). x0_weight: weight of the classifiers'
    gradient on the estimate (`guidance.classifier_guidance_x0`). token_weight: weight
    of conditions on the model's own token probabilities (`guidance.token_guidance`).
    cfg_weight: classifier-free guidance towards known tokens, for a model trained with
    `loss.conditioning_prob`; 1 conditions without guidance. token_time_floor: fraction
    of its time that a guided token keeps (`guidance.token_time_guidance`). noise_known:
    known tokens are written with the noise of the current time; otherwise clean, as the
    published code does. mean_over_labels: use the mean of a classifier's label
    log-probabilities, as the published code does, instead of their sum.
    """

    rule: str = "sign"
    lr: Real = 0.2
    num_updates: Integer = 3
    fluency: Real = 0.01
    t_range: Any = (0.05, 1.0)
    x0_weight: Real = 0.0
    token_weight: Real = 1.0
    cfg_weight: Real = 1.0
    token_time_floor: Real = 1.0
    noise_known: Any = False
    mean_over_labels: Any = False

    NUMBERS: ClassVar[Mapping[str, float | None]] = {
        **dict.fromkeys(("lr", "fluency", "t_range", "token_weight")),
        "x0_weight": 0.0,
        "cfg_weight": 1.0,
        "token_time_floor": 1.0,
    }

    def __post_init__(self) -> None:
        choose("guidance.rule", UPDATE_RULES, self.rule)
        object.__setattr__(self, "t_range", _range("guidance.t_range", self.t_range))
        ranges = {
            **dict.fromkeys(("x0_weight", "token_weight", "cfg_weight"), ()),
            **dict.fromkeys(("lr", "fluency"), (0,)),
            "token_time_floor": (0, 1),
        }
        for field in dataclasses.fields(self):
            name, value = f"guidance.{field.name}", getattr(self, field.name)
            if isinstance(field.default, bool):
                value = flag(name, value)
            elif isinstance(field.default, int):
                value = integer(name, value, 0)
            elif isinstance(field.default, float):
                value = real(name, value, *ranges[field.name])
            object.__setattr__(self, field.name, value)


def _range(name: str, value: Any) -> tuple[float, float]:
    """Returns (first, last), two times. Raises UserError."""
    try:
        first, last = value
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}={value}: give two times, (first, last)") from error
    first = real(name, first)
    return first, real(name, last, first)


DEFAULT_GUIDANCE = GuidanceConfig()
