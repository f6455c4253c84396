# SPDX-License-Identifier: Apache-2.0
"""Only bytes that are not those that were saved are damage; nothing else is moved."""

import errno
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_checkpoint import (
    ROOT,
    TINY,
    _config,
    _data,
    _digest,
    _flip,
    _same_bits,
    _saved,
    texts,
)

import dlm_jax
from dlm_jax.errors import UserError, environment_reason
from dlm_jax.runtime import backend, checkpoint, integrity, sharding
from dlm_jax.training import loop
from dlm_jax.training.trainer import Trainer, language_job

__all__ = ["texts"]  # a fixture
MORE = {"train__total_steps": 2, "optim__decay": "constant"}
SETTINGS = {
    "64 bits": {"jax_enable_x64": True},
    "strict types": {"jax_numpy_dtype_promotion": "strict"},
    "strict ranks": {"jax_numpy_rank_promotion": "raise"},
    "other random numbers": {
        "jax_default_prng_impl": "rbg",
        "jax_threefry_partitionable": False,
    },
    "debugging": {
        "jax_debug_key_reuse": True,
        "jax_disable_jit": True,
        "jax_transfer_guard": "disallow",
    },
    "all": {
        "jax_enable_x64": True,
        "jax_numpy_dtype_promotion": "strict",
        "jax_numpy_rank_promotion": "raise",
    },
}


@pytest.fixture(scope="module")
def start(texts, tmp_path_factory):
    """A run directory with steps 0 and 1; tests copy it before they harm it."""
    workdir = tmp_path_factory.mktemp("start") / "run"
    _saved(texts, workdir, (0, 1), **MORE)
    return workdir


@pytest.fixture(scope="module")
def ordinary(texts, start, tmp_path_factory):
    """What JAX's ordinary settings make of it: a text, its loss and the next state."""
    return _results(texts, shutil.copytree(start, tmp_path_factory.mktemp("o") / "run"))


def _results(texts, workdir):
    lm = dlm_jax.load(workdir)
    config = _config(texts, **MORE)
    nats = lm.nll(lm.encode(["word0 is not word1"])).total()
    loop.train(config, str(workdir), allow_fallback=True)
    with backend.settings():
        state = Trainer(language_job(config), str(workdir)).state
    return lm.sample(2, seed=0), nats, state


@pytest.fixture
def jax_settings(request):
    """Sets JAX for the process, as environment variables do."""
    before = {name: getattr(jax.config, name) for name in request.param}
    for name, value in request.param.items():
        jax.config.update(name, value)
    yield request.param
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("jax_settings", SETTINGS.values(), ids=SETTINGS, indirect=True)
def test_settings_of_jax_change_nothing(jax_settings, texts, start, ordinary, tmp_path):
    """Loading, sampling, scoring and resuming have the same bits; nothing is moved."""
    workdir = shutil.copytree(start, tmp_path / "run")
    _same_bits(_results(texts, workdir), ordinary)
    assert not (workdir / "damaged").exists()
    assert {name: getattr(jax.config, name) for name in jax_settings} == jax_settings


@pytest.mark.parametrize("name", backend.random_settings())
def test_other_random_numbers_are_refused(name, texts, start, tmp_path, monkeypatch):
    """As of JAX_RANDOM_SEED_OFFSET, or of a version that drew as the process said."""
    workdir = shutil.copytree(start, tmp_path / "run")
    before = _digest(workdir)
    monkeypatch.setattr(backend, "random_settings", lambda: {name: "other"})
    with pytest.raises(UserError, match=rf"was begun under {name.upper()}="):
        loop.train(_config(texts, **MORE), str(workdir), allow_fallback=True)
    assert _digest(workdir) == before


ERRORS = {
    "memory": MemoryError(),
    "device memory": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    "permission": PermissionError(errno.EACCES, "Permission denied", "state/d/1"),
    "permission, by TensorStore": ValueError("PERMISSION_DENIED: Error opening file"),
    "limits": OSError(errno.EMFILE, "Too many open files"),
    "disk": OSError(errno.EIO, "Input/output error"),
    "network": ValueError("UNAVAILABLE: connection lost"),
    "devices": AssertionError(),
    "another version": KeyError("params.denoiser.new"),
}


@pytest.mark.parametrize("cause", [False, True], ids=["itself", "as a cause"])
@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_the_machine_is_not_damage(
    name, cause, texts, start, tmp_path, monkeypatch
):
    """Whichever it is, and however deep, the line says so and no file is moved."""
    workdir = shutil.copytree(start, tmp_path / "run")
    before = _digest(workdir)

    def fail(*args, **options):
        if cause:
            raise ValueError("Failed to load") from ERRORS[name]
        raise ERRORS[name]

    monkeypatch.setattr(integrity, "read", fail)
    train = functools.partial(loop.train, _config(texts, **MORE), allow_fallback=True)
    for call in (dlm_jax.load, lambda w: train(str(w))):
        with pytest.raises(UserError) as caught:
            call(workdir)
        assert not isinstance(caught.value, checkpoint.CorruptCheckpointError)
        assert "damaged" not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert _digest(workdir) == before


