# SPDX-License-Identifier: Apache-2.0
"""Measures how the cost of a training step and of sampling grows; fits exponents.

    python benchmarks/growth.py --out benchmarks/results/growth.json

Varies the batch, the length, the vocabulary, the sampling steps and the devices. On a
CPU the devices are virtual and share its cores, so they show the cost of splitting. The
network has the published architecture at the size of `configs/e2e_small.py:faithful`.
"""

from pathlib import Path
from typing import Any

import numpy as np
from lib import alternate
from lib.alternate import Case, Contender
from matplotlib.figure import Figure

BASE = Case("configs/e2e_small.py:faithful", batch=16, num_steps=5)
AXES: dict[str, tuple[int, ...]] = {
    "batch": (1, 4, 16, 64, 256, 512),
    "length": (64, 128, 256, 512),
    "vocab": (821, 11_043, 30_522),
    "num_steps": (20, 200, 2000),
    "devices": (1, 2, 8),
}
JOBS = {"training step": "train", "5 reverse steps, clamp": "chain"}


def measured(axis: str, size: int, job: str, args: Any) -> dict[str, float]:
    """Measures the seconds of a case in a process of its own."""
    case = BASE._replace(job=job, change=(f"model.dtype={args.dtype}",))
    env = {}
    if axis == "devices":
        case, env = case._replace(batch=64), {"JAX_NUM_CPU_DEVICES": str(size)}
    else:
        case = case._replace(**{axis: size})
    rows = alternate.alternate(
        {"ours": lambda: Contender("ours.py", case, env=env)},
        args.repeats,
        args.seconds,
    )
    return rows["ours"]


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """Returns the slope of log time over log size between the two largest sizes."""
    (a, b), (s, t) = sizes[-2:], seconds[-2:]
    return float(np.log(t / s) / np.log(b / a))


def along(axis: str, args: Any) -> dict[str, Any]:
    """Measures both jobs along an axis; num_steps applies to sampling only."""
    jobs = {n: j for n, j in JOBS.items() if (axis, j) != ("num_steps", "train")}
    results: dict[str, Any] = {"sizes": AXES[axis]}
    for name, job in jobs.items():
        rows = [measured(axis, size, job, args) for size in AXES[axis]]
        seconds = [row["median"] for row in rows]
        results[name] = {
            "seconds": seconds,
            "low": [row["low"] for row in rows],
            "high": [row["high"] for row in rows],
            "peak_mb": [row["peak_mb"] for row in rows],
            "exponent": exponent(AXES[axis], seconds),
        }
        shown = ", ".join(
            f"{n}: {1e3 * s:.0f} ms" for n, s in zip(AXES[axis], seconds, strict=True)
        )
        print(
            f"{axis}, {name}: {shown}; exponent {results[name]['exponent']:.2f}",
            flush=True,
        )
    return results


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws a panel per axis, with logarithmic scales."""
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for panel, (axis, rows) in zip(panels, results.items(), strict=True):
        for (name, _), colour in zip(JOBS.items(), ("#123c6e", "#c0392b"), strict=True):
            if name not in rows:
                continue
            row = rows[name]
            label = f"{name.split(',')[0]}: {row['exponent']:.2f}"
            panel.plot(rows["sizes"], row["seconds"], "o-", color=colour, label=label)
            bounds = (row["low"], row["high"])
            panel.fill_between(rows["sizes"], *bounds, color=colour, alpha=0.2)
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_xticks(rows["sizes"], list(map(str, rows["sizes"])), minor=False)
        panel.minorticks_off()
        panel.tick_params(axis="x", labelrotation=45)
        panel.legend(frameon=False, fontsize=7)
    panels[0].set(ylabel="seconds")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measures all axes, one case at a time; writes JSON and the plot."""
    parser = alternate.options(__doc__, "benchmarks/results/growth.json")
    parser.add_argument("--axes", nargs="*", default=list(AXES))
    parser.add_argument("--dtype", default="mixed")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds per turn")
    parser.set_defaults(repeats=5)
    args = parser.parse_args()
    results = {axis: along(axis, args) for axis in args.axes}
    alternate.write(args.out, {"config": BASE.config, "found": results})
    plot(results, Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    main()
