# SPDX-License-Identifier: Apache-2.0
r"""Compares training and sampling speed with PyTorch, interleaved on one machine.

    pip install -e '.[peer]'
    python benchmarks/speed.py
    python benchmarks/speed.py --cases e2e --batch 512 --dtype bfloat16   # on a GPU
    python benchmarks/speed.py --cases e2e --batch 50 --dtype bfloat16 \
        --jobs "200 guided steps"

Each row is a case of `CASES` and a job of `JOBS`, timed in turn: A B C, A B C, ... A
ratio is PyTorch's time over that of dlm_jax within a round: above 1, dlm_jax is faster.
The peers are the architecture as people run it (eager, float32) and the best effort in
PyTorch (`lib/torch_peer.py`). --dtype is the precision of dlm_jax.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

from lib import alternate, torch_peer
from lib.alternate import Case, Contender

E2E, SMALL, GRAMMAR = "configs/e2e.py", "configs/e2e_small.py", "configs/grammar.py"
WIDE = (
    "model.hidden_dim=256",
    "model.mlp_dim=1024",
)  # 4 layers x 256: between the other sizes
CASES = {
    "e2e": Case(E2E, batch=16),
    "e2e_small:faithful": Case(f"{SMALL}:faithful", batch=32),
    "e2e_small:faithful, 4 x 256": Case(f"{SMALL}:faithful", batch=64, change=WIDE),
    "e2e_small": Case(SMALL, batch=32),
    "grammar": Case(GRAMMAR, batch=64),
}
# {title: (job, steps, clamp)}
JOBS = {
    "training step": ("train", 20, True),
    "20 reverse steps": ("chain", 20, False),
    "20 reverse steps, clamp": ("chain", 20, True),
    "20 guided steps": ("guided", 20, True),
    "200-step chain": ("chain", 200, True),
    "200 guided steps": ("guided", 200, True),
    "2000-step chain": ("chain", 2000, True),
}
USUAL = list(JOBS)[:4]


def row(name: str, job: str, args: Any) -> dict[str, Any]:
    """Measures the contenders of one case and job in turn."""
    kind, steps, clamp = JOBS[job]
    case = CASES[name]._replace(job=kind, num_steps=steps, clamp=clamp)
    if kind != "train":
        case = case._replace(batch=16 if name == "e2e" else 64)
    case = case._replace(batch=args.batch or case.batch)
    mine = case._replace(change=(*case.change, f"model.dtype={args.dtype}"))
    contenders: dict[str, Any] = {"ours": partial(Contender, "ours.py", mine)}
    for variant in args.variants:
        contenders[variant] = partial(Contender, "torch_peer.py", case, variant)
    rows = alternate.alternate(contenders, args.repeats, args.seconds)
    ratios = {v: alternate.ratio(rows, v, "ours") for v in args.variants}
    about = {"case": name, "job": job, "batch": case.batch, "dtype": args.dtype}
    where = {**alternate.machine(), "device": torch_peer.device()}
    return {**about, "ratios": ratios, "rows": rows, **where}


def line(result: dict[str, Any]) -> str:
    """Formats a row of the table."""
    ratios, rows = result["ratios"], result["rows"]
    best = min(ratios, key=lambda v: ratios[v]["median"])
    cells = [result["case"], result["job"], str(result["batch"])]
    for name in ("eager", best):
        cells.append(_spread(ratios[name], 1, 2) if name in ratios else "-")
    cells.append(best)
    cells.append(_spread(rows["ours"], 1e3, 1 if rows["ours"]["median"] < 1 else 0))
    peaks = [rows[name]["peak_mb"] for name in ("ours", best)]
    cells.append(f"{peaks[0]:.0f} / {peaks[1]:.0f}")
    return "| " + " | ".join(cells) + " |"


def _spread(values: dict[str, float], scale: float, digits: int) -> str:
    low, mid, high = (scale * values[n] for n in ("low", "median", "high"))
    return f"{mid:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


HEAD = (
    "| case | job | batch | eager / dlm_jax | best / dlm_jax | best is | dlm_jax, ms "
    "| MB: dlm_jax / best |"
)


def keep(path: Path, new: dict[str, Any]) -> None:
    """Writes the row to the file; it replaces one of the same case and device."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    same = ("case", "job", "batch", "dtype", "device")
    kept = [row for row in kept if any(row[name] != new[name] for name in same)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*kept, new], indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measures the cases; prints and writes each row as soon as it is complete."""
    parser = alternate.options(__doc__, "benchmarks/results/speed.json")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--jobs", nargs="*", default=USUAL)
    parser.add_argument("--variants", nargs="*", default=list(torch_peer.VARIANTS))
    parser.add_argument("--batch", type=int, default=0, help="0: that of the case")
    parser.add_argument("--dtype", default="mixed")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds per turn")
    args = parser.parse_args()
    print(HEAD, "|---" * 8 + "|", sep="\n")
    for name in args.cases:
        for job in args.jobs:
            new = row(name, job, args)
            print(line(new), flush=True)
            keep(Path(args.out), new)


if __name__ == "__main__":
    main()
