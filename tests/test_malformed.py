# SPDX-License-Identifier: Apache-2.0
"""Malformed input of every kind: one clear line, status 2, and no file is touched."""

import base64
import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlm_jax.configs import smoke
from dlm_jax.data import array_record, sources, tokenizer
from dlm_jax.errors import UserError
from dlm_jax.runtime import checkpoint
from dlm_jax.training.trainer import Trainer, language_job

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TRAIN = ("--config", "configs/smoke.py", "--workdir", "{}/run")


def _config(*changes):
    return (*TRAIN, *(f"--config.{change}" for change in changes))


# name: flags, of values that cannot be
VALUES = {
    name: _config(*name.split())
    for name in (
        "train.batch=0",
        "train.total_steps=0",
        "train.ckpt_steps=-1",
        "train.keep=0",
        "train.log_steps=0",
        "train.valid_batches=0",
        "train.on_nonfinite=pray",
        "parallel.mode=magic",
        "model.layers=0",
        "model.hidden_dim=-8",
        "model.heads=3",
        "model.heads=7",
        "model.dim=0",
        "model.dropout=1.0",
        "model.trunk=lstm",
        "model.predicts=words",
        "model.dtype=float8",
        "model.positions=4",
        "data.length=1",
        "data.mode=stack",
        "data.too_long=hope",
        "data.source=web",
        "data.tokenizer=bytes",
        "data.valid_size=0",
        "data.seed=-1",
        "optim.name=sgdd",
        "optim.decay=never",
        "optim.lr=-1.0",
        "optim.b2=1.0",
        "optim.ema=1.5",
        "optim.accumulate=0",
        "optim.accumulate=3",
        "loss.objective=vibes",
        "loss.time_sampler=never",
        "loss.time_sampler=importance",
        "loss.conditioning_prob=2.0",
        "schedule.name=spiral",
        "schedule.num_steps=-5",
        "schedule.adaptive=yes",
        "sample.solver=euler",
        "sample.num_steps=0",
        "sample.solver=ddim sample.eta=2.0",
        "sample.rounding=up",
        "embedding.path={}/none.npy",
        "train.batch=many",
        "model.colour=3",
        "data=3",
    )
}
FLAGS = {
    "no flags": (),
    "no workdir": ("--config", "configs/smoke.py"),
    "no config": ("--workdir", "{}/run"),
    "an unknown flag": (*TRAIN, "--fast"),
    "a word": (*TRAIN, "please"),
    "an unknown mode": (*TRAIN, "--mode", "pray"),
    "no such step": ("--workdir", "{}/run", "--mode", "sample", "--step", "7"),
    "a step that is no number": (*TRAIN, "--step", "last"),
    "a config of another language": ("--config", "{}/c.yaml", "--workdir", "{}/run"),
    "a config that is no Python": ("--config", "{}/c.py", "--workdir", "{}/run"),
    "a config without get_config": ("--config", "{}/e.py", "--workdir", "{}/run"),
    "a host beyond the number": (*TRAIN, "--num_processes", "2", "--process_id", "2"),
    "no hosts": (*TRAIN, "--num_processes", "0", "--coordinator", "localhost:1"),
    "a workdir in a file": ("--config", "configs/smoke.py", "--workdir", "{}/file/run"),
    "prepared in no known way": (
        *("--config", "configs/smoke.py", "--workdir", "{}/run"),
        *("--mode", "prepare_data", "--config.data.too_long=hope"),
    ),
    "prepared already": (
        *("--config", "configs/smoke.py", "--workdir", "{}/prepared"),
        *("--mode", "prepare_data"),
    ),
}
# name: (source, what the file holds)
FILES = {
    "empty": ("text", b""),
    "blank": ("text", b"\n \n\t\n"),
    "not UTF-8": ("text", b"fine\n\xff\xfe\n"),
    "words that are all rare": ("text", b"a b c\nd e f\n"),
    "one line": ("text", b"only one line is here\n"),
    "too long a line": ("text", b"w " * 500 + b"\n" + b"w w\n" * 50),
    "E2E without bars": ("e2e", b"name : x\n"),
    "CSV without its column": ("csv", b"a,b\n1,2\n"),
    "CSV of nothing": ("csv", b""),
    "CSV with an open quote": ("csv", b'text\n"' + b"x" * 200_000),
    "CSV of one wide cell": ("csv", b"x" * 200_000 + b"\n1\n"),
    "JSON cut short": ("jsonl", b'{"text": "a'),
    "JSON of a list": ("jsonl", b'["a"]\n'),
    "JSON of a number": ("jsonl", b'{"text": 3}\n'),
    "JSON of nothing": ("jsonl", b'{"text": null}\n'),
    "JSON of endless depth": ("jsonl", b"[" * 100_000 + b"\n"),
}
TABLES = {
    "a table of pickles": lambda path: np.save(path, np.array([{}], object)),
    "a table of words": lambda path: np.save(path, np.array(["a"])),
    "a table of another shape": lambda path: np.save(path, np.ones((2, 2))),
    "a table of NaN": lambda path: np.save(path, np.full((8, 16), np.nan)),
    "a table cut short": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"),
    "a pickle for a table": lambda path: path.write_bytes(pickle.dumps([1])),
}


