# SPDX-License-Identifier: Apache-2.0
"""The bundled run configs: in a source tree the files of its top-level `configs/`.

A wheel holds those files here, in place of this one.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__path__ = [str(Path(__file__).parents[2] / "configs")]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
