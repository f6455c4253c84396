# SPDX-License-Identifier: Apache-2.0
"""What ends a run in one line: mistakes of the user, and preemption."""

from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """A mistake of the user: one line with the file or flag, value and remedy."""

    def __init__(self, line: object):
        super().__init__(" ".join(str(line).split()))


class PreemptedError(Exception):
    """A run was told to stop or lost a host; the same command resumes it."""


def choose(flag: str, options: Mapping[str, Any], name: str) -> Any:
    """Returns options[name]; raises UserError naming the flag and the choices."""
    if name not in options:
        raise UserError(f"{flag}={name!r}: choose one of {', '.join(options)}")
    return options[name]