def test_an_error_while_looking_for_damage_is_not_damage(
    texts, start, tmp_path, monkeypatch
):
    workdir = shutil.copytree(start, tmp_path / "run")

    def fail(*args):
        raise ValueError("RESOURCE_EXHAUSTED: Too many open files")

    monkeypatch.setattr(integrity, "_open", fail)
    with pytest.raises(UserError, match=r"cannot be read here .*Too many open files"):
        dlm_jax.load(workdir)


PLACES = ("connection", "timed out", "a permission denied", "unavailable/x")


@pytest.mark.parametrize("place", PLACES)
def test_words_of_a_path_are_no_reason(place):
    for line in (
        f"[Errno 2] No such file or directory: '/runs/{place}/run/metadata'",
        f'Error opening "zarr3" driver: Error reading "file:///runs/{place}/d/0": bad crc',
        f"/runs/{place.replace(' ', '_')}/state: not a checkpoint",
    ):
        assert not environment_reason(ValueError(line))
        full = ValueError(f"{line}: No space left on device")
        assert "No space left" in environment_reason(full)
    assert environment_reason(ValueError("x/y: Input/output error"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("harm", [_flip, Path.unlink])
def test_damage_is_found_wherever_the_run_is(harm, texts, start, tmp_path):
    workdir = shutil.copytree(start, tmp_path / "timed out connection" / "run")
    for path in _data(workdir):
        harm(path)
    with pytest.raises(checkpoint.CorruptCheckpointError, match="damaged"):
        dlm_jax.load(workdir)


def test_another_model_is_not_damage(start, tmp_path):
    """Such as that of a newer version: an array of another shape or name."""
    shapes = {"other shape": ("ema", (3, 3)), "other name": ("new", ())}
    for field, shape in shapes.values():
        like = sharding.global_like({field: jax.ShapeDtypeStruct(shape, jnp.float32)})
        with pytest.raises(UserError, match="its bytes are as saved") as caught:
            checkpoint.restore_part(start, 1, like)
        assert not isinstance(caught.value, checkpoint.CorruptCheckpointError)


def test_a_link_is_not_damage(texts, start, tmp_path):
    """It is refused, and stays with what it leads to."""
    workdir = shutil.copytree(start, tmp_path / "run")
    tokenizer = checkpoint.folder(workdir) / "1" / "tokenizer"
    tokenizer.rename(tmp_path / "elsewhere")
    tokenizer.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="tokenizer is a link"):
        loop.train(_config(texts, **MORE), str(workdir), allow_fallback=True)
    assert checkpoint.all_steps(workdir) == [0, 1]


@pytest.mark.parametrize(
    "dtype",
    [
        *(np.float32, np.float64, np.float16, ml_dtypes.bfloat16),
        np.int32,
        np.uint8,
        bool,
    ],
)
def test_checksums_need_no_jax(dtype):
    """NumPy and JAX agree on every type, so that the files alone can be judged."""
    x = np.random.default_rng(0).integers(0, 99, (7, 5)).astype(dtype)
    with jax.enable_x64(True):
        sums = integrity.state_sums({"x": jnp.asarray(x)})
    assert sums == {"x": integrity.array_sum(x)}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "sample", "load"])
def test_a_backend_that_is_missing_is_one_line(mode, texts, start, tmp_path):
    workdir = shutil.copytree(start, tmp_path / "run")
    before = _digest(workdir)
    dotted = {name.replace("__", "."): value for name, value in MORE.items()}
    settings = {**TINY, "data.path": texts, **dotted}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "dlm_jax.main", "--workdir", str(workdir)]
    command += [f"--mode={mode}", "--config=smoke", *flags]
    command += ["--allow_fallback"] if mode == "train" else []
    if mode == "load":
        program = f"import dlm_jax; dlm_jax.load({str(workdir)!r})"
        command = [sys.executable, "-c", program]
    env = os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT)}
    kinds = {"capture_output": True, "encoding": "utf-8", "timeout": 120}
    done = subprocess.run(command, env=env, cwd=Path(start).parent, **kinds)
    assert done.returncode == (1 if mode == "load" else 2)
    line = done.stderr.splitlines()[-1]
    assert "JAX cannot start with JAX_PLATFORMS=cuda" in line
    assert mode == "load" or done.stderr.count("\n") == 1
    assert _digest(workdir) == before
