# SPDX-License-Identifier: Apache-2.0
"""How strongly, and by which rule, constraints steer a reverse chain."""

import dataclasses

from dlm_jax.diffusion.guidance import UPDATE_RULES
from dlm_jax.errors import UserError, choose


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
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
    lr: float = 0.2
    num_updates: int = 3
    fluency: float = 0.01
    t_range: tuple[float, float] = (0.05, 1.0)
    x0_weight: float = 0.0
    token_weight: float = 1.0
    cfg_weight: float = 1.0
    token_time_floor: float = 1.0
    noise_known: bool = False
    mean_over_labels: bool = False

    def __post_init__(self) -> None:
        choose("guidance.rule", UPDATE_RULES, self.rule)
        if self.num_updates < 0:
            raise UserError(
                f"guidance.num_updates={self.num_updates}: must be 0 or more"
            )
        if not 0 <= self.token_time_floor <= 1:
            raise UserError(
                f"guidance.token_time_floor={self.token_time_floor}: must be from 0 to 1"
            )


DEFAULT_GUIDANCE = GuidanceConfig()
