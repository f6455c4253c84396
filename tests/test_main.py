# SPDX-License-Identifier: Apache-2.0
"""The command: a user's mistake is one line on stderr and a status that is not 0."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dlm_jax import main
from dlm_jax.configs import classifier, default, e2e, e2e_small, grammar, smoke, stories
from dlm_jax.errors import UserError
from dlm_jax.runtime import hosts
from dlm_jax.training import loop
from dlm_jax.training.config import resolve_config

ROOT = Path(__file__).parent.parent
SMOKE = ("--config", "configs/smoke.py")
# name: (flags, what the line says, environment); {} is an empty folder
COMMANDS = {
    "no workdir": ((*SMOKE,), "--workdir", {}),
    "no config": (("--workdir", "{}/run"), "--config", {}),
    "no such config": (
        ("--config", "configs/none.py", "--workdir", "{}/run"),
        "configs/none.py",
        {},
    ),
    "no such variant": (
        ("--config", "configs/smoke.py:large", "--workdir", "{}/run"),
        "large",
        {},
    ),
    "misspelt key": (
        (*SMOKE, "--workdir", "{}/run", "--config.optim.warmpu=3"),
        "no key 'warmpu' Did you mean \"warmup\"",
        {},
    ),
    "unknown key": (
        (*SMOKE, "--workdir", "{}/run", "--config.model.colour=3"),
        "no key 'colour'",
        {},
    ),
    "wrong type": (
        (*SMOKE, "--workdir", "{}/run", "--config.train.batch=many"),
        "many",
        {},
    ),
    "no such file": (
        (
            *(*SMOKE, "--workdir", "{}/run", "--config.data.source=text"),
            "--config.data.path={}/no.txt",
        ),
        "/no.txt does not exist",
        {},
    ),
    "another tokenizer's option": (
        (*SMOKE, "--workdir", "{}/run", "--config.data.vocab_size=2000"),
        "vocab_size=2000 has no effect with config.data.tokenizer=word: leave it out",
        {},
    ),
    "another source's option": (
        (
            *(*SMOKE, "--mode", "prepare_data", "--workdir", "{}/run"),
            *("--config.data.source=text", "--config.data.size=3"),
        ),
        "size=3 has no effect with config.data.source=text: leave it out",
        {},
    ),
    "batch and devices": (
        (*SMOKE, "--workdir", "{}/run"),
        "config.train.batch=16 is not a multiple of 3",
        {"JAX_NUM_CPU_DEVICES": "3"},
    ),
    "nothing to sample": (
        ("--mode", "sample", "--workdir", "{}/run"),
        "no checkpoint",
        {},
    ),
    "classifier of no model": (
        (
            *("--mode", "train_classifier", "--config", "configs/classifier.py:pos"),
            *("--workdir", "{}/run"),
        ),
        "config.classifier.model: name the run",
        {},
    ),
    "nothing to control": (
        ("--mode", "control", *SMOKE, "--workdir", "{}/run"),
        "no checkpoint",
        {},
    ),
    "bundled model": (
        ("--mode", "plot", "--workdir", "grammar"),
        "--mode plot writes into --workdir, and grammar is a bundled model: save it first",
        {},
    ),
    "no coordinator": (
        (*SMOKE, "--workdir", "{}/run", "--num_processes", "2"),
        "--coordinator",
        {},
    ),
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """Every command's end and folder; two at a time."""
    tmp_path_factory.getbasetemp()  # two threads may not make it at once

    def run(item):
        name, (flags, _, env) = item
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        flags = [flag.replace("{}", str(folder)) for flag in flags]
        command = [sys.executable, "-m", "dlm_jax.main", *flags]
        env = os.environ | env
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=env,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )
        return name, (done, folder)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(run, COMMANDS.items()))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_is_one_line(name, endings):
    done, folder = endings[name]
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert COMMANDS[name][1] in lines[0]
    assert not done.stdout
    assert not list(folder.iterdir())  # nothing is begun


# --- the same, in this process: what the data and the config may do wrong


def _train(tmp_path, content=None, **changes):
    config = smoke.get_config()
    if content is not None:
        (tmp_path / "texts.txt").write_bytes(content)
        config.data.update(source="text", path=str(tmp_path / "texts.txt"))
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict(dotted)
    loop.train(config, str(tmp_path / "run"))


