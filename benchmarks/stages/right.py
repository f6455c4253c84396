# SPDX-License-Identifier: Apache-2.0
"""Checks the device's results against the CPU's in float32.

The reference runs at the same time in a process without an accelerator. The error of a
result is |result - reference| / |reference| over all of its numbers. For a chain with
the clamp, whose results are words, it is the share of coordinates that differ.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from lib import alternate, ours
from lib.alternate import Case

from dlm_jax.diffusion import model
from dlm_jax.nn import ops
from dlm_jax.training import train_step
from dlm_jax.training.config import resolve_config
from stages import Job, Wrong, together

TRUNKS = {"post_ln": "configs/e2e.py", "adaln": "configs/e2e.py:modern"}
SMALL = (
    "model.hidden_dim=256",
    "model.mlp_dim=1024",
    "model.layers=2",
    "model.heads=4",
)
TINY = ("model.hidden_dim=32", "model.mlp_dim=64", "model.layers=1", "model.heads=2")
VOCAB = 821

# The largest errors allowed. bfloat16 has 8 significant bits, about 0.4% per rounding.
# In a step of Adam or of sign guidance, numbers near zero may change their sign.
LIMITS = {
    "forward": {"float32": 1e-3, "bfloat16": 5e-2},
    "gradient": {"float32": 1e-3, "bfloat16": 8e-2},
    "fused attention": {"bfloat16": 2e-2},
    "three optimizer steps": {"float32": 5e-2},
    "guided step": {"float32": 5e-2},
    "20 steps with clamp, other words": {"float32": 5e-2},
}


def case(trunk: str, dtype: str, *, tiny: bool, **other: Any) -> Case:
    """Returns a case with a small network; no dropout, whose bits depend on devices."""
    size, batch, length = (TINY, 2, 16) if tiny else (SMALL, 8, 64)
    still = ("model.dropout=0.0", "model.attention_dropout=0.0")
    change = (*size, *still, f"model.dtype={dtype}")
    return Case(
        TRUNKS[trunk], batch=batch, length=length, vocab=VOCAB, change=change, **other
    )


def passes(trunk: str, dtype: str, tiny: bool) -> dict[str, Any]:
    """Computes the network's output and its gradients by weights and input."""
    config = alternate.settings(case(trunk, dtype, tiny=tiny))
    step_cfg = resolve_config(config)
    # the logits of the token posterior would dominate the output
    cfg = dataclasses.replace(step_cfg.cfg, token_posterior_input=False)
    params = _moved(model.init(jax.random.key(0), cfg, VOCAB))
    shape = (config.train.batch, config.data.length, cfg.dim)
    x_t, x0_prev = jax.random.normal(jax.random.key(2), (2, *shape))
    t = jnp.linspace(0.3, 0.9, shape[0])

    def loss(params: Any, x_t: Any) -> tuple[Any, Any]:
        run = partial(model.apply, schedule=step_cfg.schedule)
        y = run(params, cfg, x_t, t, x0_prev)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y), grads = both(params, x_t)
    return {"forward": y, "gradient": grads}


