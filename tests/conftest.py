# SPDX-License-Identifier: Apache-2.0
"""Shape checks on every public signature, one compilation cache, shared data."""

import json
import os
import signal
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# compiling takes longer than what is compiled, and a rerun finds it compiled
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))

from jaxtyping import install_import_hook

install_import_hook("dlm_jax", "beartype.beartype")

from dlm_jax.runtime.compilation import cache_for_processor  # noqa: E402

CACHE = cache_for_processor(Path(__file__).parents[1] / ".pytest_cache" / "jax")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.extend.core import jaxprs_in_params  # noqa: E402

# a shell lets its background jobs ignore Ctrl-C, which some tests press
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_module():
    """A worker that keeps them all meets the kernel's limit on a process's mappings."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """Arrays of the published code's own modules on a tiny network; see README.md."""
    with np.load(Path(__file__).parent / "golden.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def untrained(tok, length):
    """A small model of this tokenizer with random weights, and the smoke config."""
    from dlm_jax.configs import smoke
    from dlm_jax.diffusion import model
    from dlm_jax.inference import loading
    from dlm_jax.nn.transformer import DenoiserConfig

    config = smoke.get_config()
    config.data.length = config.model.positions = length
    config.model.update(layers=1, hidden_dim=16, mlp_dim=16, dim=8)
    config.sample.update(n=3, batch=8, num_steps=3)
    record = json.loads(config.to_json_best_effort())
    cfg = DenoiserConfig(**record["model"])
    params = model.init(jax.random.key(0), cfg, tok.vocab_size)
    return loading.from_parts(cfg, params, tok, record)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real text that is not shipped; DLM_DATA names the folder."""
    folder = os.environ.get("DLM_DATA")
    if not folder:
        pytest.skip("DLM_DATA does not name the data folder")
    return Path(folder)


def wait_until(condition, what, seconds=60):
    """Returns once condition() holds; fails, naming what it waited for, past seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not so after {seconds} seconds"
        time.sleep(0.002)


def sizes(jaxpr):
    """Elements of every value in a jaxpr, the inner ones included."""
    for equation in jaxpr.eqns:
        for value in equation.outvars:
            yield value.aval.size
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)
