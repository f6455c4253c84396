# SPDX-License-Identifier: Apache-2.0
"""What a first sample of a shared model waits for: few imports, and a cache on disk."""

import os
import subprocess
import sys

import jax
import pytest

from dlm_jax.runtime import compilation

NOT_NEEDED = "optax orbax tensorstore sacrebleu matplotlib nltk sentencepiece "
NOT_NEEDED += "tensorflow_datasets huggingface_hub"


def _python(code, home):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env = kept | {"HOME": str(home), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        env=env,
        check=False,
    )
    assert not done.returncode, done.stderr
    return done.stdout.split()


def test_a_shared_model_loads_without_what_training_needs(tmp_path):
    """And with a cache: a sample that compiled once is loaded from disk afterwards."""
    code = (
        "import sys, jax, dlm_jax; dlm_jax.load('grammar')\n"
        f"print(*sorted(set({NOT_NEEDED!r}.split()) & set(sys.modules)))\n"
        "print(jax.config.jax_compilation_cache_dir)"
    )
    (cache,) = _python(code, tmp_path)
    assert cache.startswith(str(tmp_path / ".cache" / "dlm_jax"))


@pytest.fixture
def settings(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    size = jax.config.jax_compilation_cache_max_size
    yield jax.config
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_compilation_cache_max_size", size)


def test_a_cache_that_the_process_has_stays(settings, tmp_path):
    settings.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    compilation.keep_for_library()
    assert settings.jax_compilation_cache_dir == str(tmp_path / "own")


def test_no_cache_where_nothing_can_be_written(settings, tmp_path):
    (tmp_path / ".cache").touch()
    settings.update("jax_compilation_cache_dir", None)
    compilation.keep_for_library()
    assert settings.jax_compilation_cache_dir is None
