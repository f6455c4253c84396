# SPDX-License-Identifier: Apache-2.0
"""dlm_jax: continuous text diffusion in JAX."""

import importlib
from typing import Any

__all__ = ["UserError", "load"]
_OBJECTS = {"load": "inference.loading", "UserError": "errors"}
_MODULES = {
    "nn": ("transformer",),
    "diffusion": (
        "adaptive",
        "autoregressive",
        "classifier",
        "embedding",
        "guidance",
        "likelihood",
        "losses",
        "model",
        "rounding",
        "samplers",
        "schedule",
    ),
    "data": ("grammar", "tokenizer"),
    "inference": ("mbr", "published"),
}
_HOMES = {name: package for package, names in _MODULES.items() for name in names}
_PACKAGES = (*_MODULES, "runtime", "training", "evaluation")


def __getattr__(name: str) -> Any:
    """Loads on first use: `dlm_jax.schedule` loads no Orbax."""
    if name in _OBJECTS:
        return getattr(importlib.import_module(f"dlm_jax.{_OBJECTS[name]}"), name)
    if name in _HOMES:
        return importlib.import_module(f"dlm_jax.{_HOMES[name]}.{name}")
    if name in (*_PACKAGES, "errors", "types"):
        return importlib.import_module(f"dlm_jax.{name}")
    raise AttributeError(f"module 'dlm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*__all__, *_HOMES, *_PACKAGES, "errors", "types"))