MISTAKES = {
    "empty file": (b"", {}, "holds no text"),
    "not UTF-8": (b"good\nb\xff\xfed\n" * 9, {}, "line 2 is not UTF-8"),
    "too long": (b"one two three\n" * 9, {"data__length": 4}, "set length=5"),
    "source": (None, {"data__source": "web"}, "data.source='web': choose one of"),
    "objective": (None, {"loss__objective": "l1"}, "loss.objective='l1': choose"),
    "times": (None, {"loss__time_sampler": "all"}, "loss.time_sampler='all': choose"),
    "trunk": (None, {"model__trunk": "unet"}, "model.trunk='unet': choose"),
    "decay": (None, {"optim__decay": "none"}, "optim.decay='none': did you mean"),
    "optimiser": (None, {"optim__name": "sgd"}, "optim.name='sgd': choose"),
    "schedule": (None, {"schedule__name": "flat"}, "schedule.name='flat': choose"),
    "heads": (None, {"model__heads": 3}, "heads=3 does not divide"),
    "positions": (None, {"model__positions": 8}, "positions=8"),
    "importance": (
        None,
        {"loss__time_sampler": "importance"},
        "schedule.num_steps > 0",
    ),
    "feedback": (None, {"model__self_cond": False}, "self_cond"),
    "batch": (None, {"train__batch": 0}, "train.batch=0"),
    "logging": (None, {"train__log_steps": 0}, "train.log_steps=0"),
    "keep": (None, {"train__keep": 0}, "train.keep=0"),
    "microbatches": (None, {"optim__accumulate": 3}, "batch=16 is not a multiple"),
    "no microbatch": (None, {"optim__accumulate": 0}, "optim.accumulate=0"),
    "grammar's seed": (None, {"data__seed": -1}, "data.seed=-1: must be 0 or more"),
    "odd heads": (None, {"model__hidden_dim": 30}, "model.hidden_dim=30: rotary"),
    "dropout": (None, {"model__dropout": 1.0}, "model.dropout=1.0: must be below 1"),
    "share": (
        None,
        {"loss__self_cond_prob": 1.5},
        "self_cond_prob=1.5: must be at most 1",
    ),
    "rate": (None, {"optim__lr": -1.0}, "optim.lr=-1.0: must be 0 or more"),
    "interval": (None, {"train__ckpt_steps": -1}, "train.ckpt_steps=-1"),
    "table": (None, {"embedding__path": "no.npy"}, "embedding.path=no.npy"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_setting_is_named(name, tmp_path):
    content, changes, says = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        _train(tmp_path, content, **changes)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


TABLES = {
    "empty": lambda file: None,
    "archive": lambda file: np.savez(file, table=np.ones((3, 2))),
    "words": lambda file: np.save(file, np.array([["a", "b"]])),
    "complex": lambda file: np.save(file, np.ones((3, 2), complex)),
    "not finite": lambda file: np.save(file, np.full((3, 2), np.nan)),
    "shape": lambda file: np.save(file, np.ones((3, 2))),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_wrong_table_is_named(name, tmp_path):
    with (tmp_path / "table.npy").open("wb") as file:
        TABLES[name](file)
    with pytest.raises(UserError, match=r"embedding\.path=.*table\.npy"):
        _train(tmp_path, embedding__path=str(tmp_path / "table.npy"))
    assert not (tmp_path / "run").exists()


def test_notes_of_the_libraries_stay_silent():
    """Warnings show; JAX's notes on absent accelerators only where asked for."""
    for flags, verbosity in (([], -1), (["--verbosity=1"], 1)):
        main.parse_flags(["main", "--workdir=x", *flags])
        assert main.FLAGS.verbosity == verbosity
        main.FLAGS.unparse_flags()
        main.FLAGS["verbosity"].using_default_value = True


@pytest.mark.parametrize(
    ("coordinator", "processes", "process"), [("", 2, 0), ("localhost:1", 2, 2)]
)
def test_hosts_are_checked(coordinator, processes, process):
    with pytest.raises(UserError, match="--coordinator"):
        hosts.initialize(coordinator, processes, process)


SMALL = ("modern", "faithful", "autoregressive")
VARIANTS = {
    default: ((),),
    smoke: ((),),
    e2e: [(v,) for v in ("pad", "block", "modern", "autoregressive")],
    classifier: [(v,) for v in classifier.TASKS],
    **{module: [(v,) for v in SMALL] for module in (grammar, e2e_small, stories)},
}


@pytest.mark.parametrize(
    ("module", "variant"), [(m, v) for m, found in VARIANTS.items() for v in found]
)
def test_every_shipped_config_describes_a_run(module, variant):
    config = module.get_config(*variant)
    step_cfg = resolve_config(config)
    assert step_cfg.cfg.causal == (variant == ("autoregressive",))
    assert config.data.length <= config.model.positions
    if variant:
        with pytest.raises(ValueError, match="choose one of"):
            module.get_config("wrong")


SETTINGS = {
    "GLIBC_TUNABLES": main.MALLOC,
    "JAX_COMPILATION_CACHE_DIR": "/home/user/.cache/dlm_jax/[0-9a-f]{8}",
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**31),
}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("theirs", [None, "", "glibc.malloc.check=0"])
def test_the_command_has_its_environment_unless_told_otherwise(name, theirs):
    """A config file tells the environment that the command sees it in."""
    env = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    env |= {"HOME": "/home/user"} | ({} if theirs is None else {name: theirs})
    done = subprocess.run(
        [sys.executable, "-m", "dlm_jax.main", "--config", "/dev/stdin", "--workdir=x"],
        input=f"import os\ndef get_config(): raise OSError('<%s>' % os.environ['{name}'])",
        capture_output=True,
        encoding="utf-8",
        env=env,
        timeout=120,
    )
    found = SETTINGS[name] if theirs is None else theirs
    assert done.returncode == 2
    assert re.search(f": <{found}>$", done.stderr.strip()), done.stderr
