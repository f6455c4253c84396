# SPDX-License-Identifier: Apache-2.0
"""A storm of kill -9 over one training run, some of them inside a save.

    python tests/faults.py --kills 50 --in_saves 10

Its last state must be, bit for bit, that of a run that nobody disturbed.
"""

import argparse
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dlm_jax.configs import smoke
from dlm_jax.runtime import checkpoint, logging
from dlm_jax.training.trainer import Trainer, language_job

ROOT = Path(__file__).parent.parent
QUICKLY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
LIFE = 9.0  # seconds: the latest moment of a kill that waits for no save


class Report(NamedTuple):
    """What the storm did; redone: steps that were done twice."""

    kills: int
    in_saves: int
    resumes: int
    redone: int


def settings(folder: Path, steps: int) -> dict:
    """A run of a moment, with dropout, that saves often."""
    texts = folder / "texts.txt"
    texts.write_text(
        "".join(f"word{i % 5} is not word{i % 3}\n" for i in range(32)),
        encoding="utf-8",
    )
    never = 10 * steps
    return {
        "data.source": "text",
        "data.path": str(texts),
        "data.length": 8,
        "data.valid_fraction": 0.25,
        "model.layers": 1,
        "model.hidden_dim": 16,
        "model.mlp_dim": 32,
        "model.positions": 8,
        "model.dropout": 0.1,
        "train.batch": 8,
        "train.total_steps": steps,
        "train.ckpt_steps": 60,
        "train.log_steps": 1,
        "train.valid_steps": never,
        "train.sample_steps": never,
        "sample.num_steps": 2,
    }


def command(options: dict, workdir: Path) -> list[str]:
    """The run as a user starts it."""
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    main = [sys.executable, "-m", "dlm_jax.main", "--config", "configs/smoke.py"]
    return [*main, *flags, "--workdir", str(workdir)]


def _rows(workdir: Path) -> bytes:
    path = workdir / "metrics.jsonl"
    return path.read_bytes() if path.exists() else b""


def _reached(workdir: Path) -> int:
    """The step that was recorded last."""
    if not _rows(workdir):
        return 0
    rows = logging.read(workdir / "metrics.jsonl", "train")
    return rows[-1]["step"] if rows else 0


def _one_life(
    line: list[str], workdir: Path, rng: random.Random, in_save: bool
) -> bool:
    """Starts the run and kills it; True where that fell inside a save."""
    left, end = set(), rng.uniform(0, LIFE)
    if checkpoint.folder(workdir).is_dir():
        left = {p.name for p in checkpoint.folder(workdir).iterdir()}
    began, env = time.monotonic(), os.environ | QUICKLY
    kinds = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, cwd=ROOT, env=env, **kinds) as process:
        try:
            while process.poll() is None:
                if in_save:
                    if _new_save(workdir, left):
                        time.sleep(rng.uniform(0, 0.02))
                        break
                    if time.monotonic() - began > 10 * LIFE:
                        raise RuntimeError("it has not saved in all this time")
                elif time.monotonic() - began > end:
                    break
                time.sleep(0.001)
            if process.poll() is not None:
                said = process.stderr.read().decode()
                raise RuntimeError(f"it ended by itself: {said}")
        finally:
            process.kill()
    return _new_save(workdir, left)


def _new_save(workdir: Path, left: set[str]) -> bool:
    """Whether a save has begun that is not complete, and is not a dead run's."""
    folder = checkpoint.folder(workdir)
    if not folder.is_dir():
        return False
    return any(
        "orbax-checkpoint-tmp" in p.name and p.name not in left
        for p in folder.iterdir()
    )


def storm(folder: Path, kills: int, in_saves: int, seed: int = 0) -> Report:
    """Kills a run until it was done `kills` times, lets it end, and compares the bits."""
    steps, rng = 400 * kills + 600, random.Random(seed)
    options = settings(folder, steps)
    whole, killed = folder / "whole", folder / "killed"
    seen = redone = resumes = 0
    for number in itertools.count():
        wanted = in_saves - seen
        if number >= kills and wanted <= 0:
            break
        in_save = rng.random() < wanted / max(kills - number, 1)
        before = _rows(killed)
        began_at = (checkpoint.all_steps(killed) or [0])[-1]
        seen += _one_life(command(options, killed), killed, rng, in_save)
        reached, there = _reached(killed), checkpoint.all_steps(killed)
        if _rows(killed) != before:  # else it was killed before its first step
            resumes += began_at > 0
            redone += reached - (there[-1] if there else 0)
        print(f"kill {number + 1}: step {reached}, saved {there[-1:]}", flush=True)
    env = os.environ | QUICKLY
    for workdir in (killed, whole):
        subprocess.run(
            command(options, workdir),
            cwd=ROOT,
            env=env,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=600 + 10 * LIFE * kills,  # its steps grow with the kills
        )
    config = smoke.get_config()
    config.update_from_flattened_dict(options)
    job = language_job(config)
    states = [Trainer(job, str(workdir)).state for workdir in (killed, whole)]
    for x, y in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(x, y)
    return Report(number, seen, resumes, redone)


def main() -> None:
    """Prints the report; fails where a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--in_saves", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = storm(Path(folder), args.kills, args.in_saves, args.seed)
    print(report, "the same bits as undisturbed")


if __name__ == "__main__":
    main()
