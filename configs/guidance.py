# SPDX-License-Identifier: Apache-2.0
"""Guidance settings of the control tasks: fields of `GuidanceConfig` by task.

tuned: chosen on targets of other seeds than those of the tables in docs/control.md.
published: the coefficients, step sizes and t_range of the published code. It averages
label log-probabilities and adds no noise to known tokens (docs/method.md, section 7.6).
"""

TASKS = (
    "unguided",
    "semantic",
    "pos",
    "tree",
    "span",
    "length",
    "infilling",
    "semantic+tree",
    "semantic+pos",
)
_MEAN = {"lr": 0.1, "mean_over_labels": True}

PRESETS = {
    "tuned": {task: {} for task in TASKS} | {"span": {"fluency": 0.001}},
    "published": {
        "unguided": {},
        "semantic": _MEAN | {"fluency": 0.01, "token_weight": 0.0},
        "pos": _MEAN | {"fluency": 0.0001},
        "tree": _MEAN | {"fluency": 0.0005},
        "span": _MEAN | {"fluency": 0.1},
        "length": {"noise_known": False},
        "infilling": {"noise_known": False},
        "semantic+tree": _MEAN | {"fluency": 0.0005, "token_weight": 0.0},
        "semantic+pos": _MEAN | {"fluency": 0.0001, "token_weight": 0.0},
    },
}