def _json(name, change):
    """A harm to one of the run's JSON files."""

    def harm(run):
        path = run / name
        path.write_text(
            json.dumps(change(json.loads(path.read_text(encoding="utf-8")))),
            encoding="utf-8",
        )

    return harm


def _bytes(name, raw):
    return lambda run: (run / name).write_bytes(raw)


def _saved(part, change):
    """A harm to a saved record by one who knows how its checksum is made."""

    def harm(run):
        path, sums = (run / STEP / name / "metadata" for name in (part, "sums"))
        record = change(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(record), encoding="utf-8")
        text = json.dumps(record, sort_keys=True)
        kept = json.loads(sums.read_text(encoding="utf-8"))
        sums.write_text(
            json.dumps(kept | {part: zlib.crc32(text.encode())}), encoding="utf-8"
        )
        if part == "config":
            (run / "config.json").write_text(json.dumps(record), encoding="utf-8")

    return harm


def _model(**change):
    return _saved("config", lambda c: c | {"model": c["model"] | change})


def _link(run):
    target = run / STEP / "state" / "_METADATA"
    target.rename(run / "elsewhere")
    target.symlink_to(run / "elsewhere")


STEP = "checkpoints/1"
RUNS = {
    "config.json cut short": _bytes("config.json", b'{"train": '),
    "config.json of a list": _bytes("config.json", b"[]"),
    "config.json of endless depth": _bytes("config.json", b"[" * 100_000),
    "config.json not UTF-8": _bytes("config.json", b"\xff\xfe{}"),
    "no config.json": lambda run: (run / "config.json").unlink(),
    "config.json of another run": _json("config.json", lambda c: c | {"seed": 99}),
    "an empty step": lambda run: (
        shutil.rmtree(run / STEP),
        (run / STEP).mkdir(),
    ),
    "a step of bytes": lambda run: (
        shutil.rmtree(run / STEP),
        (run / STEP).write_bytes(b"\0" * 99),
    ),
    "tokenizer of another kind": _saved("tokenizer", lambda t: t | {"kind": "runes"}),
    "tokenizer of a list": _saved("tokenizer", lambda t: [1]),
    "rollbacks of a number": _saved("run", lambda r: r | {"skipped_batches": 5}),
    "a record with a flipped bit": _json(
        f"{STEP}/tokenizer/metadata", lambda t: t | {"kind": "runes"}
    ),
    "sums of nothing": _bytes(f"{STEP}/sums/metadata", b"{}"),
    "sums of a list": _bytes(f"{STEP}/sums/metadata", b"[]"),
    "a link": _link,
    "no state": lambda run: shutil.rmtree(run / STEP / "state"),
    "state of bytes": _bytes(f"{STEP}/state/_METADATA", b"\0\1\2"),
}
STRANGERS = {  # sampled from, so that the saved config is what counts
    "saved config of a larger network": _model(hidden_dim=64),
    "saved config without heads": _model(heads=0),
    "saved config of endless layers": _model(layers=10**9),
    "saved config of words": _model(hidden_dim="wide"),
    "saved config of an unknown knob": _model(colour="red"),
    "saved config of endless steps": _saved(
        "config", lambda c: c | {"schedule": c["schedule"] | {"num_steps": 10**11}}
    ),
    "saved config without a schedule": _saved(
        "config", lambda c: {"model": c["model"]}
    ),
}
PREPARED = {
    "manifest of a list": b"[]",
    "manifest cut short": b'{"rows"',
    "manifest with a path": json.dumps(
        {"rows": {"train": 9, "valid": 9, "../../x": 1}, "length": 32, "mode": "pad"}
    ).encode(),
    "manifest without text": b"{}",
    "manifest of endless rows": json.dumps(
        {"rows": {"train": 10**15, "valid": 9}, "length": 32, "mode": "pad", "crc": 1}
        | {"dtype": "uint16", "tokenizer": {}}
    ).encode(),
    "manifest of endless depth": b"[" * 100_000,
}
# the driver: a process that has imported all, and forks for each case
PROGRAM = """
import json, os, signal, sys
from dlm_jax import main
from dlm_jax.data import prepare
from dlm_jax.evaluation import control, report
from dlm_jax.runtime import hosts
from dlm_jax.training import loop
results = {}
for name, flags, out in json.load(sys.stdin):
    child = os.fork()
    if not child:
        signal.alarm(100)
        for number in (1, 2):
            os.dup2(os.open(f"{out}.{number}", os.O_CREAT | os.O_WRONLY), number)
        sys.argv = ["dlm_jax.main", *flags]
        main.cli()
        os._exit(0)
    results[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(results))
"""


