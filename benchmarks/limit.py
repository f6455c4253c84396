# SPDX-License-Identifier: Apache-2.0
"""Measures how close a step comes to the machine's limit, and profiles the rest.

    python benchmarks/limit.py --out benchmarks/results/limit.json
    python benchmarks/limit.py --cases e2e --batch 512 --dtype bfloat16   # on a GPU

The limit is measured: the rate of matrix products of the model's shapes, by JAX or by
PyTorch, whichever is faster. A step's share of it is the rate of its matrix products
over its whole time, divided by the limit. A profile of the step shows where the rest of
the time goes. The bandwidth of memory is measured as well.
"""

import collections
import glob
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from lib import alternate, ours
from lib.alternate import Case

from dlm_jax.main import large_pages
from dlm_jax.nn.ops import matmul

CASES = {
    "e2e": Case("configs/e2e.py", batch=16),
    "e2e_small:faithful": Case("configs/e2e_small.py:faithful", batch=32),
    "e2e_small": Case("configs/e2e_small.py", batch=32),
    "grammar": Case("configs/grammar.py", batch=64),
}


def shapes(config: Any) -> dict[str, tuple[int, int, int]]:
    """Returns (m, k, n) of the matrix products of a layer's forward pass."""
    m, h = config.model, config.model.hidden_dim
    rows = config.train.batch * config.data.length
    sizes = {
        "qkv": (h, 3 * h),
        "out": (h, h),
        "up": (h, m.mlp_dim),
        "down": (m.mlp_dim, h),
    }
    return {name: (rows, *size) for name, size in sizes.items()}


def operations(config: Any, vocab: int) -> float:
    """Counts the floating-point operations of the products of one forward pass."""
    m, l = config.model, config.data.length
    rows = config.train.batch * l
    layers = sum(2.0 * a * b * c for a, b, c in shapes(config).values())
    attention = 4.0 * rows * l * m.hidden_dim
    modulation = 12.0 * config.train.batch * m.hidden_dim**2 * (m.trunk == "adaln")
    inputs = m.dim * (1 + m.self_cond + m.token_posterior_input)
    outputs = vocab if m.predicts == "logits" else m.dim
    ends = 2.0 * rows * m.hidden_dim * (inputs + outputs)
    ends += 4.0 * rows * m.hidden_dim**2 * (m.trunk == "post_ln")
    # the token posterior's two products, and one more: the estimate's or the rounding's
    table = 4.0 * rows * m.dim * vocab * (m.token_posterior_input + 0.5)
    return m.layers * (layers + attention + modulation) + ends + table


def best(run: Callable[[], Any], repeats: int = 10) -> float:
    """Returns the seconds of the fastest call."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return min(times)


Rates = tuple[float, float]  # GFLOP/s: forward, and forward with backward


def rates(m: int, k: int, n: int, dtype: str) -> Rates:
    """Measures a product alone, and with the two products of its backward pass."""
    key = jax.random.key(0)
    x, w, g = (
        jax.random.normal(key, s).astype(dtype) for s in ((m, k), (k, n), (m, n))
    )

    def three(x: Any, w: Any, g: Any) -> Any:
        y, back = jax.vjp(lambda x, w: matmul(x, w, dtype, "float32"), x, w)
        return y, back(g.astype(jnp.float32))

    one = best(partial(jax.jit(lambda x, w: matmul(x, w, dtype, "float32")), x, w))
    return _rates(m * k * n, one, best(partial(jax.jit(three), x, w, g)))


def torch_rates(m: int, k: int, n: int, dtype: str) -> Rates:
    """Measures the same with PyTorch; returns zeros if it is not installed."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return 0.0, 0.0
    gpu = torch.cuda.is_available()
    options = {"dtype": getattr(torch, dtype), "device": "cuda" if gpu else "cpu"}
    x, w, g = (torch.randn(s, **options) for s in ((m, k), (n, k), (m, n)))

    def done(*results: Any) -> None:
        if gpu:
            torch.cuda.synchronize()

    one = best(lambda: done(x @ w.T))
    return _rates(m * k * n, one, best(lambda: done(x @ w.T, g @ w, g.T @ x)))


def _rates(size: int, one: float, three: float) -> Rates:
    return 2e-9 * size / one, 6e-9 * size / three


