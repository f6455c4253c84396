# SPDX-License-Identifier: Apache-2.0
"""The console command `dlm`, also `python -m dlm_jax`: Ctrl-C is one line from here on."""

from dlm_jax import interrupts


def command() -> None:
    """Runs `main.command`, whose imports take a moment."""
    interrupts.end_at_first()
    from dlm_jax import main

    main.command()


if __name__ == "__main__":
    command()
