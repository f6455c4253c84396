# SPDX-License-Identifier: Apache-2.0
"""Trains a small E2E model in the remaining time and evaluates it.

It uses the later recipe (docs/method.md, section 10) at 5M parameters. The averaged
weights are saved as a run directory for `dlm_jax.load`, in files of at most 15 MiB:

    cat model.tar.xz.* | tar xJ -C runs    # then dlm_jax.load("runs/model")
"""

import io
import json
import lzma
import os
import signal
import tarfile
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lib import alternate, ours

import dlm_jax
from dlm_jax.data import sources
from dlm_jax.diffusion import model
from dlm_jax.errors import PreemptedError
from dlm_jax.evaluation import control, report, text_metrics
from dlm_jax.evaluation import control_targets as held_out
from dlm_jax.evaluation.control_tasks import CONTROL_TASKS, ControlTask
from dlm_jax.inference import constraints
from dlm_jax.inference.guidance_config import GuidanceConfig
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.runtime import checkpoint, sharding
from dlm_jax.training import loop, train_step
from dlm_jax.types import UNK
from stages import Job, together

SIZE = ("model.hidden_dim=256", "model.mlp_dim=1024", "model.layers=4", "model.heads=4")
TINY = ("model.hidden_dim=32", "model.mlp_dim=64", "model.layers=1", "model.heads=2")
VOCAB = 821
EVALUATION = 75.0  # seconds of the evaluation, with compilation
FAST = 0.01  # the larger batch is used if a step takes fewer seconds than this
PART = 15 * 2**20


def config_of(job: Job, batch: int) -> Any:
    """Returns `configs/e2e.py:modern` with size, learning rate and EMA for 5M."""
    config = alternate.load_config("configs/e2e.py:modern")
    alternate.changed(config, TINY if job.rehearse else SIZE)
    config.data.path = job.data
    config.data.min_count = 1 if job.rehearse else 10
    config.model.update(dim=32, positions=64, attention_dropout=0.0)
    config.model.dtype = "float32" if job.rehearse else "bfloat16"
    config.optim.update(lr=3e-3, warmup=20 if job.rehearse else 200, ema=0.999)
    config.train.update(batch=batch, ckpt_steps=0, sample_steps=0, valid_batches=8)
    config.sample.update(n=64, batch=64, seed=0)
    return config


def batch_of(job: Job, speed: dict[str, Any]) -> int:
    """Returns 256 if the speed measured at 87M predicts a fast step, else 64."""
    if job.rehearse:
        return 8
    rows = speed.get("rows", {}).values()
    rate = max((r["tokens/s"] for r in rows if "tokens/s" in r), default=0.0)
    predicted = 256 * 64 / rate * 5 / 87 if rate else 1.0
    return 256 if predicted < FAST else 64