def peak(config: Any, dtype: str) -> dict[str, Any]:
    """Returns a layer's GFLOP/s with each product at the faster library's rate."""
    low = "float32" if dtype == "float32" else "bfloat16"
    sizes = shapes(config)
    both = {name: (rates(*s, low), torch_rates(*s, low)) for name, s in sizes.items()}
    work = {name: a * b * c for name, (a, b, c) in sizes.items()}

    def together(i: int) -> float:
        cost = sum(work[n] / max(o[i], t[i]) for n, (o, t) in both.items())
        return sum(work.values()) / cost

    return {
        "ours, GFLOP/s forward and both": {n: o for n, (o, _) in both.items()},
        "PyTorch's": {n: t for n, (_, t) in both.items()},
        "peak forward": together(0),
        "peak": together(1),
    }


def bandwidth() -> float:
    """Measures the GB/s read and written by y = 2 x on 256 MB."""
    x = jnp.ones(2**26)
    return 2 * x.nbytes / best(partial(jax.jit(lambda x: 2 * x), x)) / 1e9


PARTS = {  # part: a pattern of instruction names; the first match counts
    "optimiser, average": r"^(?!.*(jvp|Denoiser)).*(add|mul|pow|sqrt|div|vmap|while)",
    "random numbers": r"threefry|random_bits|_normal|_uniform",
    "rounding, loss": r"blv|log_softmax|jvp\(\)|cross_entropy",
    "attention": r"attention/(?!qkv|out)",
    "products": r"dot_general",
    "normalisation": r"norm",
    "dropout": r"Dropout|kept|drop",
}


def profiled(run: Callable[[], Any], text: str, repeats: int = 3) -> dict[str, float]:
    """Returns the shares of a step's kernel time by part, from jax.profiler."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                run()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
    names = dict(re.findall(r"%([\w.\-]+) = .*?op_name=\"([^\"]*)\"", text))
    spent: collections.Counter = collections.Counter()
    devices = [plane for plane in data.planes if "/device:" in (plane.name or "")]
    for plane in devices or data.planes:  # skips the host's launches of GPU kernels
        for events in plane.lines:
            for event in events.events:
                op = dict(event.stats).get("hlo_op")
                outer = op and re.match(r"(jit_|while|call|conditional)", str(op))
                if op and not outer:  # the contents of a loop or call are events too
                    spent[_part(names.get(str(op), ""))] += event.duration_ns
    total = sum(spent.values())
    return {part: ns / total for part, ns in spent.most_common()}


def _part(name: str) -> str:
    hits = (part for part, pattern in PARTS.items() if re.search(pattern, name))
    return next(hits, "other elementwise")


def row(name: str, dtype: str, batch: int) -> dict[str, Any]:
    """Measures a case: the limits, times, shares of the limits and a profile."""
    case = CASES[name]._replace(change=(f"model.dtype={dtype}",))
    case = case._replace(batch=batch or case.batch)
    config = alternate.settings(case)
    limits = peak(config, dtype)
    forward = operations(config, case.vocab)
    passes = (
        4 if config.model.self_cond else 3
    )  # forward, backward (2), self-conditioning
    step = ours.Training(config, case.vocab)
    seconds = best(step)
    chain = ours.chain(case._replace(job="chain", num_steps=10))
    reverse = best(chain, 3) / 10
    return {
        "case": name,
        "dtype": dtype,
        "batch": case.batch,
        **limits,
        "training step, s": seconds,
        "training GFLOP": passes * forward / 1e9,
        "training bytes, GB": step.compiled().cost_analysis()["bytes accessed"] / 1e9,
        "training share": passes * forward / seconds / limits["peak"] / 1e9,
        "reverse step, s": reverse,
        "reverse GFLOP": forward / 1e9,
        "reverse share": forward / reverse / limits["peak forward"] / 1e9,
        "profile of the training step": profiled(step, step.compiled().as_text()),
    }


def main() -> None:
    """Measures the cases one after the other; nothing else should run meanwhile."""
    parser = alternate.options(__doc__, "benchmarks/results/limit.json")
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--dtype", default="mixed")
    parser.add_argument("--batch", type=int, default=0, help="0: that of the case")
    args = parser.parse_args()
    record: dict[str, Any] = {"device": jax.devices()[0].device_kind, "rows": []}
    record |= {"bandwidth, GB/s": bandwidth()}
    print(f"memory: {record['bandwidth, GB/s']:.1f} GB/s")
    for name in args.cases:
        record["rows"].append(row(name, args.dtype, args.batch))
        for key, value in record["rows"][-1].items():
            print(f"  {key}: {_shown(value)}", flush=True)
    alternate.write(args.out, record)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " and ".join(map(_shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    large_pages()
    main()
