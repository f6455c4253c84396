# SPDX-License-Identifier: Apache-2.0
"""Models of the Hugging Face Hub, by "owner/name": only our own files are fetched."""

import re
from pathlib import Path

from dlm_jax.errors import UserError
from dlm_jax.inference import pretrained

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILES = (pretrained.WEIGHTS, pretrained.CONFIG, pretrained.TOKENIZER)
PATTERNS = [*FILES, *(f"{pretrained.CLASSIFIERS}/*/{name}" for name in FILES[:2])]


def is_name(name: str) -> bool:
    """Returns whether this may be "owner/name": no path whose first folder exists."""
    return bool(NAME.fullmatch(name)) and not Path(name).parent.exists()


def download(name: str) -> Path:
    """Returns the local folder of a model; a second call does without the network.

    Raises UserError, in one line, if the package is missing or the model is not found.
    """
    lacks = f"{name}: no such folder, and no model of the Hugging Face Hub"
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(
            f"{name}: no such folder; to load it from the Hugging Face Hub, "
            "pip install 'dlm_jax[hub]'"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=PATTERNS, library_name="dlm_jax"
        )
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{name}: no such folder, and the Hugging Face Hub cannot be reached: "
            "connect to it once, or copy the model's folder"
        ) from error
    except (OSError, HFValidationError) as error:  # its HTTP errors are OSErrors
        raise UserError(f"{lacks}: {str(error).splitlines()[0]}") from error
    for file in FILES:
        if not (Path(folder) / file).is_file():
            raise UserError(f"{name}: not a model of dlm_jax: it has no {file}")
    return Path(folder)