def _moved(params: Any) -> Any:
    """Adds noise to the initial parameters, at which the gates of adaln are zero."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        x + 0.05 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


def attention(fused: bool, tiny: bool) -> dict[str, Any]:
    """Computes attention and its gradients on numbers exact in bfloat16."""
    shape = (2, 2, 16, 16) if tiny else (8, 4, 64, 64)
    q, k, v = jax.random.normal(jax.random.key(3), (3, *shape)).astype(jnp.bfloat16)
    how: Literal["xla", "cudnn"] | None = ops.FUSED_ATTENTION.get(jax.default_backend())

    def plain(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        scores = jnp.einsum("bnqk,bnlk->bnql", q, k) / shape[-1] ** 0.5
        return jnp.einsum("bnql,bnlk->bnqk", jax.nn.softmax(scores), v)

    def library(q: Any, k: Any, v: Any) -> Any:  # XLA's where the device has none
        places = (x.swapaxes(1, 2) for x in (q, k, v))
        y = jax.nn.dot_product_attention(*places, implementation=how)
        return y.swapaxes(1, 2)

    def loss(*qkv: Any) -> tuple[Any, Any]:
        y = (library if fused else plain)(*qkv).astype(jnp.float32)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(shape)), y

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return {"fused attention": both(q, k, v)}


def steps(trunk: str, tiny: bool) -> dict[str, Any]:
    """Computes the change of the weights in three optimizer steps."""
    config = alternate.settings(case(trunk, "float32", tiny=tiny))
    config.optim.warmup = 0
    step_cfg = resolve_config(config)
    ids = jnp.asarray(ours.ids_of(config, VOCAB))
    step = jax.jit(partial(train_step.train_step, step_cfg=step_cfg))
    first = state = train_step.init_state(jax.random.key(0), step_cfg, VOCAB)
    for _ in range(3):
        state, _ = step(jax.random.key(1), state, ids)
    added = jax.tree.map(jnp.subtract, state.params, first.params)
    return {"three optimizer steps": added}


def chains(trunk: str, tiny: bool) -> dict[str, Any]:
    """Runs a chain with the clamp, and two steps, the first one guided."""
    make = partial(case, trunk, "float32", tiny=tiny)
    chain = ours.chain(make(job="chain", num_steps=20, clamp=True))
    guided = ours.chain(make(job="guided", num_steps=2, clamp=False))
    name = "20 steps with clamp, other words"
    return {name: chain(), "guided step": guided()}


def compute(*, tiny: bool, reference: bool) -> dict[str, np.ndarray]:
    """Computes all results, flattened, by name; the reference only in float32."""
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "/bfloat16": partial(attention, not reference, tiny)
    }
    for trunk in TRUNKS:
        work[f", {trunk}/float32"] = partial(passes, trunk, "float32", tiny)
        work[f", {trunk}/float32 "] = partial(steps, trunk, tiny)
        work[f", {trunk}/float32  "] = partial(chains, trunk, tiny)
        if not reference:
            work[f", {trunk}/bfloat16"] = partial(passes, trunk, "bfloat16", tiny)
    return {
        f"{name}{where.rstrip()}": _flat(tree)
        for where, results in together(work).items()
        for name, tree in results.items()
    }


def _flat(tree: Any) -> np.ndarray:
    leaves = [np.ravel(x).astype(np.float32) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


@dataclasses.dataclass(frozen=True)
class Check:
    """An error and the largest allowed one; NaN is never allowed."""

    error: float
    limit: float

    @property
    def holds(self) -> bool:
        """Returns whether the error is within the limit."""
        return self.error <= self.limit


def compare(
    found: dict[str, np.ndarray], reference: dict[str, np.ndarray]
) -> dict[str, Check]:
    """Compares every result with its reference; bfloat16 with float32."""
    checks = {}
    for name, value in found.items():
        kind, _, dtype = name.rpartition("/")
        what = kind.partition(", post_ln")[0].partition(", adaln")[0]
        expected = reference.get(name, reference.get(f"{kind}/float32"))
        assert expected is not None, name
        error = words_apart if "words" in what else apart
        checks[name] = Check(error(value, expected), LIMITS[what][dtype])
    return checks


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """Computes |found - wanted| / |wanted|."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def words_apart(
    found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-3
) -> float:
    """Computes the share of coordinates that differ, as those of other words do."""
    return float(np.mean(~(np.abs(found - wanted) <= tolerance)))


# each program runs only once, so compilation should be fast
REFERENCE = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def no_fused_attention(*, tiny: bool) -> str:
    """Returns why fused attention and its gradient fail on this device, or ""."""
    try:
        jax.block_until_ready(attention(True, tiny))
    except Exception as error:  # libraries raise errors of many kinds
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return ""


def run(job: Job) -> None:
    """Reports all errors; raises Wrong for the first one above its limit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.npz"
        reference = subprocess.Popen(
            [sys.executable, __file__, str(path), *["tiny"] * job.rehearse],
            env={**os.environ, **REFERENCE},
        )
        record: dict[str, Any] = {}
        if reason := no_fused_attention(tiny=job.rehearse):
            record["no fused attention"] = reason
            ops.FUSED_ATTENTION.clear()
        found = compute(tiny=job.rehearse, reference=False)
        if reference.wait(max(1.0, job.left())):
            raise RuntimeError(
                f"the reference ended with status {reference.returncode}"
            )
        with np.load(path) as arrays:
            checks = compare(found, {name: arrays[name] for name in arrays.files})
    rows = {n: {**dataclasses.asdict(c), "holds": c.holds} for n, c in checks.items()}
    job.report({**record, "checks": rows})
    for name, check in checks.items():
        if not check.holds:
            raise Wrong(f"{name}: error {check.error:.3g}, allowed {check.limit:g}")


def table(record: dict[str, Any]) -> list[str]:
    """Returns a line per check."""
    lines = [f"{n}: {v}" for n, v in record.items() if n != "checks"]
    return lines + [
        f"{'ok   ' if row['holds'] else 'WRONG'} {name}: {row['error']:.2g}"
        f" (allowed {row['limit']:g})"
        for name, row in record.get("checks", {}).items()
    ]


if __name__ == "__main__":
    arrays: Any = compute(tiny="tiny" in sys.argv[2:], reference=True)
    np.savez(sys.argv[1], **arrays)
