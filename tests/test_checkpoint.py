# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a resumed run has the same bits, and nothing is lost or overwritten."""

import functools
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import wait_until

import dlm_jax
from dlm_jax import main
from dlm_jax.configs import smoke
from dlm_jax.errors import UserError
from dlm_jax.runtime import checkpoint, integrity
from dlm_jax.training import loop
from dlm_jax.training.trainer import Trainer, language_job

ROOT = Path(__file__).parent.parent
STEPS = 300
NEVER = 10 * STEPS
TINY = {
    "data.source": "text",
    "data.length": 8,
    "data.valid_fraction": 0.25,
    "model.layers": 1,
    "model.hidden_dim": 16,
    "model.mlp_dim": 32,
    "model.positions": 8,
    "model.trunk": "post_ln",
    "model.predicts": "x0",
    "model.self_cond": False,
    "model.dropout": 0.1,
    "loss.objective": "x0",
    "loss.self_cond_prob": 0.0,
    "train.batch": 8,
    "train.total_steps": STEPS,
    "train.ckpt_steps": NEVER,
    "train.log_steps": 100,
    "train.valid_steps": NEVER,
    "train.sample_steps": NEVER,
    "sample.num_steps": 2,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file of 32 short texts."""
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text(
        "".join(f"word{i % 5} is not word{i % 3}\n" for i in range(32)),
        encoding="utf-8",
    )
    return str(path)


def _config(texts, **changes):
    config = smoke.get_config()
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict({**TINY, "data.path": texts, **dotted})
    return config


def _trainer(config, workdir):
    return Trainer(language_job(config), str(workdir))


def _saved(texts, workdir, steps=(0,), keep=2, **changes):
    """A run directory with the start's state under each of `steps`."""
    run = _trainer(_config(texts, train__keep=keep, **changes), workdir)
    writer = checkpoint.manager(workdir, keep=keep)
    for step in steps:
        run.state = run.state._replace(step=run.state.step * 0 + step)
        run.save(writer)
    writer.close()
    return run


@pytest.fixture(scope="module")
def start(texts, tmp_path_factory):
    """A run directory with steps 1 and 2; tests copy it before they harm it."""
    workdir = tmp_path_factory.mktemp("start") / "run"
    _saved(texts, workdir, (1, 2))
    return workdir


def _same_bits(a, b):
    paths = jax.tree_util.tree_leaves_with_path(a)
    for (path, x), y in zip(paths, jax.tree.leaves(b), strict=True):
        assert np.array_equal(x, y), jax.tree_util.keystr(path)


def _digest(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def _fails(says, call, *args):
    with pytest.raises(UserError, match=says) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- resuming


def _command(texts, workdir, **changes):
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    settings = {**TINY, "data.path": texts, **dotted}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    main = [sys.executable, "-m", "dlm_jax.main", "--config", "configs/smoke.py"]
    return [*main, *flags, "--workdir", str(workdir)]


def _kill_after_first_checkpoint(command, workdir):
    env, silent = os.environ, subprocess.DEVNULL
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=silent) as process:
        try:
            wait_until(
                lambda: checkpoint.all_steps(workdir) or process.poll() is not None,
                "a checkpoint or an end",
                seconds=120,
            )
            assert process.poll() is None, "ended before it saved anything"
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_and_resumed_run_has_the_same_bits(texts, tmp_path, capsys):
    """Dropout, shuffling, EMA and optimiser all follow from the step alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = _command(texts, killed, train__ckpt_steps=5, train__keep=100)
    _kill_after_first_checkpoint(command, killed)
    reached = checkpoint.choose_step(killed)
    assert reached < STEPS
    unfinished = checkpoint.folder(killed) / f"{STEPS - 1}.orbax-checkpoint-tmp"
    (unfinished / "state").mkdir(parents=True)
    config = _config(texts)
    loop.train(config, str(killed))
    assert f"from step {reached}" in capsys.readouterr().out
    loop.train(config, str(whole))
    assert checkpoint.choose_step(killed) == checkpoint.choose_step(whole) == STEPS
    states = [_trainer(config, w).state for w in (whole, killed)]
    assert not np.array_equal(states[0].params.table, states[0].ema.table)
    _same_bits(*states)


def test_changed_text_is_refused(texts, tmp_path):
    mine = tmp_path / "texts.txt"
    shutil.copy(texts, mine)
    _saved(str(mine), tmp_path / "run", (1,))
    before = _digest(tmp_path / "run")
    lines = mine.read_text(encoding="utf-8").splitlines()
    mine.write_text("\n".join([*lines[1:], lines[0]]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"not the one that .* was begun with"):
        loop.train(_config(str(mine)), str(tmp_path / "run"))
    assert _digest(tmp_path / "run") == before


def test_finished_run_says_so(texts, tmp_path, capsys):
    _saved(texts, tmp_path, (STEPS,))
    before = _digest(tmp_path)
    loop.train(_config(texts), str(tmp_path))
    assert "finished already" in capsys.readouterr().out
    assert _digest(tmp_path) == before


def test_unfinished_save_is_ignored(texts, start, tmp_path):
    workdir = shutil.copytree(start, tmp_path / "run")
    done = checkpoint.folder(workdir) / "2"
    shutil.copytree(done, done.with_name("9.orbax-checkpoint-tmp"))
    assert checkpoint.all_steps(workdir) == [1, 2]
    assert int(_trainer(_config(texts), workdir).state.step) == 2
    assert dlm_jax.load(workdir).step == 2


def test_restores_under_another_number_of_devices(start):
    """The bytes that three devices read are those that one device saved."""
    program = (
        "import sys, dlm_jax, numpy as np, jax\n"
        "assert jax.device_count() == 3\n"
        "ema = dlm_jax.load(sys.argv[1]).ema\n"
        "assert len(ema.table.sharding.device_set) == 3\n"
        "print(sum(float(np.abs(x).sum()) for x in jax.tree.leaves(ema)))"
    )
    command = [sys.executable, "-c", program, str(start)]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "3"}
    kinds = {"capture_output": True, "encoding": "utf-8", "check": True, "timeout": 240}
    done = subprocess.run(command, cwd=ROOT, env=env, **kinds)
    mine = jax.tree.leaves(dlm_jax.load(start).ema)
    assert float(done.stdout) == sum(float(np.abs(x).sum()) for x in mine)


# --- the directory


def test_layout(texts, start):
    folders = checkpoint.folder(start)
    assert folders == start / "checkpoints"
    assert {p.name for p in folders.iterdir()} == {"1", "2"}
    records = checkpoint.read_records(start, 2)
    assert records.config == json.loads(
        (start / "config.json").read_text(encoding="utf-8")
    )
    assert records.config["train"]["total_steps"] == STEPS
    assert records.tokenizer["kind"] == "word"
    assert set(records.run) == {"kind", "corpus", "valid", "jax", "skipped_batches"}
    assert records.run["kind"] == "diffusion"
    assert records.run["skipped_batches"] == []
    for name in ("config", "tokenizer", "run"):
        json.loads((folders / "2" / name / "metadata").read_text(encoding="utf-8"))


def test_keeps_the_newest(texts, tmp_path):
    _saved(texts, tmp_path, (1, 2, 3, 4, 5), keep=3)
    assert checkpoint.all_steps(tmp_path) == [3, 4, 5]


def test_no_save_over_a_newer_step(texts, start, tmp_path):
    """Orbax itself would return False and say nothing."""
    workdir = shutil.copytree(start, tmp_path / "run")
    run = _trainer(_config(texts), workdir)
    run.state = run.state._replace(step=run.state.step - 1)
    writer = checkpoint.manager(workdir, keep=2)
    _fails("step 1 was not saved", run.save, writer)
    writer.close()


def test_unwritable_workdir(texts, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    workdir = tmp_path / "file" / "x"
    _fails("cannot write", loop.train, _config(texts), str(workdir))


# --- damage


def _data(workdir):
    """The newest step's arrays, some superseded, and their description."""
    state = checkpoint.folder(workdir) / str(checkpoint.choose_step(workdir)) / "state"
    files = sorted(p for p in state.rglob("d/*") if p.is_file())
    return [*files, state / "_METADATA"]


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.write_bytes(content)


# Orbax's reading threads complain after the fact, to nobody
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("harm", [_truncate, _flip, Path.unlink])
def test_damaged_arrays_are_named_or_never_read(harm, texts, start, tmp_path):
    """Whichever file is harmed, no state but the one that was saved comes back."""
    whole, said = _trainer(_config(texts), start).state, []
    for number in range(len(_data(start))):
        workdir = shutil.copytree(start, tmp_path / str(number))
        harm(_data(workdir)[number])
        before = _digest(workdir)
        try:
            _same_bits(_trainer(_config(texts), workdir).state, whole)
        except UserError as error:
            said.append(str(error))
        assert _digest(workdir) == before
    assert said
    assert all("checkpoints/2: damaged" in line for line in said)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("harm", [_truncate, _flip, Path.unlink])
@pytest.mark.parametrize(
    "name",
    [
        "state/manifest.ocdbt",
        "config/metadata",
        "tokenizer/metadata",
        "run/metadata",
    ],
)
def test_damaged_checkpoint_is_one_line(harm, name, texts, start, tmp_path):
    """It names the step, and leaves all files as they are."""
    workdir = shutil.copytree(start, tmp_path / "run")
    harm(checkpoint.folder(workdir) / "2" / name)
    before = _digest(workdir)
    for call in (lambda w: loop.train(_config(texts), str(w)), dlm_jax.load):
        assert "the one before" in _fails("checkpoints/2: damaged", call, workdir)
    assert _digest(workdir) == before
    shutil.rmtree(checkpoint.folder(workdir) / "2")
    assert dlm_jax.load(workdir).step == 1


def test_a_checkpoint_of_an_older_version_is_one_line(texts, start, tmp_path):
    """It has no record of the run, and its files stay as they are."""
    workdir = shutil.copytree(start, tmp_path / "run")
    shutil.rmtree(checkpoint.folder(workdir) / "2" / "run")
    before = _digest(workdir)
    for call in (lambda w: loop.train(_config(texts), str(w)), dlm_jax.load):
        _fails("checkpoints/2: saved by an older version", call, workdir)
    assert _digest(workdir) == before


def _run(texts, workdir, **options):
    """A run of a few steps that saves each second one."""
    changes = {"train__total_steps": 6, "train__ckpt_steps": 2}
    config = _config(texts, **changes, optim__decay="constant")
    loop.train(config, str(workdir), **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_step_is_set_aside_on_request_only(texts, tmp_path, capsys):
    """Then the run ends where it would have ended, and the damaged files are kept."""
    whole, harmed = tmp_path / "whole", tmp_path / "harmed"
    _run(texts, whole)
    shutil.copytree(whole, harmed)
    _truncate(checkpoint.folder(harmed) / "6" / "state" / "manifest.ocdbt")
    damaged = _digest(checkpoint.folder(harmed) / "6")
    _fails("--allow_fallback", _run, texts, harmed)
    assert checkpoint.all_steps(harmed) == [4, 6]
    capsys.readouterr()
    _run(texts, harmed, allow_fallback=True)
    said = capsys.readouterr().out.splitlines()
    assert sum("damaged" in line for line in said) == 1
    assert _digest(harmed / "damaged" / "6") == damaged
    config = _config(texts, train__total_steps=6, optim__decay="constant")
    _same_bits(*(_trainer(config, w).state for w in (whole, harmed)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_is_set_aside_where_nothing_else_is_left(texts, tmp_path):
    _saved(texts, tmp_path, (1,))
    _truncate(checkpoint.folder(tmp_path) / "1" / "state" / "manifest.ocdbt")
    before = _digest(tmp_path)
    call = functools.partial(loop.train, _config(texts), allow_fallback=True)
    _fails("checkpoints/1: damaged", call, str(tmp_path))
    assert _digest(tmp_path) == before


def test_in_a_bucket_a_step_is_complete_when_orbax_says_so(tmp_path, monkeypatch):
    """There a save writes into its last place from the start."""
    for step in (2, 4):
        (tmp_path / str(step)).mkdir()
    (tmp_path / "2" / "commit_success.txt").write_text("", encoding="utf-8")

    class Bucket:
        is_dir, iterdir = tmp_path.is_dir, tmp_path.iterdir

        def __str__(self):
            return "gs://bucket/run/checkpoints"

    monkeypatch.setattr(checkpoint, "folder", lambda workdir: Bucket())
    assert checkpoint.all_steps("gs://bucket/run") == [2]
    assert checkpoint.choose_step("gs://bucket/run") == 2


@pytest.mark.parametrize("mode", main.LOCAL)
def test_modes_that_write_to_disks_say_so_of_a_bucket(mode):
    command = [sys.executable, "-m", "dlm_jax.main", "--workdir", "gs://bucket/run"]
    command += ["--config", "configs/smoke.py", "--mode", mode]
    kinds = {"capture_output": True, "encoding": "utf-8", "timeout": 120}
    done = subprocess.run(command, **kinds)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --mode {mode} needs a local folder")


def _no_room():
    """No file may grow over 4 kB: what a full disk looks like, without one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


HARMS = {
    "no room": (lambda run: _no_room(), "File too large", 2),
    "the folder is gone": (lambda run: shutil.rmtree(run), "No such file", None),
    "a file in its place": (
        lambda run: (shutil.rmtree(run), run.write_text("", encoding="utf-8")),
        "Not a directory|No such file",  # met by the metrics or by the save
        None,
    ),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_disk_that_fails_ends_the_run_in_one_line(name, texts, tmp_path, monkeypatch):
    """The last good checkpoint is named, and stays."""
    harm, says, left = HARMS[name]

    class Harmed(Trainer):
        def batch(self, step):
            if step == 3:
                wait_until(lambda: checkpoint.all_steps(self.workdir), "a checkpoint")
                harm(self.workdir)
            return super().batch(step)

    monkeypatch.setattr(loop, "Trainer", Harmed)
    try:
        _fails(says, _run, texts, tmp_path / "run")
    finally:
        monkeypatch.undo()
        limits = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if left is not None:
        assert checkpoint.all_steps(tmp_path / "run") == [left]
        _run(texts, tmp_path / "run")
        assert checkpoint.choose_step(tmp_path / "run") == 6


def test_every_flipped_bit_changes_its_sum():
    """Whatever the type; order, sharding and shape of the addition do not matter."""
    rng = np.random.default_rng(0)
    for kind in (np.float32, np.int32, np.float16, np.uint8):
        x = rng.integers(0, 100, (7, 5)).astype(kind)
        before = integrity.state_sums({"x": jax.numpy.asarray(x)})
        raw = bytearray(x.tobytes())
        for bit in rng.choice(8 * len(raw), 40, replace=False):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << (bit % 8)
            y = np.frombuffer(bytes(flipped), kind).reshape(x.shape)
            assert integrity.state_sums({"x": jax.numpy.asarray(y)}) != before
        assert integrity.state_sums({"x": jax.numpy.asarray(x[::-1])}) != before


# --- another config


@pytest.mark.parametrize(
    "change",
    [
        {"optim__lr": 0.5},
        {"model__mlp_dim": 64},
        {"seed": 7},
        {"data__length": 4},  # too short for the texts: the difference is said first
        {"train__total_steps": STEPS + 1},  # the cosine would bend
    ],
)
def test_another_config_is_refused(change, texts, start, tmp_path):
    workdir = shutil.copytree(start, tmp_path / "run")
    before = _digest(workdir)
    ((name, new),) = change.items()
    name = name.replace("__", ".")
    old = _config(texts)
    for part in name.split("."):
        old = old[part]
    line = _fails("was begun with", loop.train, _config(texts, **change), str(workdir))
    assert f"config.{name}={old!r}, not {new!r}" in line
    assert _digest(workdir) == before


def test_intervals_and_sampling_may_change(texts, start):
    record = json.loads((start / "config.json").read_text(encoding="utf-8"))
    changes = {f"train__{n}": 3 for n in ("ckpt_steps", "log_steps", "sample_steps")}
    changed = _config(texts, **changes, sample__n=2, train__valid_steps=1)
    assert checkpoint.flatten(record)["train.ckpt_steps"] == NEVER
    checkpoint.check_config_matches(start, json.loads(changed.to_json_best_effort()))


def test_a_run_of_before_an_option_existed_is_resumed(texts, tmp_path):
    """As long as the option is off."""
    record = json.loads(_config(texts).to_json_best_effort())
    before = record | {
        "loss": {n: v for n, v in record["loss"].items() if n != "conditioning_prob"}
    }
    del before["control"]
    checkpoint.write_run_config(tmp_path, before)
    (checkpoint.folder(tmp_path) / "1").mkdir(parents=True)
    checkpoint.check_config_matches(tmp_path, record)
    record["loss"]["conditioning_prob"] = 0.9
    _fails(
        "config.loss.conditioning_prob=None, not 0.9",
        checkpoint.check_config_matches,
        tmp_path,
        record,
    )


def test_total_steps_grow_only_at_a_constant_rate(texts, tmp_path):
    def check(steps):
        config = _config(texts, optim__decay="constant", train__total_steps=steps)
        record = json.loads(config.to_json_best_effort())
        checkpoint.check_config_matches(tmp_path, record)
        return record

    checkpoint.write_run_config(tmp_path, check(STEPS))
    check(STEPS - 1)  # nothing is saved yet: any config may begin
    (checkpoint.folder(tmp_path) / "1").mkdir(parents=True)
    check(STEPS + 1)
    _fails("total_steps", check, STEPS - 1)
