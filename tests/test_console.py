# SPDX-License-Identifier: Apache-2.0
"""Any text reaches terminals and files: whatever the locale, and on one line."""

import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_jax import console
from dlm_jax.data import annotations
from dlm_jax.errors import UserError
from dlm_jax.evaluation import control_targets, report
from dlm_jax.runtime.logging import Progress
from dlm_jax.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
ENCODINGS = ("ascii", "latin-1", "cp1252", "utf-8", "utf-16")
SEPARATORS = ("\n", "\r", "\r\n", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c")


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=40, derandomize=True, deadline=None)
@given(line=st.text(st.characters()))  # lone surrogates, too
def test_standard_output_takes_any_line(encoding, line):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        console.say(line)
    written = out.buffer.getvalue().decode(encoding)
    if encoding.startswith("utf") and line.isprintable():
        assert written == f"{line}\n"
    if line.isascii():
        assert written == f"{line}\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_reader_that_ends_does_not_end_the_run(terminal, tmp_path, monkeypatch):
    """`dlm ... | head` ended a training, and an evaluation before it wrote its file."""
    reader, writer = os.pipe()
    os.close(reader)
    with io.FileIO(writer, "w") as raw:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, write_through=True))
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        progress = Progress(tmp_path / "metrics.jsonl", total=2, start=0)
        for step in (1, 2):
            progress.record(step, {"loss": 1.0}, kind="train")
        progress.close()
        monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_text("utf-8").count("\n") == 2


@pytest.mark.parametrize("disable", [None, False, True])
def test_streams_may_be_closed(disable, tmp_path, monkeypatch):
    """As those of a daemon, which Python shows as None."""
    with monkeypatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, None)
        progress = Progress(tmp_path / "metrics.jsonl", total=1, start=0)
        progress.record(1, {"loss": 1.0}, kind="train")
        progress.close()
        assert list(console.Bar([1, 2], disable=disable)) == [1, 2]
        console.say("the end")
    assert (tmp_path / "metrics.jsonl").read_text("utf-8").count("\n") == 1


PIPED = """
from dlm_jax import console, main
def talk(*args):
    console.say("ready")
    for _ in range(100):
        console.say("x" * 10_000)
main.MODES = dict.fromkeys(main.MODES, talk)
main.command()
"""


def test_the_command_ends_in_order_if_nobody_reads_on():
    command = [sys.executable, "-c", PIPED, "--workdir=nowhere", "--config=smoke"]
    kinds = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **kinds) as process:
        assert process.stdout.readline() == b"ready\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("separator", SEPARATORS)
def test_samples_are_a_line_each_and_read_back(separator, tmp_path):
    """Empty ones, too; only line breaks are changed."""
    texts = [
        f"one{separator}two",
        "",
        "the 龍 🦜",
        "",
        f"a {separator} b {separator} c",
    ]
    layout = types.SimpleNamespace(whole=lambda parts: parts)
    state = types.SimpleNamespace(ema=None, schedule_state=None)
    job = types.SimpleNamespace(preview=lambda *parts: texts)
    run = {"job": job, "corpus": None, "layout": layout, "state": state, "host": 0}
    stub = types.SimpleNamespace(**run, workdir=tmp_path)
    progress = Progress(tmp_path / "metrics.jsonl", total=2, start=0)
    Trainer.show_preview(stub, progress, 1)
    read = report.read_samples(str(tmp_path / "samples" / "1.txt"))
    assert len(read) == len(texts)
    if not {*separator} & {"\n", "\r"}:
        assert read == texts
    assert read[1:4] == texts[1:4]


def test_a_file_of_samples_has_its_marks_and_forms_removed(tmp_path):
    path = tmp_path / "texts"
    path.write_text(
        "\ufeffcafe\u0301\n\na\u2028b\r\nc\rd\n", encoding="utf-8", newline=""
    )
    assert report.read_samples(str(path)) == ["caf\u00e9", "", "a\u2028b", "c", "d"]
    path.write_bytes(b"fine\n\xff\n")
    with pytest.raises(UserError, match=r"evaluate\.texts=.*line 2 is not UTF-8"):
        report.read_samples(str(path))
    with pytest.raises(UserError, match=r"evaluate\.texts=nowhere"):
        report.read_samples("nowhere")


def test_targets_and_treebanks_are_read_likewise(tmp_path):
    rows = [
        ["name : Cafe\u0301\u2028x"],
        {"words_": ["START", "cafe\u0301", "a\u2028b"], "pos": ["X", "NOUN", "X"]},
    ]
    for escaped in (False, True):
        lines = [json.dumps(row, ensure_ascii=escaped) for row in rows]
        path = tmp_path / "target_pos.json"
        path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
        field, words = control_targets.load_published(tmp_path, "pos")
        assert field.fields == {"name": "Caf\u00e9\u2028x"}
        assert words.text.endswith("caf\u00e9 a\u2028b")
    word = "\t".join(["1", "cafe\u0301\u2028", "_", "NOUN", *"______"])
    path = tmp_path / "a.conllu"
    path.write_text(f"\ufeff{word}\n\n", encoding="utf-8")
    assert annotations.read_conllu(path) == [[("caf\u00e9\u2028", "NOUN")]]


PROGRAM = r"""
import json, sys
from pathlib import Path
from dlm_jax.configs import smoke
from dlm_jax.data import corpus, prepare
from dlm_jax.runtime import checkpoint
from dlm_jax.runtime.logging import Progress
folder = Path(sys.argv[1])
config = smoke.get_config()
config.data.update(source="text", path=str(folder / "t.txt"), min_count=0)
prepare.prepare_data(config, str(folder / "p"))
config.data.update(source="prepared", path=str(folder / "p"))
read = corpus.load_corpus(config)
progress = Progress(folder / "metrics.jsonl", total=2, start=0)
for line in [*read.read, *read.tokenizer.tokens()]:
    progress.say(line)
checkpoint.write_json(folder / "r.json", {"words": read.tokenizer.tokens()})
checkpoint.write_run_config(folder, json.loads(config.to_json_best_effort()))
assert "\U0001f99c" in json.loads((folder / "r.json").read_text("utf-8"))["words"]
"""
LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII output": {"PYTHONIOENCODING": "ascii", "LC_ALL": "C.UTF-8"},
}


@pytest.mark.parametrize("name", ["t", "ü"])
@pytest.mark.parametrize("locale", LOCALES)
def test_a_hostile_locale_changes_nothing(locale, name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "t.txt").write_text("the 🦜 sees 龍\n" * 40, encoding="utf-8")
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("LC_", "PYTHONUTF8"))
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env=env | LOCALES[locale],
        cwd=ROOT,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    assert rb"\U0001f99c" in done.stdout
    manifest = (folder / "p" / "data.json").read_text(encoding="utf-8")
    assert "🦜" in manifest


def test_a_place_where_no_file_can_be_made_is_named_before_the_work(tmp_path):
    (tmp_path / "out.txt").write_text("old", encoding="utf-8")
    for name, says in (
        ("out.txt", "exists: remove it"),
        ("nowhere/out.txt", "nowhere is no folder"),
        ("out.txt/new.txt", "out.txt is no folder"),
    ):
        for call in (console.check_new, lambda path: console.write_lines(["a"], path)):
            with pytest.raises(UserError, match=says):
                call(str(tmp_path / name))
    console.write_lines(["a\nb", ""], str(tmp_path / "new.txt"))
    assert (tmp_path / "new.txt").read_text("utf-8") == "a\\nb\n\n"
