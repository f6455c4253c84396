# SPDX-License-Identifier: Apache-2.0
"""Errors that end a run with one line: a user's mistake, preemption, the machine."""

import difflib
import errno
import re
from collections.abc import Iterable, Mapping
from typing import Any

MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# what the machine, not the file, is the reason of; TensorStore says it in words
ENVIRONMENT = re.compile(
    r"permission denied|permission_denied|operation not permitted|unauthenticated|"
    r"out of memory|resource_exhausted|cannot allocate memory|bad_alloc|"
    r"too many open files|input/output error|stale file handle|no space left on device|"
    r"quota exceeded|unavailable|deadline_exceeded|timed out|connection",
    re.IGNORECASE,
)

# paths, whose words say nothing: in quotes, or without spaces
PATH = re.compile(
    r"""(?<!\w)(["'])[^"']*/[^"']*\1|(?<!\S)(?!input/output\b)\S*/\S*""", re.I
)


class UserError(ValueError):
    """A user's mistake: one line with the file or flag, the value and the remedy."""

    def __init__(self, line: object):
        super().__init__(" ".join(str(line).split()))


class PreemptedError(Exception):
    """A run was stopped or lost a host; rerun the same command to resume it."""


def choose(flag: str, options: Mapping[str, Any], name: Any) -> Any:
    """Returns options[name]; raises UserError naming the flag and the choices."""
    if not isinstance(name, str) or name not in options:
        raise UserError(f"{flag}={name!r}: {choices(name, options)}")
    return options[name]


def choices(name: Any, options: Iterable[str]) -> str:
    """Returns "choose one of ..." for an error, with the option nearest to name if any."""
    options = list(options)
    near = difflib.get_close_matches(str(name), options, n=1)
    return "".join(f"did you mean {x!r}? " for x in near) + (
        f"choose one of {', '.join(options)}"
    )


def environment_reason(error: BaseException | None) -> str:
    """Returns why this machine cannot read, in one line; "" if the files may be why.

    Memory, permissions, limits and the storage's own failures; also of the causes of
    an error.
    """
    while error is not None:
        line = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, MemoryError):
            return f"out of memory: {line}"
        if isinstance(error, OSError) and error.errno not in (None, *MISSING):
            return line
        if found := ENVIRONMENT.search(PATH.sub("", str(error))):
            return found.group() if len(line) > 100 else line
        error = error.__cause__ or error.__context__
    return ""
