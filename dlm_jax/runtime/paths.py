# SPDX-License-Identifier: Apache-2.0
"""The options of a config that name places, which are no part of what a run is.

What they lead to is known by its content. A run records them as absolute paths, so
that its text is found from every folder; any of them may change, as files move.
"""

import glob
import os
from typing import Any

DATA = ("data.path", "data.valid_path", "data.tfds_dir")
TRAINING = (
    *(*DATA, "data.tokenizer_path", "embedding.path"),
    *("classifier.model", "classifier.conllu", "distill.teacher"),
)
SEVERAL = ("data.path", "data.valid_path")  # files with commas between, and patterns
LISTS = ("control.classifiers",)  # paths separated by spaces
PATHS = (
    *(*TRAINING, *LISTS, "control.ar_model", "control.targets"),
    *("evaluate.ar_model", "evaluate.gpt2", "evaluate.texts"),
)


def absolute(record: dict) -> dict:
    """Returns a resolved config with the paths that exist here made absolute.

    Other values, such as the name of a bundled model or of a data set, stay.
    """
    record = {k: dict(v) if isinstance(v, dict) else v for k, v in record.items()}
    for path in PATHS:
        section, _, name = path.partition(".")
        if section not in record or name not in record[section]:
            continue
        if path == "data.path" and record["data"]["source"] == "tfds":
            continue  # a name
        value = record[section][name]
        parts, joint = [value], " "
        if path in LISTS:
            parts = value.split()
        elif path in SEVERAL and not os.path.exists(value):
            parts, joint = value.split(","), ","
        record[section][name] = joint.join(map(_absolute, parts))
    return record


def _absolute(value: Any) -> Any:
    exists = value and (os.path.exists(value) or glob.glob(value))
    return os.path.abspath(value) if exists else value


def without(section: str, options: dict) -> dict:
    """Returns the options of a section except its paths."""
    return {k: v for k, v in options.items() if f"{section}.{k}" not in PATHS}
