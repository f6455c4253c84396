# SPDX-License-Identifier: Apache-2.0
"""dlm_jax: continuous text diffusion in JAX.

`load` opens a trained model; `schedule`, `losses`, `samplers` and the other modules of
the method are attributes of the package, each imported on first use.
"""

import importlib
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlm_jax.data import grammar as grammar
    from dlm_jax.data import tokenizer as tokenizer
    from dlm_jax.diffusion import adaptive as adaptive
    from dlm_jax.diffusion import autoregressive as autoregressive
    from dlm_jax.diffusion import classifier as classifier
    from dlm_jax.diffusion import embedding as embedding
    from dlm_jax.diffusion import guidance as guidance
    from dlm_jax.diffusion import likelihood as likelihood
    from dlm_jax.diffusion import losses as losses
    from dlm_jax.diffusion import model as model
    from dlm_jax.diffusion import rounding as rounding
    from dlm_jax.diffusion import samplers as samplers
    from dlm_jax.diffusion import schedule as schedule
    from dlm_jax.errors import UserError as UserError
    from dlm_jax.inference import mbr as mbr
    from dlm_jax.inference import published as published
    from dlm_jax.inference.guidance_config import GuidanceConfig as GuidanceConfig
    from dlm_jax.inference.loading import load as load
    from dlm_jax.inference.pipeline import DiffusionLM as DiffusionLM
    from dlm_jax.nn import transformer as transformer

__version__ = "0.1.0"
_OBJECTS = {
    "load": "inference.loading",
    "DiffusionLM": "inference.pipeline",
    "GuidanceConfig": "inference.guidance_config",
    "UserError": "errors",
}
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
        "time_sampling",
    ),
    "data": ("grammar", "tokenizer"),
    "inference": ("mbr", "published"),
}
_HOMES = {name: package for package, names in _MODULES.items() for name in names}
_PACKAGES = (*_MODULES, "configs", "evaluation", "runtime", "serving", "training")
__all__ = ["DiffusionLM", "GuidanceConfig", "UserError", "__version__", "load"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `dlm_jax.schedule` does not import the rest."""
    if name in _OBJECTS:
        return getattr(_import(_OBJECTS[name]), name)
    if name in _HOMES:
        return _import(f"{_HOMES[name]}.{name}")
    if name in (*_PACKAGES, "errors", "types"):
        return _import(name)
    raise AttributeError(f"module 'dlm_jax' has no attribute {name!r}")


def _import(name: str) -> Any:
    """Imports a module of this package; one that Flax imports draws from `random`."""
    state = random.getstate()
    try:
        return importlib.import_module(f"dlm_jax.{name}")
    finally:
        random.setstate(state)


def __dir__() -> list[str]:
    return sorted({*__all__, *_HOMES, *_PACKAGES, "errors", "types"})
