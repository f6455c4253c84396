# SPDX-License-Identifier: Apache-2.0
"""How near the machine's limit a step comes, and where the rest of its time goes.

    python benchmarks/limit.py --out docs/limit.json

The limit is measured: the rate of the products of the model's own shapes, in JAX and in
PyTorch, and the rate at which memory is read and written. A step's share of it is the
operations of its products over its time. The rest is read off a profile of the step.
"""

import collections
import glob
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import alternate
import jax
import jax.numpy as jnp
import ours
from alternate import Case

from dlm_jax.denoiser import times

CASES = {
    "e2e": Case("configs/e2e.py", batch=16),
    "e2e_small:faithful": Case("configs/e2e_small.py:faithful", batch=32),
    "e2e_small": Case("configs/e2e_small.py", batch=32),
    "grammar": Case("configs/grammar.py", batch=64),
}


def shapes(config: Any) -> dict[str, tuple[int, int, int]]:
    """(m, k, n) of the products of a layer, forward."""
    m, h = config.model, config.model.width
    rows = config.train.batch * config.data.length
    sizes = {"qkv": (h, 3 * h), "out": (h, h), "up": (h, m.ff), "down": (m.ff, h)}
    return {name: (rows, *size) for name, size in sizes.items()}


def operations(config: Any, vocab: int) -> float:
    """Floating-point operations of the products of one forward pass."""
    m, l = config.model, config.data.length
    rows = config.train.batch * l
    layers = sum(2.0 * a * b * c for a, b, c in shapes(config).values())
    attention = 4.0 * rows * l * m.width
    modulation = 12.0 * config.train.batch * m.width**2 * (m.trunk == "adaln")
    inputs = m.dim * (1 + m.self_cond + m.output_prior)
    outputs = vocab if m.predicts == "logits" else m.dim
    ends = 2.0 * rows * m.width * (inputs + outputs)
    ends += 4.0 * rows * m.width**2 * (m.trunk == "post_ln")
    prior = 4.0 * rows * m.dim * vocab * (m.output_prior + 0.5)  # or rounding's
    return m.layers * (layers + attention + modulation) + ends + prior


def best(run: Callable[[], Any], repeats: int = 10) -> float:
    """Seconds of the fastest of some calls."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - began)
    return min(found)


def rate(m: int, k: int, n: int, dtype: str) -> float:
    """GFLOP/s of a product forward, and with its two of the backward pass."""
    key = jax.random.key(0)
    x, w, g = (
        jax.random.normal(key, s).astype(dtype) for s in ((m, k), (k, n), (m, n))
    )

    def three(x: Any, w: Any, g: Any) -> Any:
        y, back = jax.vjp(lambda x, w: times(x, w, dtype), x, w)
        return y, back(g.astype(jnp.float32))

    return 6e-9 * m * k * n / best(partial(jax.jit(three), x, w, g))


def torch_rate(m: int, k: int, n: int, dtype: str) -> float | None:
    """The same by PyTorch, where it is installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    kind = getattr(torch, dtype)
    x, w, g = (torch.randn(s).to(kind) for s in ((m, k), (n, k), (m, n)))
    return 6e-9 * m * k * n / best(lambda: (x @ w.T, g @ w, g.T @ x))


def bandwidth() -> float:
    """GB/s of memory read and written by y = 2 x, on 256 MB."""
    x = jnp.ones(2**26)
    return 2 * x.nbytes / best(partial(jax.jit(lambda x: 2 * x), x)) / 1e9


PARTS = {  # by what stands in an instruction's name, first match
    "optimiser, average": r"^(?!.*(jvp|Denoiser)).*(add|mul|pow|sqrt|div|vmap|while)",
    "rounding, loss": r"blv|log_softmax|jvp\(\)|cross_entropy",
    "attention": r"attention/(?!qkv|out)",
    "products": r"dot_general",
    "normalisation": r"norm",
    "dropout": r"Dropout|kept|drop",
}


def profiled(run: Callable[[], Any], text: str, repeats: int = 3) -> dict[str, float]:
    """Shares of the time of a step's kernels by part, from jax.profiler."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                run()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
    names = dict(re.findall(r"%([\w.\-]+) = .*?op_name=\"([^\"]*)\"", text))
    spent: collections.Counter = collections.Counter()
    for plane in data.planes:
        for events in plane.lines:
            for event in events.events:
                op = dict(event.stats).get("hlo_op")
                outer = op and re.match(r"(jit_|while|call|conditional)", str(op))
                if op and not outer:  # whose insides are events of their own
                    spent[_part(names.get(str(op), ""))] += event.duration_ns
    total = sum(spent.values())
    return {part: ns / total for part, ns in spent.most_common()}


def _part(name: str) -> str:
    hits = (part for part, pattern in PARTS.items() if re.search(pattern, name))
    return next(hits, "other elementwise")


def row(name: str, dtype: str) -> dict[str, Any]:
    """A case: rates, shares of them, profile."""
    case = CASES[name]._replace(change=(f"model.dtype={dtype}",))
    config = alternate.settings(case)
    low = "float32" if dtype == "float32" else "bfloat16"
    rates = {n: rate(*s, low) for n, s in shapes(config).items()}
    peers = {n: torch_rate(*s, low) for n, s in shapes(config).items()}
    sizes = {n: a * b * c for n, (a, b, c) in shapes(config).items()}
    peak = sum(sizes.values()) / sum(s / rates[n] for n, s in sizes.items())
    forward = operations(config, case.vocab)
    passes = 4 if config.model.self_cond else 3  # forward, backward, a first estimate
    step = ours.Training(case)
    seconds = best(step)
    chain = ours.chain(case._replace(job="chain", steps=10))
    reverse = best(chain, 3) / 10
    return {
        "case": name,
        "dtype": dtype,
        "rates, GFLOP/s": rates,
        "PyTorch's": peers,
        "peak, GFLOP/s": peak,
        "training step, s": seconds,
        "training share": passes * forward / seconds / peak / 1e9,
        "reverse step, s": reverse,
        "reverse share": forward / reverse / peak / 1e9,
        "profile of the training step": profiled(step, step.text()),
    }


def main() -> None:
    """All cases, one after the other, with nothing else running."""
    parser = alternate.options(__doc__, "docs/limit.json")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--dtype", default="mixed")
    args = parser.parse_args()
    found = {"bandwidth, GB/s": bandwidth(), "rows": []}
    print(f"memory: {found['bandwidth, GB/s']:.1f} GB/s")
    for name in args.cases:
        found["rows"].append(row(name, args.dtype))
        for key, value in found["rows"][-1].items():
            print(f"  {key}: {_shown(value)}", flush=True)
    alternate.write(args.out, found)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
