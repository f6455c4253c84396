# SPDX-License-Identifier: Apache-2.0
"""The pages: their code runs, their commands parse, and the site builds."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from absl.testing import flagsaver

import dlm_jax
from dlm_jax import main
from dlm_jax.errors import choose
from dlm_jax.inference import pretrained

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^(?: {4,}.*)?\n)+", re.MULTILINE)
INLINE = re.compile(r"`(dlm --[^`]+)`")


def python_blocks(text):
    """The python blocks of a page."""
    return [code for name, code in FENCE.findall(text) if name == "python"]


def commands(text):
    """The arguments of every `dlm` command of a page, its shell variables filled in."""
    blocks = [code for name, code in FENCE.findall(text) if name in ("bash", "")]
    blocks += INDENTED.findall(FENCE.sub("", text))
    for block in [*blocks, *INLINE.findall(FENCE.sub("", text))]:
        variables = {}
        for line in block.replace("\\\n", " ").splitlines():
            if loop := re.match(r" *for (\w+) in (\w+)", line):
                variables[loop[1]] = loop[2]
            elif not re.search(r"\bdlm\b|^ *[A-Z][A-Z0-9]*=", line):
                continue
            words = shlex.split(_fill(line, variables), comments=True)
            for word in words:
                name, equals, value = word.partition("=")
                if not (equals and name.isidentifier()):
                    break
                variables[name] = value
            if "dlm" in words:
                yield words[words.index("dlm") + 1 :]


def _fill(line, variables):
    for name, value in variables.items():
        line = re.sub(rf"\${name}\b", lambda _, value=value: value, line)
    return line


def parse(arguments):
    """Parses a command as `dlm` does, up to its work."""
    if main._asked_for_lines(arguments):
        return
    argv = ["dlm", *arguments]
    with flagsaver.flagsaver(), mock.patch.object(sys, "argv", argv):
        main.FLAGS.unparse_flags()
        assert main.parse_flags(argv)[1:] == [], arguments
        choose("--mode", main.MODES, main.FLAGS.mode)
        main._check_flags()
        assert main.FLAGS.workdir, arguments
        trains = ("train", "train_classifier", "distill", "prepare_data")
        assert main.FLAGS.config or main.FLAGS.mode not in trains, arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_of_a_page_parse(page):
    for arguments in commands(page.read_text(encoding="utf-8")):
        try:
            parse(arguments)
        except SystemExit:
            pytest.fail(f"{page.name}: dlm {shlex.join(arguments)}")


def test_commands_are_found():
    """Otherwise the test above would pass without any."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    found = list(commands(text))
    assert len(found) > 60
    assert {"--mode", "--config", "--workdir"} <= {word for c in found for word in c}


@pytest.mark.parametrize(
    "arguments",
    [
        "--mode smaple --workdir x",
        "--config gramar --workdir x",
        "--config grammar:modren --workdir x",
        "--config grammar --config.train.stpes=3 --workdir x",
        "--config grammar --config.train.total_steps=many --workdir x",
        "--config grammar --wrokdir x",
        "--config grammar --workdir x y",
        "--workdir x",
    ],
)
def test_a_wrong_command_does_not_parse(arguments):
    (found,) = commands(f"```bash\ndlm {arguments}  # a comment\n```\n")
    with pytest.raises((SystemExit, AssertionError, dlm_jax.UserError)):
        parse(found)


def test_pages_have_output_and_no_placeholder():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert "@@" not in text, page
        assert text.count("\n```") % 2 == 0, f"{page}: a fence is not closed"


def test_public_names_are_in_the_reference():
    pages = ("api.md", "api_functions.md")
    text = "\n".join((DOCS / name).read_text(encoding="utf-8") for name in pages)
    found = set(re.findall(r"^::: (\S+)", text, re.MULTILINE))
    for name in [*dlm_jax._HOMES, "load", "DiffusionLM", "GuidanceConfig", "UserError"]:
        thing = getattr(dlm_jax, name)
        own = thing.__name__
        if hasattr(thing, "__module__"):
            own = f"{thing.__module__}.{thing.__qualname__}"
        assert own in found, f"docs/api.md or api_functions.md: add ::: {own}"


