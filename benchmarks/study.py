# SPDX-License-Identifier: Apache-2.0
"""Compares the paper's recipe, the later one and its ablations at equal operations.

    python benchmarks/study.py --steps 1000 --seeds 3 \\
        --out benchmarks/results/study.json
    python benchmarks/study.py --plot benchmarks/results/study.json

Each run trains by the command in runs/study, and a row of figures is added to the JSON
file. Existing rows are skipped, and an interrupted run resumes. Every run gets the
floating-point operations of --steps steps of the variant `modern`.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from matplotlib.figure import Figure

import dlm_jax
from dlm_jax.data import grammar, sources
from dlm_jax.evaluation import report, text_metrics
from dlm_jax.nn import transformer
from dlm_jax.nn.transformer import DenoiserConfig

CALLS = (8, 16, 32, 64, 200)
FEW = (16, 64)  # for ablations
MANY, MANY_TEXTS = 2000, 64  # for the first seed of faithful and modern
VOCAB = {"grammar": 151, "e2e": 821}
TEXTS, SAMPLE_SEEDS = 256, 3
# names of runs in older JSON files
FORMER_NAMES = {"teacher": "autoregressive", "no output prior": "no token posterior"}
# name: (variant, changes of its config); faithful and modern have several seeds
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "autoregressive": ("autoregressive", {}),  # measures the samples of the others
    "modern": ("modern", {}),
    "faithful": ("faithful", {}),
    "no self-conditioning": (
        "modern",
        {"model.self_cond": False, "loss.self_cond_prob": 0.0},
    ),
    "no token posterior": ("modern", {"model.token_posterior_input": False}),
    "AdamW": ("modern", {"optim.name": "adamw", "optim.lr": 2e-3}),
    "fixed logistic schedule": (
        "modern",
        {"schedule.adaptive": "", "model.time_input": "t"},
    ),
    "adaptive Gumbel schedule": ("modern", {"schedule.adaptive": "gumbel"}),
    "post-LN trunk": ("modern", {"model.trunk": "post_ln"}),
    "truncation": ("modern", {"loss.truncate_prob": 0.03}),
    "free table": ("modern", {"embedding.normalize": False}),
    "regression": ("modern", {"model.predicts": "x0", "loss.objective": "x0"}),
    "likelihood objective": (
        "modern",
        {"loss.objective": "nelbo", "schedule.adaptive": "", "model.time_input": "t"},
    ),
}
MAIN = ("modern", "faithful")
BASE = {"model.known_length": False}  # of all runs: some objectives do without


def config_of(path: str, variant: str, changes: dict[str, Any]) -> Any:
    """Returns the config of a run: a variant of a file, with changes."""
    spec = importlib.util.spec_from_file_location("config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant)
    config.update_from_flattened_dict(changes)
    return config


def step_flops(config: Any) -> float:
    """Counts the floating-point operations of a training step.

    A multiply-add counts as two, and a backward pass as two forward passes. Counted are
    the matrices, attention, the products with the table, one more forward pass for
    self-conditioning in its share of steps, and Muon's orthogonalisation.
    """
    cfg, vocab = DenoiserConfig(**config.model), VOCAB[config.data.source]
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), cfg, vocab))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    names = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    per_token = sum(
        leaf.size
        for name, leaf in names
        if "kernel" in name and "time" not in name and "modulation" not in name
    )
    per_token += 2 * cfg.layers * config.data.length * cfg.hidden_dim
    # the estimate's or the rounding's product, and two of the token posterior
    tables = 1 + 2 * cfg.token_posterior_input
    per_token += tables * vocab * cfg.dim
    passes = 3 + config.loss.self_cond_prob
    flops = 2.0 * passes * per_token * config.train.batch * config.data.length
    if config.optim.name == "muon":  # Newton-Schulz: 3 times x x^T, its square, x
        layers = [(n, s) for n, s in names if "layer_" in n and "kernel" in n]
        shapes = [sorted(s.shape) for n, s in layers if "modulation" not in n]
        flops += sum(3 * (4 * m * m * n + 2 * m**3) for m, n in shapes)
    return flops


def train(path: str, variant: str, changes: dict, workdir: Path) -> float:
    """Trains by the command, or resumes; returns the seconds of training."""
    command = [sys.executable, "-m", "dlm_jax.main", "--config", f"{path}:{variant}"]
    command += [f"--config.{name}={value}" for name, value in changes.items()]
    subprocess.run([*command, "--workdir", str(workdir)], check=True)
    log = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(log[-1])["seconds"]


def calls_of(name: str, seed: int) -> dict[int, int]:
    """Returns {number of steps: number of texts to sample}."""
    counts = {"autoregressive": (1,)}.get(name, CALLS if name in MAIN else FEW)
    extra = {MANY: MANY_TEXTS} if name in MAIN and seed == 1 else {}
    return dict.fromkeys(counts, TEXTS) | extra


def figures(workdir: Path, texts_of: dict[int, int]) -> dict[str, Any]:
    """Measures the bound on held-out texts, and samples by number of steps."""
    lm = dlm_jax.load(workdir)
    config = lm.config
    held_out = _held_out(config)
    row: dict[str, Any] = {
        "bound": report.likelihood_rows(lm, held_out, 16),
        "by_num_steps": {},
    }
    for calls, n in texts_of.items():
        began = time.monotonic()
        texts = lm.sample(n, seed=0, num_steps=calls)
        sample = {"n": n, "seconds": time.monotonic() - began}
        if config["data"]["source"] == "grammar":
            sample["accepted"] = float(np.mean([grammar.accepts(t) for t in texts]))
        sample["entropy"] = text_metrics.unigram_entropy(texts)
        sample["words"] = float(np.mean(text_metrics.lengths(texts)))
        sample["texts"] = texts[:4]
        row["by_num_steps"][str(calls)] = sample
    return row


def suite(workdir: Path, ar_model: Path) -> dict[str, Any]:
    """Runs the metrics of --mode evaluate with the run's own sampler."""
    lm = dlm_jax.load(workdir)
    config: Any = ml_collections.ConfigDict(lm.config)
    config.evaluate.ar_model = str(ar_model) if ar_model.exists() else ""
    reference, held_out = report.references(lm, config)
    samples = [lm.sample(TEXTS, seed=seed) for seed in range(SAMPLE_SEEDS)]
    rows = report.compare(samples, held_out, reference)
    return {name: row._asdict() for name, row in rows.items() if not row.note}


