# SPDX-License-Identifier: Apache-2.0
"""Metrics also go to TensorBoard and wandb, and a trace of some steps to the run."""

import json
import struct
import sys
import types

import pytest

from dlm_jax.configs import smoke
from dlm_jax.errors import UserError
from dlm_jax.runtime import writers
from dlm_jax.training import loop


class Wandb(types.ModuleType):
    """A stand-in of wandb that keeps what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")
        self.runs = []

    def init(self, **options):
        run = types.SimpleNamespace(options=options, rows=[], ended=False)
        run.log = lambda values, step: run.rows.append((step, values))
        run.finish = lambda: setattr(run, "ended", True)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def _train(folder, total, **changes):
    config = smoke.get_config()
    config.optim.update(decay="constant")
    config.train.update(
        total_steps=total, log_steps=1, sample_steps=0, ckpt_steps=0, **changes
    )
    loop.train(config, str(folder))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _events(folder):
    """{(step, tag)} of all event files: records of length, two checksums and a message."""
    from tensorboardX.proto import event_pb2

    found = set()
    for path in folder.iterdir():
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            found |= {(event.step, v.tag) for v in event.summary.value}
            data = data[16 + size :]
    return found


def test_the_metrics_are_mirrored_also_after_a_resume(tmp_path, wandb):
    pytest.importorskip("tensorboardX")
    folder = tmp_path / "run"
    for total in (2, 3):
        rows = _train(folder, total, writers="tensorboard wandb", profile_steps=1)
    expected = {
        (row["step"], f"{row['kind']}/{name}")
        for row in rows
        for name in row.keys() - {"step", "kind", "seconds"}
    }
    assert {(1, "train/loss"), (3, "train/loss"), (3, "valid/loss")} <= expected
    assert _events(folder / "tensorboard") == expected
    sent = {
        (step, name) for run in wandb.runs for step, row in run.rows for name in row
    }
    assert sent == expected
    first, second = wandb.runs
    assert first.options["id"] == second.options["id"]
    assert first.options["config"]["train"]["total_steps"] == 2
    assert first.ended
    assert second.ended
    assert list((folder / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tensorbord", r"writers='tensorbord': did you mean 'tensorboard'\?"),
        ("wandb", r"no_such_package is not installed; pip install 'dlm_jax\[wandb\]'"),
    ],
)
def test_a_writer_that_cannot_be_is_named_before_the_run(
    name, says, tmp_path, monkeypatch
):
    monkeypatch.setitem(writers.PACKAGES, "wandb", "no_such_package")
    with pytest.raises(UserError, match=says):
        _train(tmp_path / "run", 1, writers=name)
    assert not (tmp_path / "run").exists()


def test_a_writer_that_fails_is_one_line(tmp_path, wandb, monkeypatch):
    def fail(**options):
        raise RuntimeError("no key\nfound")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(UserError, match=r"no key found; set WANDB_MODE=offline"):
        _train(tmp_path / "run", 1, writers="wandb")