# --- what takes minutes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the runs that pages load: bundled models, and a classifier of two steps."""
    from dlm_jax.configs import classifier
    from dlm_jax.training import train_classifier

    place = tmp_path_factory.mktemp("pages")
    for name, model in {"quickstart": "grammar", "mine": "e2e"}.items():
        shutil.copytree(pretrained.bundled()[model], place / "runs" / name)
    config = classifier.get_config("pos")
    config.classifier.update(model=str(place / "runs/quickstart"), texts=200)
    config.model.update(layers=1, hidden_dim=32, heads=2, mlp_dim=32)
    config.train.update(total_steps=2, batch=8, ckpt_steps=0, valid_batches=1)
    train_classifier.train_classifier(config, str(place / "runs/pos"))
    return place


def run_page(page, folder):
    """Runs the python blocks of a page as one program; returns (status, output)."""
    text = page.read_text(encoding="utf-8")
    program = folder / f"{page.stem}.py"
    program.write_text("\n\n".join(python_blocks(text)), encoding="utf-8")
    command = [sys.executable, str(program)]
    kinds = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=folder, encoding="utf-8", **kinds)
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if python_blocks(page.read_text(encoding="utf-8"))],
    ids=lambda path: "/".join(path.parts[-2:]),
)
def test_code_of_a_page_runs(page, folder):
    status, output = run_page(page, folder)
    assert status == 0, f"{page}\n{output}"


@pytest.mark.slow
def test_wrong_code_of_a_page_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n\n```python\nprint(x)\nprint(y)\n```\n",
        encoding="utf-8",
    )
    status, output = run_page(page, tmp_path)
    assert status == 1
    assert output.startswith("1\n")
    assert "name 'y' is not defined" in output


def build(config, site):
    """Builds the site, without a network; returns (status, output).

    Not with --quiet: MkDocs counts the warnings that it prints.
    """
    if not importlib.util.find_spec("mkdocs"):
        pytest.skip("mkdocs is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    command += ["-f", str(config), "-d", str(site)]
    nowhere = "http://127.0.0.1:9"
    env = os.environ | {"http_proxy": nowhere, "https_proxy": nowhere}
    kinds = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, env=env, encoding="utf-8", **kinds)
    return done.returncode, done.stdout


@pytest.mark.slow
def test_site_builds(tmp_path):
    status, output = build(DOCS / "site" / "mkdocs.yml", tmp_path)
    assert status == 0, output
    remote = re.compile(r'<(?:script|img)[^>]*src="http|<link[^>]*href="http')
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not remote.search(text), f"{page} reads from another server"
        assert "arithmatex" not in text, f"{page} has a formula that is not MathML"


@pytest.mark.slow
def test_broken_links_fail_the_site(tmp_path):
    shutil.copytree(DOCS, tmp_path / "docs")
    for name in ("benchmarks", "dlm_jax", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    links = ("nothing.md", "method.md#0-nothing", "../benchmarks/results/nothing.json")
    with (tmp_path / "docs" / "faq.md").open("a", encoding="utf-8") as file:
        file.writelines(f"\n[a link]({link})\n" for link in links)
    status, output = build(tmp_path / "docs/site/mkdocs.yml", tmp_path / "site")
    assert status == 1, output
    for name in ("nothing.md", "#0-nothing", "nothing.json"):
        assert name in output


# --- the notebooks


def test_notebooks_are_small_and_have_outputs():
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        outputs = [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]
        assert path.stat().st_size < 200_000, f"{path}: make its pictures smaller"
        assert sum(map(bool, outputs)) >= 4, f"{path}: run it and save its outputs"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[test]'")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1200, resources=where).execute()
