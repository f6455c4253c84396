# SPDX-License-Identifier: Apache-2.0
"""Compares solvers, clamp, churn and numbers of steps, with the grammar's weights.

    python benchmarks/samplers.py --workdir runs/quickstart \\
        --out benchmarks/results/samplers.json

Each row is a setting: the share of samples that the grammar accepts, their unigram
entropy (nats) and length (words), with standard errors over seeds. The first is
held-out text.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

import dlm_jax
from dlm_jax.data import grammar
from dlm_jax.evaluation import text_metrics

OFF = {"clamp": False}
SETTINGS: list[dict[str, Any]] = [
    {"solver": "marginal"},
    *({"solver": "marginal", "clamp": t} for t in (0.75, 0.5, 0.25)),
    {"solver": "marginal", **OFF},
    {"solver": "ddim", "eta": 1.0},
    {"solver": "ddim", "eta": 1.0, "clamp": 0.5},
    {"solver": "ddim", "eta": 1.0, **OFF},
    {"solver": "ddim", "eta": 0.0, **OFF},
    {"solver": "ddim", "eta": 1.0, "churn": 3.0, "temperature": 0.9, **OFF},
    {"solver": "ancestral", "sigma": "large"},
    {"solver": "dpmpp_2m"},
    {"solver": "dpmpp_2m", **OFF},
]


def row(texts: list[list[str]]) -> dict[str, list[float]]:
    """Returns each measure as [mean, standard error] over the seeds."""
    values = {
        "accepted": [np.mean([grammar.accepts(t) for t in one]) for one in texts],
        "entropy": [text_metrics.unigram_entropy(one) for one in texts],
        "words": [np.mean(text_metrics.lengths(one)) for one in texts],
        "distinct": [len(set(one)) / len(one) for one in texts],
    }
    error = math.sqrt(len(texts))
    return {
        name: [float(np.mean(v)), float(np.std(v, ddof=1) / error)]
        for name, v in values.items()
    }


def main() -> None:
    """Measures every setting at every number of steps; prints and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", default="runs/quickstart")
    parser.add_argument("--num_steps", type=int, nargs="*", default=[16, 64, 200])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--out", default="benchmarks/results/samplers.json")
    args = parser.parse_args()
    lm = dlm_jax.load(args.workdir)
    seeds = range(args.seeds)
    held_out = [grammar.sample(10_000 + seed, args.n) for seed in seeds]
    rows = [{"setting": {}, **row(held_out)}]
    for num_steps in args.num_steps:
        for setting in SETTINGS:
            options = {"num_steps": num_steps, **setting}
            texts = [lm.sample(args.n, seed=seed, **options) for seed in seeds]
            rows.append({"setting": options, **row(texts)})
            print(" ".join(f"{k}={v}" for k, v in options.items()), end="  ")
            print(
                {
                    k: [round(x, 3) for x in v]
                    for k, v in rows[-1].items()
                    if k in rows[0] and k != "setting"
                },
                flush=True,
            )
    Path(args.out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