def _digest(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.parent.name != "__pycache__"  # of configs, by Python 3.13
    }


def _cases(folder, run):
    """(name, flags, the case's folder) of all cases, their files made."""
    for name, flags in {**VALUES, **FLAGS}.items():
        here = folder / str(len(list(folder.iterdir())))
        here.mkdir()
        (here / "c.yaml").write_text("a: 3\n", encoding="utf-8")
        (here / "c.py").write_text("def get_config(:\n", encoding="utf-8")
        (here / "e.py").write_text("x = 3\n", encoding="utf-8")
        (here / "file").write_text("", encoding="utf-8")
        (here / "prepared").mkdir()
        (here / "prepared" / "data.json").write_text("{}", encoding="utf-8")
        yield name, flags, here
    for name, (source, raw) in FILES.items():
        here = folder / str(len(list(folder.iterdir())))
        here.mkdir()
        (here / "data").write_bytes(raw)
        changes = (f"data.source={source}", "data.path={}/data", "data.min_count=3")
        yield name, _config(*changes), here
    for name, write in TABLES.items():
        here = folder / str(len(list(folder.iterdir())))
        here.mkdir()
        write(here / "table.npy")
        yield name, _config("embedding.path={}/table.npy"), here
    for name, raw in PREPARED.items():
        here = folder / str(len(list(folder.iterdir())))
        (here / "p").mkdir(parents=True)
        (here / "p" / "data.json").write_bytes(raw)
        yield name, _config("data.source=prepared", "data.path={}/p"), here
    for name, harm in RUNS.items():
        here = folder / str(len(list(folder.iterdir())))
        here.mkdir()
        shutil.copytree(run, here / "run")
        harm(here / "run")
        yield name, _config("train.total_steps=2"), here
    for name, harm in STRANGERS.items():
        here = folder / str(len(list(folder.iterdir())))
        here.mkdir()
        shutil.copytree(run, here / "run")
        harm(here / "run")
        yield name, ("--workdir", "{}/run", "--mode", "sample"), here


