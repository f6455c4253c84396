# SPDX-License-Identifier: Apache-2.0
"""JAX's persistent compilation cache, on disk: what was compiled once is loaded next time.

It is ~/.cache/dlm_jax/<kind of processor>, of up to 2 GB, unless environment variables
of JAX, or the process, set something else.
"""

import contextlib
import os
import zlib
from pathlib import Path
from typing import Any, cast

FOLDER, SIZE = "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"
LARGEST = 2**31  # bytes


def cache_for_processor(folder: Path) -> Path:
    """Returns the subfolder for compilations that run on this kind of processor."""
    kind = b""
    with contextlib.suppress(OSError):  # the file exists on Linux only
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        kind = next((line for line in lines if line.startswith(b"flags")), b"")
    return folder / f"{zlib.crc32(kind):08x}"


def own_folder() -> Path | None:
    """Returns the folder of the cache; None if the user has no home directory."""
    with contextlib.suppress(RuntimeError):
        return cache_for_processor(Path.home() / ".cache" / "dlm_jax")
    return None


def keep_for_command() -> None:
    """Turns the cache on by the environment, before JAX is imported."""
    if folder := own_folder():
        os.environ.setdefault(FOLDER, str(folder))
    os.environ.setdefault(SIZE, str(LARGEST))


def keep_for_library() -> None:
    """Turns the cache on in this process, unless it has one or JAX has compiled before.

    Where the folder cannot be written there is none.
    """
    import jax

    folder, config = own_folder(), cast(Any, jax.config)
    if folder is None or config.jax_compilation_cache_dir is not None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            config.update("jax_compilation_cache_dir", str(folder))
            if SIZE not in os.environ:
                config.update("jax_compilation_cache_max_size", LARGEST)
