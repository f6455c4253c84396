# SPDX-License-Identifier: Apache-2.0
"""dlm_jax: continuous text diffusion in JAX."""

import importlib
from typing import Any

__all__ = ["UserError", "load"]
_HOMES = {"load": "dlm_jax.generate", "UserError": "dlm_jax.types"}


def __getattr__(name: str) -> Any:
    """Lazy: `import dlm_jax.schedule` loads no Orbax."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    try:
        return importlib.import_module(f"dlm_jax.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"dlm_jax.{name}":
            raise
        raise AttributeError(f"module 'dlm_jax' has no attribute {name!r}") from None