NAMES = [*VALUES, *FLAGS, *FILES, *TABLES, *PREPARED, *RUNS, *STRANGERS]
# what the line must say, where another mistake might speak first
SAYS = {
    "one line": "1 texts",
    "CSV of nothing": "column|empty|no text|no line",
    "tokenizer of another kind": "runes",
    "a link": "is a link",
    "sums of a list": "not a JSON object",
    "rollbacks of a number": "rollbacks",
    "a record with a flipped bit": "checksum",
    "saved config without heads": "heads|zero|divi",
    "saved config of endless layers": "layers",
    "saved config of an unknown knob": "colour",
    "saved config of endless steps": "num_steps",
    "manifest of endless rows": "counts",
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """{name: (status, stderr, files before, files after)}."""
    base = tmp_path_factory.mktemp("malformed")
    config = smoke.get_config()
    config.train.total_steps = 2
    run = Trainer(language_job(config), str(base / "run"))
    run.state = run.state._replace(step=run.state.step + 1)
    writer = checkpoint.manager(base / "run", keep=2)
    run.save(writer)
    writer.close()
    (base / "cases").mkdir()
    cases, before, outs = [], {}, {}
    for name, flags, here in _cases(base / "cases", base / "run"):
        before[name], outs[name] = _digest(here), base / f"out_{len(cases)}"
        flags = [flag.replace("{}", str(here)) for flag in flags]
        cases.append((name, flags, str(outs[name])))
        outs[name] = (outs[name], here)
    command = [sys.executable, "-c", PROGRAM]
    kinds = {"capture_output": True, "encoding": "utf-8", "cwd": ROOT, "timeout": 900}
    done = subprocess.run(command, input=json.dumps(cases), **kinds)
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout)
    return {
        name: (
            statuses[name],
            Path(f"{out}.2").read_text(encoding="utf-8"),
            before[name],
            _digest(here),
        )
        for name, (out, here) in outs.items()
    }


def test_they_are_many():
    assert len(NAMES) == len(set(NAMES)) >= 60


@pytest.mark.parametrize("name", NAMES)
def test_it_ends_in_one_line(name, endings):
    status, stderr, before, after = endings[name]
    assert status == 2, stderr[-2000:]
    assert re.search(SAYS.get(name, ""), stderr), stderr
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr[-2000:]
    assert lines[0].startswith("error: ")
    assert 10 < len(lines[0]) < 600
    assert after == before


# --- whatever hypothesis thinks of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner)
    ),
    max_leaves=8,
)
MANY = settings(
    max_examples=60,
    derandomize=True,  # the same in every run; explore with another number
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _works_or_says(call, *args):
    """No other error than one line for the user."""
    said = ""
    try:
        call(*args)
    except UserError as error:
        said = str(error)
    assert "\n" not in said


@MANY
@given(
    raw=st.binary(max_size=200), source=st.sampled_from(["text", "e2e", "csv", "jsonl"])
)
def test_any_bytes_for_a_text(raw, source, tmp_path):
    config = smoke.get_config().data
    config.update(source=source, path=str(tmp_path / "data"))
    (tmp_path / "data").write_bytes(raw)
    _works_or_says(sources.load_texts, config, "train")


@MANY
@given(
    record=JSON
    | st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["word", "sentencepiece"]),
            "words": JSON,
            "model": JSON | st.binary().map(lambda b: base64.b64encode(b).decode()),
        }
    )
)
def test_any_record_for_a_tokenizer(record):
    _works_or_says(tokenizer.from_dict, record)


@MANY
@given(record=JSON, rows=JSON, length=JSON)
def test_any_manifest(record, rows, length, tmp_path):
    for manifest in (
        record,
        {
            "rows": rows,
            "length": length,
            "crc": 1,
            "dtype": "uint16",
            "mode": "pad",
            "tokenizer": {},
        },
    ):
        (tmp_path / "data.json").write_text(json.dumps(manifest), encoding="utf-8")
        _works_or_says(array_record.load_prepared, str(tmp_path))


@MANY
@given(raw=st.binary(max_size=80) | JSON.map(lambda r: json.dumps(r).encode()))
def test_any_bytes_for_the_config_of_a_run(raw, tmp_path):
    (tmp_path / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
    (tmp_path / "config.json").write_bytes(raw)
    record = json.loads(smoke.get_config().to_json_best_effort())
    _works_or_says(checkpoint.check_config_matches, tmp_path, record)


@MANY
@given(template=st.text(max_size=60))
def test_any_template(template):

    tok = tokenizer.WordTokenizer(("a", "b"))
    from dlm_jax.inference import constraints

    _works_or_says(constraints.parse_template, tok, template, "word")
