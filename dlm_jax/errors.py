# SPDX-License-Identifier: Apache-2.0
"""Errors that end a run with one line: a user's mistake, and preemption."""

from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """A user's mistake: one line with the file or flag, the value and the remedy."""

    def __init__(self, line: object):
        super().__init__(" ".join(str(line).split()))


class PreemptedError(Exception):
    """A run was stopped or lost a host; rerun the same command to resume it."""


def choose(flag: str, options: Mapping[str, Any], name: str) -> Any:
    """Returns options[name]; raises UserError naming the flag and the choices."""
    if name not in options:
        raise UserError(f"{flag}={name!r}: choose one of {', '.join(options)}")
    return options[name]
