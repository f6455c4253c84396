# SPDX-License-Identifier: Apache-2.0
"""Help that reads well, a list of the configs, and names that were nearly right."""

import ast
import importlib
import subprocess
import sys

import pytest

import dlm_jax
from dlm_jax import main, usage
from dlm_jax.data import grammar
from dlm_jax.errors import UserError, choices
from dlm_jax.inference import constraints


def _dlm(*arguments):
    """Runs the command, and says whether it has imported JAX."""
    code = "import sys; from dlm_jax import main; main.command()\n"
    code += "assert 'jax' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert not done.returncode, done.stderr
    assert not done.stderr
    return done.stdout


def test_help_names_every_mode_and_flag():
    text = _dlm("--mode", "sample", "--help")
    for name in (*main.MODES, "--workdir", "--config", "--step", "--profile"):
        assert f"\n  {name} " in text
    assert "absl" not in text
    assert len(text.splitlines()) < 50
    assert usage.MODES.keys() == main.MODES.keys()


def test_the_examples_of_the_help_are_commands(monkeypatch):
    for line in usage.EXAMPLES.values():
        name, *arguments = line.split()
        assert name == "dlm"
        monkeypatch.setattr(sys, "argv", line.split())  # ml_collections reads it
        assert main.parse_flags([name, *arguments]) == ["dlm"]
        assert main.FLAGS.mode in main.MODES
        main.FLAGS.unparse_flags()


def test_a_mode_may_stand_first():
    assert main.parse_flags(["dlm", "serve", "--model", "e2e"]) == ["dlm"]
    assert (main.FLAGS.mode, main.FLAGS.workdir) == ("serve", "e2e")
    main.FLAGS.unparse_flags()


def test_each_listed_config_can_be_made():
    names = [line.split()[0] for line in _dlm("configs").splitlines()]
    assert {"grammar", "grammar:faithful", "e2e:block", "classifier:tree"} <= {*names}
    for name in names:
        stem, _, variant = name.partition(":")
        module = importlib.import_module(f"dlm_jax.configs.{stem}")
        assert module.get_config(*([variant] if variant else [])).train.batch


def test_a_config_with_variants_lists_its_default_and_others():
    listed = {name for name, _ in usage.config_lines()}
    for stem, path in usage.config_files().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        (made,) = [
            x
            for x in tree.body
            if isinstance(x, ast.FunctionDef) and x.name == "get_config"
        ]
        for default in made.args.defaults:
            assert f"{stem}:{ast.literal_eval(default)}" in listed
            assert sum(name.startswith(f"{stem}:") for name in listed) > 1


NEARLY = {
    "solver": lambda lm: lm.sample(1, solver="ddmi"),
    "ddim": lambda lm: lm.sample(1, solver="ddmi"),
    "num_steps": lambda lm: lm.sample(1, num_step=3),
    "semantic": lambda lm: lm.control(1, semantics={"food": "Indian"}),
    "lacks": lambda lm: lm.control(1, lack="pub"),
    "food": lambda lm: constraints.check_fields({"semantic": {"fod": "x"}}, "grammar"),
    "grammar": lambda lm: dlm_jax.load("gramar"),
}


@pytest.mark.parametrize("name", NEARLY)
def test_the_nearest_name_is_suggested(name):
    lm = dlm_jax.load("grammar")
    assert lm.tokenizer.encode(grammar.FIELDS[0])  # it is the model of that grammar
    with pytest.raises(UserError, match=rf"{name}"):
        NEARLY[name](lm)
    if name != "solver":
        with pytest.raises(UserError, match=rf"did you mean '{name}'\? "):
            NEARLY[name](lm)


def test_nothing_is_suggested_where_nothing_is_near():
    assert choices("l1", ("ce", "x0")) == "choose one of ce, x0"
    assert choices(3, ("ce",)) == "choose one of ce"