def _held_out(config: dict) -> list[str]:
    return sources.load_texts(ml_collections.ConfigDict(config["data"]), "valid")[:768]


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, str, dict, int]]:
    """Yields (name, variant, changes, seed) of every run."""
    for name, (variant, changes) in RUNS.items():
        if args.only and name not in args.only:
            continue
        seeds = args.seeds if name in MAIN else args.ablation_seeds
        for seed in range(1, seeds + 1):
            yield name, variant, BASE | changes, seed


def _workdir(args: argparse.Namespace, name: str, seed: int) -> Path:
    stem = f"{Path(args.config).stem}_{name}_{seed}_{args.steps}".replace(" ", "_")
    return Path("runs/study") / stem


def read_rows(path: Path) -> list[dict]:
    """Reads the rows of a JSON file, with the current names of the runs."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [r | {"name": FORMER_NAMES.get(r["name"], r["name"])} for r in rows]


def study(args: argparse.Namespace) -> None:
    """Trains and measures every run that has no row yet."""
    out = Path(args.out)
    rows = read_rows(out) if out.exists() else []
    done = {(r["config"], r["name"], r["seed"], r["budget_steps"]) for r in rows}
    budget = args.steps * step_flops(config_of(args.config, "modern", BASE))
    for name, variant, changes, seed in wanted(args):
        if (args.config, name, seed, args.steps) in done:
            continue
        flops = step_flops(config_of(args.config, variant, changes))
        steps = round(budget / flops)
        silent = {"valid_steps": 0, "sample_steps": 0, "log_steps": 100}
        options = changes | {f"train.{k}": v for k, v in silent.items()}
        options |= {"train.total_steps": steps, "seed": seed}
        if args.data:
            options["data.path"] = args.data
        workdir = _workdir(args, name, seed)
        row = {"config": args.config, "name": name, "variant": variant, "seed": seed}
        row |= {"changes": changes, "budget_steps": args.steps, "train_steps": steps}
        row["flops"] = flops * steps
        row["train_s"] = train(args.config, variant, options, workdir)
        row |= figures(workdir, calls_of(name, seed))
        if name in (*MAIN, "autoregressive"):
            row["suite"] = suite(workdir, _workdir(args, "autoregressive", 1))
        rows.append(row)
        out.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
        print(f"study: {name}, seed {seed}: {row['bound']}", flush=True)


def table(rows: list[dict]) -> str:
    """Formats a Markdown table: a line per run, means and errors over seeds."""
    key = "above the language, nats/token"
    calls = [str(c) for c in (*CALLS, MANY)]
    lines = ["| run | seeds | steps | nats/token above | " + " | ".join(calls) + " |"]
    lines += ["|---" * (4 + len(calls)) + "|"]
    for name in dict.fromkeys(r["name"] for r in rows):
        runs = [r for r in rows if r["name"] == name]
        cells = [name, str(len(runs)), str(runs[0]["train_steps"])]
        metric = key if key in runs[0]["bound"] else "nats/token"
        cells.append(_mean([r["bound"][metric][0] for r in runs]))
        for c in calls:
            shares = [
                r["by_num_steps"][c].get("accepted")
                for r in runs
                if c in r["by_num_steps"]
            ]
            cells.append(_mean(shares) if shares and None not in shares else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: list) -> str:
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0
    return f"{np.mean(values):.3f}" + (f" ± {error:.3f}" if error else "")


def plot(rows: list[dict], path: Path) -> None:
    """Plots accepted samples against steps and entropy, for faithful and modern."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_calls, by_entropy = figure.subplots(1, 2, sharey=True)
    for name, colour in (("faithful", "#c0392b"), ("modern", "#1f5fa8")):
        for row in (r for r in rows if r["name"] == name):
            points = [row["by_num_steps"][str(c)] for c in CALLS]
            share = [p["accepted"] for p in points]
            by_calls.semilogx(CALLS, share, "o-", base=2, color=colour, alpha=0.6)
            entropy = [p["entropy"] for p in points]
            by_entropy.plot(entropy, share, "o", color=colour, alpha=0.6)
        by_calls.plot([], [], "o-", color=colour, label=name)
    real = rows[0]["suite"]["unigram entropy, nats"]["held_out"][0]
    by_entropy.axvline(real, color="#a8a8a8", label="real text")
    by_calls.set(xlabel="sampling steps", ylabel="accepted by the grammar")
    by_entropy.set(xlabel="unigram entropy, nats")
    for axes in (by_calls, by_entropy):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs the study; with --plot, prints its table and draws its plot instead."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/grammar.py")
    parser.add_argument("--data", default="", help="value of config.data.path")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ablation-seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", default="benchmarks/results/study.json")
    parser.add_argument("--plot", default="", help="a JSON file of the study")
    args = parser.parse_args()
    if not args.plot:
        return study(args)
    rows = read_rows(Path(args.plot))
    kind = (args.config, args.steps)
    rows = [r for r in rows if (r["config"], r["budget_steps"]) == kind]
    print(table(rows))
    if any("accepted" in c for r in rows for c in r["by_num_steps"].values()):
        plot(rows, Path(args.plot).with_suffix(".png"))


if __name__ == "__main__":
    main()
