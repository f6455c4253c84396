# SPDX-License-Identifier: Apache-2.0
"""Measures the machine's limits: matrix products, copies, and dispatch of programs."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from lib import alternate

from stages import Job


def run(job: Job) -> None:
    """Reports the device, the versions and the measured limits."""
    device = jax.local_devices()[0]
    record: dict[str, Any] = {
        **alternate.machine(),
        "device": device.device_kind,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
    }
    job.report(record)
    size = 256 if job.rehearse else 8192
    record["product"] = [size] * 3
    for name, dtype, precision in (
        ("bfloat16", "bfloat16", "default"),
        ("float32", "float32", "highest"),
        ("float32 at JAX's default precision", "float32", "default"),
    ):
        record[f"{name}, TFLOP/s"] = products(size, dtype, precision)
        job.report(record)
    record["copy, GB/s"] = copies(2**20 if job.rehearse else 2**28)
    record["dispatch, us"], record["dispatch and wait, us"] = dispatch()
    job.report(record)


def products(size: int, dtype: str, precision: str) -> float:
    """Measures the TFLOP/s of a product of two random square matrices."""
    x, w = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in (0, 1))
    product = jax.jit(partial(jnp.matmul, precision=precision))
    return 2e-12 * size**3 / queued(partial(product, x, w))


def copies(elements: int) -> float:
    """Measures the GB/s read and written by y = x + 1 over float32 numbers."""
    x = jnp.ones(elements)
    return 2e-9 * x.nbytes / queued(partial(jax.jit(lambda x: x + 1), x))


def queued(run: Callable[[], Any], calls: int = 10, repeats: int = 5) -> float:
    """Returns the median seconds per call when several calls are queued at once."""
    jax.block_until_ready(run())

    def once() -> float:
        began, last = time.perf_counter(), None
        for _ in range(calls):
            last = run()  # frees the previous result
        jax.block_until_ready(last)
        return (time.perf_counter() - began) / calls

    return statistics.median(once() for _ in range(repeats))


def dispatch(calls: int = 200) -> tuple[float, float]:
    """Measures the microseconds of a nearly empty call: queued, and waited for."""
    one = jax.jit(lambda x: x + 1)
    tiny = partial(one, jnp.ones(8))
    jax.block_until_ready(tiny())
    waited = []
    for _ in range(calls):
        began = time.perf_counter()
        jax.block_until_ready(tiny())
        waited.append(time.perf_counter() - began)
    return 1e6 * queued(tiny, calls), 1e6 * statistics.median(waited)


def table(record: dict[str, Any]) -> list[str]:
    """Returns the lines that describe the record."""
    names = ", ".join(f"{n} {v}" for n, v in record["versions"].items())
    limits = [f"{n} {v:.4g}" for n, v in record.items() if isinstance(v, float)]
    return [f"{record['devices']} x {record['device']}; {names}", "; ".join(limits)]
