# SPDX-License-Identifier: Apache-2.0
"""The package as users install it: a wheel, away from the source tree."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dlm_jax

ROOT = Path(__file__).parent.parent
SHORT = (
    "--config.train.total_steps=2",
    "--config.train.batch=8",
    "--config.data.size=200",
    "--config.data.valid_size=40",
    "--config.sample.num_steps=3",
    "--config.sample.n=2",
)


def test_public_names():
    for name in dir(dlm_jax):
        assert getattr(dlm_jax, name) is not None
    assert {"load", "schedule", "losses", "published", "grammar"} <= set(dir(dlm_jax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dlm_jax.nothing


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built without fetching anything."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_one_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dlm_jax"}
    wanted = {"py.typed", "data/restaurant.pcfg", "configs/grammar.py"}
    wanted |= {f"pretrained/{n}/model.safetensors" for n in ("grammar", "e2e")}
    assert {f"dlm_jax/{name}" for name in wanted} <= set(names)


@pytest.mark.slow
def test_wheel_trains_and_samples_beside_a_foreign_configs_folder(wheel, tmp_path):
    site, away = tmp_path / "site", tmp_path / "away"
    zipfile.ZipFile(wheel).extractall(site)
    (away / "configs").mkdir(parents=True)
    for name in ("__init__", "default", "grammar"):
        (away / "configs" / f"{name}.py").write_text(
            "raise SystemExit('foreign')", encoding="utf-8"
        )
    env = {**os.environ, "PYTHONPATH": str(site)}

    def dlm(*args):
        command = [sys.executable, "-m", "dlm_jax.main", "--workdir", "run", *args]
        done = subprocess.run(
            command, cwd=away, env=env, capture_output=True, encoding="utf-8"
        )
        return done.returncode, done.stdout, done.stderr

    status, out, err = dlm("--config", "grammar:modern", *SHORT)
    assert status == 0, err
    assert "train 1/2" in out
    status, out, err = dlm("--mode", "sample")
    assert status == 0, err
    assert len(out.splitlines()) == 2
    assert dlm("--config=nothing")[0] == 2
    shown = "import dlm_jax; print(dlm_jax.__file__, dlm_jax.load('run'))"
    out = subprocess.check_output(
        [sys.executable, "-c", shown], cwd=away, env=env, encoding="utf-8"
    )
    assert out.startswith(str(site))
    assert out.endswith("length 32, step 2, schedule 'logistic')\n")
