# SPDX-License-Identifier: Apache-2.0
"""A trace of some steps of a run, for XProf, TensorBoard's profiler or Perfetto."""

from typing import Any

import jax

from dlm_jax.types import PyTree

WARM = 10  # steps before the trace: they compile


class StepTrace:
    """Saves JAX's trace of `steps` steps to a folder; none if steps is 0.

    They follow the first WARM ones of the range [start, total), or are its last.
    """

    def __init__(self, folder: Any, steps: int, *, start: int, total: int):
        self.folder, self.active = folder, False
        self.first = max(start, min(start + WARM, total - steps))
        self.last = self.first + steps

    def __call__(self, step: int, state: PyTree) -> None:
        """Starts or stops the trace before a step from a state; waits for the state."""
        if step == self.first < self.last:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self.active = True
        elif step == self.last and self.active:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes the trace if it has begun."""
        if self.active:
            self.active = False
            jax.profiler.stop_trace()
