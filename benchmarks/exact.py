# SPDX-License-Identifier: Apache-2.0
"""Says what loses quality, the network or the sampler, by the exact denoiser.

    python benchmarks/exact.py --workdir runs/quickstart \\
        --out benchmarks/results/exact.json

Three tables, for a run on the grammar: the network's gap in nats per token by level of
noise u = log(1/SNR); the samples if the exact denoiser replaces the network above or
below a level; and what each sampler reaches with the exact denoiser, by number of steps:
the ceiling of any network. The samples take the run's table, and the logistic schedule
whose times follow the language's information.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dlm_jax
from dlm_jax.data import grammar
from dlm_jax.diffusion import guidance, model, rounding, samplers, schedule
from dlm_jax.diffusion.model import Denoise
from dlm_jax.diffusion.samplers import Step
from dlm_jax.evaluation import exact, report, text_metrics
from dlm_jax.inference import constraints
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.types import PAD

INFORMATION = schedule.logistic(3.4, 0.7)  # the language's rate, within a few percent
LEVEL = 3.0  # of the swap

# sampler -> (solver, its options, clamped)
SAMPLERS: dict[str, tuple[Callable[..., Step], dict[str, float], bool]] = {
    "marginal, clamp": (samplers.marginal, {}, True),
    "marginal": (samplers.marginal, {}, False),
    "ddim, eta 1": (samplers.ddim, {"eta": 1.0}, False),
    "ddim, eta 0": (samplers.ddim, {"eta": 0.0}, False),
    "dpmpp_2m": (samplers.dpmpp_2m, {}, False),
}


def make_step(name: str, denoise: Any, lm: DiffusionLM) -> Step:
    """Returns the step of a sampler; "switch": DDIM above 3.5, marginal below."""
    if name == "switch":
        low, high = (
            make_step(n, denoise, lm) for n in ("marginal, clamp", "ddim, eta 1")
        )
        return samplers.by_noise(low, high, INFORMATION, level=3.5)
    solver, options, clamped = SAMPLERS[name]
    if clamped:
        denoise = guidance.clamp(denoise, lm.ema.table)
    return solver(denoise, INFORMATION, **options)


def frames(lm: DiffusionLM, n: int) -> tuple[Any, Any]:
    """Returns ids and mask [n l] of what n drawn lengths make known, if they are drawn."""
    if not lm.cfg.known_length:
        return np.zeros((n, lm.length), int), np.zeros((n, lm.length), bool)
    counts = range(1, lm.length - 1)
    words = constraints.draw_word_counts(lm.lengths, n, 0, counts)
    return guidance.length_template(np.array(words), lm.length)


def given(denoise: Denoise, lm: DiffusionLM, n: int) -> Denoise:
    """Returns the denoiser of n texts whose lengths are given, if the model draws them."""
    if not lm.cfg.known_length:
        return denoise
    ids, known = frames(lm, n)
    return guidance.condition_on_tokens(
        denoise, lm.ema.table, ids, known, outside=(ids == PAD)
    )


def measure(lm: DiffusionLM, step: Step, num_steps: int, n: int) -> dict[str, float]:
    """Samples n texts and returns their measures."""
    key, k_x = jax.random.split(jax.random.key(0))
    x_T = jax.random.normal(k_x, (n, lm.length, lm.cfg.dim))
    times = samplers.schedule_timesteps(INFORMATION, num_steps)
    state, _ = jax.jit(partial(samplers.sample, step=step, times=times))(key, x_T=x_T)
    ids, known = frames(lm, n)
    ids = np.where(known, ids, rounding.nearest(lm.ema.table, state.x0_hat))
    texts = [lm.tokenizer.decode(row) for row in ids]
    accepted = float(np.mean([grammar.accepts(t) for t in texts]))
    return {
        "accepted": accepted,
        "error": float(np.sqrt(accepted * (1 - accepted) / n)),
        "words": float(np.mean(text_metrics.lengths(texts))),
        "entropy": text_metrics.unigram_entropy(texts),
    }


def gaps(lm: DiffusionLM, n: int) -> list[dict[str, Any]]:
    """Prints and returns information and gap by level, and their sums."""
    ids = lm.encode(grammar.sample(1_000_003, n))
    levels = exact.gap_by_level(lm, ids, report.tokens(ids))
    print("u from, to: information of the language, gap of the network, nats per token")
    for row in levels:
        both = (f"{x.mean:.3f} ± {x.stderr:.3f}" for x in (row.information, row.gap))
        print(f"{row.low:5.1f} {row.high:4.1f}:", *both, flush=True)
    information = sum(row.information.mean for row in levels)
    print(f"sum: {information:.3f} {sum(row.gap.mean for row in levels):.3f}")
    return [row._asdict() for row in levels]


def main() -> None:
    """Prints the three tables and writes them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", default="runs/quickstart")
    parser.add_argument("--num_steps", type=int, nargs="*", default=[8, 16])
    parser.add_argument("--n", type=int, default=96)
    parser.add_argument("--out", default="benchmarks/results/exact.json")
    args = parser.parse_args()
    lm = dlm_jax.load(args.workdir)
    record: dict[str, Any] = {"gap": gaps(lm, 128), "samples": []}
    network = model.bind(lm.ema, lm.cfg, schedule=INFORMATION)
    best = exact.exact_denoiser(lm.ema.table, INFORMATION, lm.tokenizer)
    network, best = (given(denoise, lm, args.n) for denoise in (network, best))
    held_out = grammar.sample(1_000_003, 1000)
    words = np.mean(text_metrics.lengths(held_out))
    print(f"held-out text: {words:.1f} words, ", end="")
    print(f"entropy {text_metrics.unigram_entropy(held_out):.2f}")

    def show(denoiser: str, sampler: str, step: Step, num_steps: int) -> None:
        row = measure(lm, step, num_steps, args.n)
        named = {"denoiser": denoiser, "sampler": sampler, "num_steps": num_steps}
        record["samples"].append(named | row)
        print(
            f"{denoiser:24s} {sampler:16s} {num_steps:3d} steps: accepted "
            f"{row['accepted']:.3f} ± {row['error']:.3f}, {row['words']:.1f} words, "
            f"entropy {row['entropy']:.2f}",
            flush=True,
        )

    mine, ideal = (make_step("marginal, clamp", d, lm) for d in (network, best))
    swap = partial(samplers.by_noise, schedule=INFORMATION, level=LEVEL)
    show("network", "marginal, clamp", mine, 16)
    show(f"exact below u = {LEVEL}", "marginal, clamp", swap(ideal, mine), 16)
    show(f"exact above u = {LEVEL}", "marginal, clamp", swap(mine, ideal), 16)
    for name in (*SAMPLERS, "switch"):
        for num_steps in args.num_steps:
            show("exact", name, make_step(name, best, lm), num_steps)
    Path(args.out).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