def run(job: Job, speed: dict[str, Any]) -> None:
    """Trains until the evaluation must begin, then evaluates; reports each result."""
    config = config_of(job, batch_of(job, speed))
    record: dict[str, Any] = {"batch": config.train.batch}
    steps = 30 if job.rehearse else _steps(job, config, record)
    config.train.update(total_steps=steps, valid_steps=max(1, steps // 8))
    record["config"] = json.loads(config.to_json_best_effort())
    job.report(record)
    with tempfile.TemporaryDirectory() as folder:
        workdir = str(Path(folder) / "run")
        record |= _train(job, config, workdir)
        job.report(record)
        lm = dlm_jax.load(workdir)
        record["parameters"] = model.count(lm.ema)
        record["model"] = pack(lm, workdir, job.path.parent)
        job.report(record)

        def done(name: str, result: Any) -> None:
            record[name] = result
            job.report(record)

        together(_pieces(lm, config, job.rehearse), done=done)
        _by_chance(record)
        job.report(record)


def _steps(job: Job, config: Any, record: dict[str, Any]) -> int:
    """Returns how many training steps fit, from the time of steps on random ids."""
    step = ours.Training(config, VOCAB)
    for _ in range(2):
        step()
    began = time.perf_counter()
    for _ in range(20):
        step()
    record["seconds per step"] = (time.perf_counter() - began) / 20
    left = job.left() - EVALUATION - 30  # loading, compilation, validation
    return max(200, int(0.8 * left / record["seconds per step"]))


def _train(job: Job, config: Any, workdir: str) -> dict[str, Any]:
    """Trains; a run that takes too long stops by SIGTERM, which saves a checkpoint."""
    limit = job.left() - EVALUATION
    if limit < 30 and not job.rehearse:
        raise RuntimeError(f"no time to train: {job.left():.0f} s left")
    # ignores a signal that arrives before the loop has set its own handler
    signal.signal(signal.SIGTERM, lambda *_: None)
    stop = threading.Timer(limit, os.kill, (os.getpid(), signal.SIGTERM))
    began = time.monotonic()
    stop.start()
    try:
        loop.train(config, workdir)
    except PreemptedError as error:
        print(error, flush=True)
    finally:
        stop.cancel()
    lines = (Path(workdir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    curve = [(r["step"], r["loss"]) for r in rows if r["kind"] == "valid"]
    return {
        "train_steps": checkpoint.choose_step(workdir),
        "training seconds": time.monotonic() - began,
        "held-out cross-entropy by step, nats per position": curve,
    }


def pack(lm: DiffusionLM, workdir: str, out: Path) -> list[str]:
    """Packs the averaged weights as a run directory; returns the names of its parts."""
    records = checkpoint.read_records(workdir, lm.step)
    step = np.asarray(lm.step, np.int32)
    state = train_step.TrainState(step, lm.ema, lm.ema, (), (), lm.schedule_state)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        checkpoint.write_run_config(model, lm.config)
        writer = checkpoint.manager(model, keep=1)
        checkpoint.save(writer, lm.step, sharding.replicate(state), records)
        checkpoint.wait(writer)
        writer.close()
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as file:
            file.add(model, "model")
    # a window over the whole file compresses the second copy of the weights away
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 2**27}]
    packed = lzma.compress(archive.getvalue(), filters=filters)
    names = []
    for i in range(0, len(packed), PART):
        names.append(f"model.tar.xz.{i // PART}")
        (out / names[-1]).write_bytes(packed[i : i + PART])
    return names


# --- evaluation


def _pieces(lm: DiffusionLM, config: Any, tiny: bool) -> dict[str, Any]:
    """Returns each measurement as a function, to run in parallel."""
    texts = sources.load_texts(config.data, "valid")
    rows = np.random.default_rng(0).permutation(len(texts))
    n = 8 if tiny else 256
    held_out = [texts[i] for i in rows[:n]]
    return {
        "bound": partial(_bound, lm, held_out, 2 if tiny else 8),
        "samples": partial(lm.sample, 64, seed=0),
        **{
            f"control: {name}": partial(_control, lm, config, name, 8 if tiny else 64)
            for name in CONTROLS
        },
    }


def _bound(lm: DiffusionLM, texts: list[str], draws: int) -> dict[str, Any]:
    """Returns nats per token (END counted) and per position, with standard errors."""
    rows = report.likelihood_rows(lm, texts, draws)
    names = ("nats/token", "nats/position")
    return {name: tuple(rows[name]) for name in names} | {"texts": len(texts)}


def _a_word(sentence: Any, rng: Any) -> str:
    words = [w for w in sentence.text.split() if len(w) > 3]
    return words[rng.integers(len(words))]


CONTROLS = {
    "length": CONTROL_TASKS["length"],
    "infilling": CONTROL_TASKS["infilling"],
    "word": ControlTask(
        _a_word,
        lambda word, lm: constraints.parse_constraints(
            lm.tokenizer, lm.length, {}, contains=word
        ),
        lambda text, word, scorer: {"word": float(held_out.has_phrase(word, text))},
    ),
}


def _control(lm: DiffusionLM, config: Any, name: str, n: int) -> dict[str, Any]:
    """Measures success on held-out targets at 32 steps; keeps targets and texts."""
    task, rng = CONTROLS[name], np.random.default_rng(0)
    sentences = [
        s
        for s in held_out.load_targets(config, name, 2 * n)
        if UNK not in lm.tokenizer.encode(s.text)
        and any(len(w) > 3 for w in s.text.split())
        and len(s.text.split()) <= lm.length - 2
    ][:n]
    targets = [task.target(s, rng) for s in sentences]
    scorer = held_out.make_scorer(config, name, None)
    options: Any = {"samples": 1, "seeds": 1, "num_steps": 32}
    row = control.run_task(lm, task, targets, scorer, GuidanceConfig(), **options)
    keep = ("success", "texts", "seconds per 50", "unigram entropy")
    return {"targets": targets, **{k: row[k] for k in keep}}


def _by_chance(record: dict[str, Any]) -> None:
    """Adds how often unconstrained samples meet the targets, and their entropy."""
    samples, words = record["samples"], record["control: word"]["targets"]
    pairs = [(t, w) for t in samples for w in words]
    by_chance = [held_out.has_phrase(w, t) for t, w in pairs]
    record["control: word"]["by chance"] = float(np.mean(by_chance))
    lengths = record["control: length"]["targets"]
    same = [len(t.split()) == n for t in samples for n in lengths]
    record["control: length"]["by chance"] = float(np.mean(same))
    record["samples' unigram entropy, nats"] = text_metrics.unigram_entropy(samples)
    record["samples' words"] = float(np.mean(text_metrics.lengths(samples)))


def table(record: dict[str, Any]) -> list[str]:
    """Returns the lines that describe the record."""
    if "train_steps" not in record:
        return ["nothing was trained"]
    lines = [
        f"{record.get('parameters', 0):,} parameters, {record['train_steps']} steps of "
        f"{record['batch']} texts in {record['training seconds']:.0f} s"
    ]
    curve = record["held-out cross-entropy by step, nats per position"]
    lines.append("held-out: " + ", ".join(f"{x:.3f} at {n}" for n, x in curve))
    if "bound" in record:
        mean, error = record["bound"]["nats/token"]
        place, _ = record["bound"]["nats/position"]
        lines.append(
            f"bound: {mean:.3f} ± {error:.3f} nats per token, {place:.3f} per position"
        )
    for name in CONTROLS:
        if row := record.get(f"control: {name}"):
            shares = ", ".join(f"{n} {v[0]:.1%}" for n, v in row["success"].items())
            chance = (
                f" (by chance {row['by chance']:.1%})" if "by chance" in row else ""
            )
            lines.append(f"{name} at 32 steps: {shares}{chance}")
    if "samples" in record:
        entropy = record["samples' unigram entropy, nats"]
        lines.append(f"entropy of 64 samples: {entropy:.3f} nats; the first 8:")
        lines += [f"  | {text}" for text in record["samples"][:8]]
    return lines
