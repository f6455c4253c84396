# SPDX-License-Identifier: Apache-2.0
"""Prints the tables of docs/control.md; with --baselines, also draws its plot.

It reads the rows that `--mode control` has written:

    python benchmarks/control_table.py --rows runs/quickstart/control \\
        --baselines benchmarks/results/control_baselines.json \\
        --out benchmarks/results/control.json

Rows that are only in --out are kept.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dlm_jax.evaluation import control_tasks

ORDER = ["unguided", *control_tasks.CONTROL_TASKS]
# the paper's success on E2E, by the closest score here (arXiv:2205.14217, table 2)
PAPER = {
    "value": 0.812,
    "tags": 0.900,
    "tree F1": 0.860,
    "span": 0.938,
    "exact length": 0.999,
}
COLOURS = ("#123c6e", "#1f5fa8", "#7fb0dd", "#c0392b", "#e59866", "#9a7d0a")


def key(row: dict) -> str:
    """Returns what identifies a row: a row with the same key replaces it."""
    names = ("task", "num_steps", "model", "control", "classifiers in use", "sample")
    names += ("target files",)
    return json.dumps([row.get(name) for name in names], sort_keys=True)


def gather(folder: Path, out: Path) -> list[dict]:
    """Merges the rows of the folder into those of out, in the order of the tasks."""
    old = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    new = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    ]
    for row in [*old, *new]:
        row.pop("config", None)
    rows = {key(row): row for row in [*old, *new]}
    return sorted(
        rows.values(), key=lambda r: (ORDER.index(r["task"]), -r["num_steps"])
    )


def table(rows: list[dict], baselines: list[dict]) -> str:
    """Formats a Markdown table: guided sampling by steps, then the baselines."""
    head = "| task | method | targets x samples x seeds | success | accepted | nats/token | s per 50 |"
    lines = [head, "|---" * 7 + "|"]
    for row in rows:
        sizes = (row["targets"], row["control"]["samples"], row["control"]["seeds"])
        lines.append(_line(row, method(row), sizes))
    for row in baselines:
        sizes = (row["targets"], row["samples"], row["seeds"])
        lines.append(_line(row, row["method"], sizes))
    return "\n".join(lines)


def method(row: dict) -> str:
    """Describes the method of a row of `--mode control`."""
    preset = row["control"]["preset"]
    words = [f"{row['num_steps']} steps", "" if preset == "tuned" else f"{preset} rule"]
    words.append("published targets" if row.get("target files") else "")
    return ", ".join(filter(None, words))


def _line(row: dict, name: str, sizes: tuple[int, int, int]) -> str:
    shares = [f"{n} {100 * m:.1f} ± {100 * e:.1f}" for n, (m, e) in _scores(row)]
    nats = row["nats/token"]
    cells = [
        row["task"],
        name,
        " x ".join(map(str, sizes)),
        ", ".join(shares),
        "-" if row["accepted"] is None else f"{100 * row['accepted']:.1f}",
        "-" if nats is None else f"{nats:.3f}",
        f"{row['seconds per 50']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _scores(row: dict) -> list[tuple[str, tuple[float, float]]]:
    return sorted(row["success"].items(), key=lambda s: s[0] not in PAPER)


def plot(rows: list[dict], baselines: list[dict], path: Path) -> None:
    """Draws bars by task and method: success, and the share of accepted texts."""
    single = [name for name in control_tasks.CONTROL_TASKS if "+" not in name]
    methods: dict[str, dict] = {}
    for row in rows:
        if row["control"]["preset"] == "tuned":
            methods.setdefault(method(row), {})[row["task"]] = row
    for row in baselines:
        methods.setdefault(row["method"], {})[row["task"]] = row
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    success, accepted = figure.subplots(2, 1, sharex=True)
    success.set(ylabel="success", ylim=(0, 1))
    accepted.set(ylabel="in the language", ylim=(0, 1))
    _bars(success, methods, single, lambda row: _scores(row)[0][1][0])
    _bars(accepted, methods, single, lambda row: row["accepted"])
    for place, name in enumerate(single):
        if name == "infilling":
            continue
        goal = next(PAPER[score] for score in _of(rows, name) if score in PAPER)
        success.plot([place - 0.45, place + 0.45], [goal, goal], ":", color="#111111")
    for row in (r for r in rows if r["task"] == "unguided"):
        accepted.axhline(row["accepted"], color="#a8a8a8", lw=0.8)
        place, name = (len(single) - 0.5, row["accepted"]), f"free, {row['num_steps']}"
        accepted.text(*place, name, size=7, ha="right", va="bottom")
    accepted.set_xlim(-0.5, len(single) - 0.5)
    success.plot([], [], ":", color="#111111", label="the paper, on E2E")
    named = success.get_legend_handles_labels()
    figure.legend(*named, frameon=False, ncols=7, loc="outside upper center")
    accepted.set_xticks(range(len(single)), single)
    figure.savefig(path, dpi=130)


def _of(rows: list[dict], name: str) -> dict[str, Any]:
    return next(row["success"] for row in rows if row["task"] == name)


def _bars(axes: Any, methods: dict, single: list[str], value: Callable) -> None:
    width = 0.9 / len(methods)
    for i, (name, by_task) in enumerate(methods.items()):
        bars = [(p, by_task[n]) for p, n in enumerate(single) if n in by_task]
        places = [p + (i - (len(methods) - 1) / 2) * width for p, _ in bars]
        heights = [value(row) for _, row in bars]
        colour = COLOURS[i % len(COLOURS)]
        axes.bar(places, heights, width, color=colour, label=name)


def main() -> None:
    """Merges the rows, prints the table and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="runs/quickstart/control")
    parser.add_argument("--baselines", default="")
    parser.add_argument("--out", default="benchmarks/results/control.json")
    args = parser.parse_args()
    out, peers = Path(args.out), Path(args.baselines)
    rows = gather(Path(args.rows), out)
    out.write_text(
        json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    baselines = json.loads(peers.read_text(encoding="utf-8")) if args.baselines else []
    print(table(rows, baselines))
    if baselines:
        plot(rows, baselines, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
