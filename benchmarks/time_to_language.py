# SPDX-License-Identifier: Apache-2.0
"""Measures how long a variant trains until its samples are grammatical.

    python benchmarks/time_to_language.py --variant modern \\
        --out benchmarks/results/time_modern.json

Trains configs/grammar.py by the command, keeps a checkpoint every --every steps, and
generates 256 samples from each. Prints the training seconds and the floating-point
operations at which 50%, 80% and 95% were first accepted. An interrupted run resumes.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from study import config_of, step_flops

import dlm_jax
from dlm_jax.data import grammar
from dlm_jax.evaluation import text_metrics
from dlm_jax.runtime import checkpoint, logging

SHARES, TEXTS = (0.5, 0.8, 0.95), 256


def train(args: argparse.Namespace, workdir: Path) -> None:
    """Trains by the command, or resumes."""
    command = [sys.executable, "-m", "dlm_jax.main", "--workdir", str(workdir)]
    command += ["--config", f"configs/grammar.py:{args.variant}"]
    settings = {"total_steps": args.steps, "ckpt_steps": args.every, "keep": 10_000}
    settings |= {"log_steps": 10, "valid_steps": 0, "sample_steps": 0}
    command += [f"--config.train.{name}={value}" for name, value in settings.items()]
    subprocess.run(command, check=True)


def measure(workdir: Path, step: int) -> dict[str, Any]:
    """Measures accepted share, entropy and length of a checkpoint's samples."""
    texts = dlm_jax.load(workdir, step).sample(TEXTS)
    return {
        "step": step,
        "accepted": float(np.mean([grammar.accepts(text) for text in texts])),
        "entropy": text_metrics.unigram_entropy(texts),
        "words": float(np.mean(text_metrics.lengths(texts))),
    }


def main() -> None:
    """Trains, measures every checkpoint, and prints and writes the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="modern")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    workdir = Path("runs") / f"time_{args.variant}_{args.steps}"
    train(args, workdir)
    seconds = {
        r["step"]: r["seconds"]
        for r in logging.read(workdir / "metrics.jsonl", "train")
    }
    flops = step_flops(config_of("configs/grammar.py", args.variant, {}))
    rows = []
    for step in checkpoint.all_steps(workdir):
        row = measure(workdir, step)
        rows.append(row | {"seconds": seconds[step], "flops": flops * step})
        print(rows[-1], flush=True)
    times = {}
    for share in SHARES:
        reached = [r for r in rows if r["accepted"] >= share]
        times[str(share)] = reached[0] if reached else None
        print(f"{share:.0%}: " + (str(reached[0]) if reached else "not reached"))
    record = {
        "variant": args.variant,
        "train_steps": args.steps,
        "times": times,
        "rows": rows,
    }
    Path(args.out).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
