# SPDX-License-Identifier: Apache-2.0
"""Compares solvers, the clamp's start, churn and numbers of steps, with a run's weights.

    python benchmarks/samplers.py --workdir runs/quickstart \\
        --out benchmarks/results/samplers.json
    python benchmarks/samplers.py --workdir e2e --ar_model runs/e2e_ar \\
        --data FOLDER_OF_src1_train.txt --only marginal --num_steps 64 --n 128 \\
        --out benchmarks/results/samplers_e2e.json

Each row is a setting: the share of samples that the grammar accepts, or their nats per
token under an autoregressive model; their unigram entropy (nats) and length (words), with
standard errors over seeds. The first is held-out text.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

import dlm_jax
from dlm_jax.data import grammar, sources
from dlm_jax.evaluation import report, text_metrics
from dlm_jax.inference.pipeline import DiffusionLM

OFF = {"clamp": False}
SETTINGS: list[dict[str, Any]] = [
    {"solver": "marginal"},
    *({"solver": "marginal", "clamp": t} for t in (0.75, 0.5, 0.4, 0.25)),
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


Judge = Callable[[list[str]], float]


def row(name: str, judge: Judge, texts: list[list[str]]) -> dict[str, list[float]]:
    """Returns each measure as [mean, standard error] over the seeds; name: the judge's."""
    values = {
        name: [judge(one) for one in texts],
        "entropy": [text_metrics.unigram_entropy(one) for one in texts],
        "words": [np.mean(text_metrics.lengths(one)) for one in texts],
        "distinct": [len(set(one)) / len(one) for one in texts],
    }
    error = math.sqrt(len(texts))
    return {
        name: [float(np.mean(v)), float(np.std(v, ddof=1) / error)]
        for name, v in values.items()
    }


def accepted(texts: list[str]) -> float:
    """Returns the share of texts that the grammar accepts."""
    return float(np.mean([grammar.accepts(text) for text in texts]))


def nats_per_token(ar_model: DiffusionLM) -> Judge:
    """Returns the judge of an autoregressive model: nats per token, END counted."""

    def judge(texts: list[str]) -> float:
        ids = ar_model.encode(texts)
        return float(ar_model.nll(ids).total().sum() / report.tokens(ids).sum())

    return judge


def main() -> None:
    """Measures every setting at every number of steps; prints and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", default="runs/quickstart")
    parser.add_argument("--num_steps", type=int, nargs="*", default=[16, 64, 200])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--only", default="", help="a solver")
    parser.add_argument("--ar_model", default="", help="judges texts of other sources")
    parser.add_argument(
        "--data", default="", help="config.data.path of the run, with --ar_model"
    )
    parser.add_argument("--out", default="benchmarks/results/samplers.json")
    args = parser.parse_args()
    lm, seeds = dlm_jax.load(args.workdir), range(args.seeds)
    if args.ar_model:
        name, judge = "nats_per_token", nats_per_token(dlm_jax.load(args.ar_model))
        data = ml_collections.ConfigDict(lm.config["data"] | {"path": args.data})
        valid = np.array(sources.load_texts(data, "valid"))
        rngs = (np.random.default_rng(seed) for seed in seeds)
        held_out = [rng.choice(valid, args.n, replace=False).tolist() for rng in rngs]
    else:
        name, judge = "accepted", accepted
        held_out = [grammar.sample(10_000 + seed, args.n) for seed in seeds]
    rows = [{"setting": {}, **row(name, judge, held_out)}]
    print("held-out text", rows[0], flush=True)
    for num_steps in args.num_steps:
        for setting in [s for s in SETTINGS if args.only in ("", s["solver"])]:
            options = {"num_steps": num_steps, **setting}
            texts = [lm.sample(args.n, seed=seed, **options) for seed in seeds]
            rows.append({"setting": options, **row(name, judge, texts)})
            print(" ".join(f"{k}={v}" for k, v in options.items()), end="  ")
            print(
                {
                    k: [round(x, 3) for x in v]
                    for k, v in rows[-1].items()
                    if k in rows[0] and k != "setting"
                },
                flush=True,
            )
    Path(args.out).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
