# SPDX-License-Identifier: Apache-2.0
"""A folder of `save_pretrained` with what a reader checks: measures, samples, a picture.

evaluation.json  measures of samples that anybody can repeat, each with its tolerance
samples.txt      those samples
trajectory.png   a text from noise to its end
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dlm_jax import console
from dlm_jax.data import grammar
from dlm_jax.errors import UserError
from dlm_jax.evaluation import plots, text_metrics
from dlm_jax.inference import loading, translation
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.ranges import integer
from dlm_jax.runtime import backend, checkpoint

EVALUATION, SAMPLES, PICTURE = "evaluation.json", "samples.txt", "trajectory.png"
GROUPS = 8  # of the jackknife
WIDTH, LEAST = 5, 0.05  # the tolerance: in standard errors, and at least


@backend.prepared
def export(lm: DiffusionLM, workdir: str) -> Path:
    """Saves a model as a folder to share; returns it. Raises UserError.

    config.export says how. What is measured is the folder's model, as it was rounded.
    """
    if "export" not in lm.config:
        raise UserError(
            f"{workdir}: the saved config has no section export; pass --config"
        )
    options = lm.config["export"]
    n = integer("config.export.n", options["n"], GROUPS)
    if options["classifiers"]:
        lm = lm.with_classifier(*options["classifiers"].split())
    sources: list[str] = []
    if lm.cfg.known_source:
        sources = translation.read_sources(lm, lm.config["sample"]["sources"])[:n]
        lm.config["sample"]["sources"] = ""  # a file of this machine
    folder = Path(options["folder"] or Path(workdir) / "pretrained")
    lm.save_pretrained(folder, dtype=options["dtype"])
    describe(folder, {"n": n, "seed": 0, "sources": sources})
    return folder


def describe(folder: Path, protocol: dict[str, Any]) -> None:
    """Writes the measures, the samples and the picture of the model in a folder."""
    lm = loading.load(folder)
    texts = _texts(lm, protocol)
    record = {
        "step": lm.step,
        "protocol": protocol,
        "measures": measure(lm, texts, protocol),
    }
    checkpoint.write_json(folder / EVALUATION, record)
    (folder / SAMPLES).unlink(missing_ok=True)
    console.write_lines(texts, str(folder / SAMPLES))
    if not (lm.cfg.causal or lm.cfg.known_source):
        figure = plots.trajectory_figure(lm)
        figure.savefig(folder / PICTURE, dpi=80, facecolor="white")


def _texts(lm: DiffusionLM, protocol: dict[str, Any]) -> list[str]:
    if lm.cfg.known_source:
        return lm.translate(protocol["sources"], seed=protocol["seed"], mbr=1)
    return lm.sample(protocol["n"], seed=protocol["seed"])


def measure(
    lm: DiffusionLM, texts: list[str], protocol: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Returns each measure of a model's texts: its value, and its tolerance.

    The tolerance is five standard errors of a jackknife over groups of texts: other
    machines round otherwise, and so write other texts from the same seed.
    """
    sources = protocol["sources"] or None
    ids = lm.encode(texts, sources=sources)
    bounds = lm.nll(ids, seed=0).total()
    lengths = np.maximum(text_metrics.lengths(texts), 1)

    def pick(index: Any) -> list[str]:
        return [texts[i] for i in index]

    measures: dict[str, Callable[[Any], Any]] = {
        "words per text": lambda index: lengths[index].mean(),
        "unigram entropy, nats": lambda i: text_metrics.unigram_entropy(pick(i)),
        "distinct texts": lambda index: len({*pick(index)}) / len(index),
        "bound of these texts, nats per word": lambda index: (
            np.asarray(bounds)[index].sum() / lengths[index].sum()
        ),
    }
    if lm.config["data"]["source"] == "grammar" and not sources:
        measures["accepted by the grammar"] = lambda index: np.mean(
            [grammar.accepts(text) for text in pick(index)]
        )
    every = np.arange(len(texts))
    return {name: _with_tolerance(value, every) for name, value in measures.items()}


def _with_tolerance(value: Callable[[Any], Any], every: np.ndarray) -> dict[str, float]:
    left = [value(every[every % GROUPS != g]) for g in range(GROUPS)]
    error = np.sqrt((GROUPS - 1) * np.var(left))
    tolerance = max(LEAST, WIDTH * float(error))
    return {"value": round(float(value(every)), 4), "tolerance": round(tolerance, 4)}


def check(folder: Path) -> list[str]:
    """Measures a folder's model again; returns a line for each measure that has moved."""
    record = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    lm, protocol = loading.load(folder), record["protocol"]
    found = measure(lm, _texts(lm, protocol), protocol)
    return [
        f"{name}: {found[name]['value']}, not {was['value']} ± {was['tolerance']}"
        for name, was in record["measures"].items()
        if not abs(found[name]["value"] - was["value"]) <= was["tolerance"]
    ]
