# SPDX-License-Identifier: Apache-2.0
"""A library call leaves the process as it was, in any thread, also when it fails."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from test_checkpoint import ROOT, _config, _saved, _truncate, texts

import dlm_jax
from dlm_jax.errors import UserError
from dlm_jax.runtime import checkpoint
from dlm_jax.training import loop

__all__ = ["texts"]  # a fixture
THREADS = 4


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    """A run directory with steps 0 and 1."""
    workdir = tmp_path_factory.mktemp("start") / "run"
    _saved(texts, workdir, (0, 1), train__total_steps=2, optim__decay="constant")
    return workdir


@pytest.fixture(scope="module")
def damaged(run, tmp_path_factory):
    """The same with damaged arrays in its newest step."""
    workdir = shutil.copytree(run, tmp_path_factory.mktemp("damaged") / "run")
    for path in (checkpoint.folder(workdir) / "1" / "state").rglob("d/*"):
        if path.is_file():
            _truncate(path)
    return workdir


def _process():
    """What belongs to the process and not to a library."""
    names = (None, "absl", "asyncio", "jax", "orbax", "tensorflow")
    loggers = [logging.getLogger(name) for name in names]
    settings = ("jax_enable_x64", "jax_numpy_dtype_promotion", "jax_platforms")
    return {
        "streams": [sys.stdin, sys.stdout, sys.stderr],
        "hooks": [sys.excepthook, sys.unraisablehook, sys.displayhook],
        "thread hooks": [threading.excepthook, sys.gettrace(), sys.getprofile()],
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "signals": {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)},
        "logging": [(x.level, x.disabled, list(x.handlers)) for x in loggers],
        "disabled": logging.root.manager.disable,
        "warnings": list(warnings.filters),
        "numbers": np.geterr(),
        "recursion": sys.getrecursionlimit(),
        "jax": {name: getattr(jax.config, name) for name in settings},
    }


def _fails(call, *args, **options):
    with pytest.raises(UserError):
        call(*args, **options)


CALLS = {
    "load": lambda run, damaged: dlm_jax.load(run),
    "sample": lambda run, damaged: dlm_jax.load(run).sample(2, seed=0),
    "load of damage": lambda run, damaged: _fails(dlm_jax.load, damaged),
    "load of nothing": lambda run, damaged: _fails(dlm_jax.load, run.parent),
    "bad options": lambda run, damaged: _fails(dlm_jax.load(run).sample, 0),
}


@pytest.mark.parametrize("threads", [1, THREADS])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_the_process_as_it_was(name, threads, run, damaged, capfd):
    before, call = _process(), CALLS[name]
    with ThreadPoolExecutor(threads) as pool:
        calls = [pool.submit(call, run, damaged) for _ in range(threads)]
        during = [_process() for _ in range(20)]
        for done in calls:
            done.result()
    assert all(state == before for state in [*during, _process()])
    assert capfd.readouterr().err == ""


def test_training_gives_the_process_back(texts, run, damaged, tmp_path):
    config = _config(texts, train__total_steps=2, optim__decay="constant")
    workdir, before = shutil.copytree(run, tmp_path / "run"), _process()
    loop.train(config, str(workdir))
    _fails(loop.train, config, str(damaged))
    assert _process() == before


FRESH = """
import csv, json, logging, multiprocessing, os, random, signal, sys, threading
import jax
random.seed(0)
def process():
    import numpy as np
    return {
        "logging": [str(handler) for handler in logging.root.handlers],
        "csv": csv.field_size_limit(),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "random": [hash(random.getstate()), np.random.get_state()[1].sum()],
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "jax": {name: str(value) for name, value in jax.config.values.items()},
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(number)) for number in range(1, 32)],
        "path": sys.path[:],
    }
before, calls = process(), {}
import dlm_jax
dlm_jax.load
from dlm_jax.configs import smoke
from dlm_jax.data import corpus
from dlm_jax.training import loop
run, other = sys.argv[1:]
def load():
    global lm
    lm = dlm_jax.load(run)
    assert "orbax" not in sys.modules
def read():
    config = smoke.get_config()
    with open(other + ".csv", "w") as file:
        file.write("text\\n" + "a b c\\n" * 40)
    config.data.update(source="csv", path=other + ".csv")
    corpus.load_corpus(config)
def train():
    config = smoke.get_config()
    config.train.total_steps = 1
    loop.train(config, other)
for call in (
    load,
    lambda: lm.infill("word0 ___ not", n=1, num_steps=1),
    lambda: lm.nll(lm.encode(["word0"]), draws=1),
    read,
    train,
):
    call()
    after = process()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, [(name, before[name], after[name]) for name in changed]
"""


def test_a_fresh_process_is_as_it_was(run, tmp_path):
    """Imports of other packages change things, too, which pytest has imported before."""
    command = [sys.executable, "-c", FRESH, str(run), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]


def test_many_threads_share_a_model(run):
    """Each gets the texts of its seed."""
    lm = dlm_jax.load(run)
    alone = [lm.sample(2, seed=seed) for seed in range(THREADS)]
    shared = dlm_jax.load(run)
    with ThreadPoolExecutor(THREADS) as pool:
        assert alone == list(
            pool.map(lambda s: shared.sample(2, seed=s), range(THREADS))
        )


FORKS = """
import os, sys, warnings
warnings.filterwarnings("ignore", "os.fork")
import dlm_jax
from dlm_jax.inference import loading
run = sys.argv[1]
def child(call):
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        call()
    except dlm_jax.UserError as error:
        print(error, flush=True)
        os._exit(7)
    os._exit(0)
before = child(lambda: dlm_jax.load(run).sample(1, seed=0))
lm = dlm_jax.load(run)
calls = (lambda: lm.sample(1, seed=0), lambda: dlm_jax.load(run),
         lambda: lm.nll(lm.encode(["word0"])))
print(before, [child(call) for call in calls])
"""


@pytest.mark.slow
def test_a_forked_process_says_that_jax_would_hang(run):
    """One that was forked before the first use of JAX works."""
    command = [sys.executable, "-c", FORKS, str(run)]
    kinds = {"capture_output": True, "encoding": "utf-8", "timeout": 400}
    done = subprocess.run(command, cwd=ROOT, **kinds)
    *lines, statuses = done.stdout.splitlines()
    assert statuses == "0 [7, 7, 7]", done.stderr
    assert len(lines) == 3
    assert all("was forked off one in which JAX had started" in line for line in lines)
