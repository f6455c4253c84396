# SPDX-License-Identifier: Apache-2.0
"""The rules of the house that a machine can check, read off the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dlm_jax"
LAYERS = (  # from the bottom; an import points to a lower row
    "types",
    "schedule embedding tokenizer metrics measures grammar",
    "records",
    "rounding denoiser data adaptive",
    "model prepare",
    "losses samplers",
    "control likelihood classifier teacher parallel checkpoint optim mbr",
    "interop labels",
    "steering",
    "generate viz",
    "targets",
    "evaluate tasks",
    "train",
    "train_classifier",
    "main",
)
LAYER = {name: i for i, row in enumerate(LAYERS) for name in row.split()}
MATHEMATICS = [
    "types",
    "schedule",
    "adaptive",
    "embedding",
    "rounding",
    "denoiser",
    "model",
    "losses",
    "samplers",
    "control",
    "likelihood",
    "classifier",
    "teacher",
    "mbr",
]
EFFECTS = {
    "absl",
    "logging",
    "ml_collections",
    "orbax",
    "os",
    "pathlib",
    "sentencepiece",
    "sys",
    "tensorflow",
    "tensorflow_datasets",
}
# what names a device, wherever it is imported from
DEVICES = {
    "Mesh",
    "NamedSharding",
    "PartitionSpec",
    "device_count",
    "device_put",
    "devices",
    "distributed",
    "local_device_count",
    "local_devices",
    "make_mesh",
    "pmap",
    "process_count",
    "process_index",
    "shard_map",
}
TREES = {path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py")}
MODULES = sorted(set(TREES) - {"__init__"})
SOURCES = sorted(
    path
    for folder in ("dlm_jax", "configs", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if path.stat().st_size
)


def _imports(module):
    """(top-level name, what is taken from it) of every import, lazy ones too."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def _functions(module):
    """(dotted name, node) of every function, methods and inner ones too."""

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            inside = prefix
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inside = f"{prefix}.{child.name}"
                if isinstance(child, ast.FunctionDef):
                    yield inside, child
            yield from visit(child, inside)

    yield from visit(TREES[module], module)


def _calls(tree, name):
    """Calls of an attribute or a function of that name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            if name == getattr(called, "attr", getattr(called, "id", None)):
                yield node


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    assert module in LAYER, f"{module}: give it a layer, here and in the design"
    for source, name in _imports(module):
        if source.partition(".")[0] != "dlm_jax":
            continue
        other = source.partition(".")[2] or name
        assert other in LAYER, f"{module} imports {other}, which has no layer"
        assert LAYER[other] < LAYER[module], f"{module} imports {other}: not below it"


@pytest.mark.parametrize("module", sorted(set(MODULES) & set(MATHEMATICS)))
def test_mathematics_has_no_effects(module):
    found = {source.partition(".")[0] for source, _ in _imports(module)}
    assert not found & EFFECTS
    for name in ("open", "print", "input"):
        assert not any(
            isinstance(c.func, ast.Name) for c in _calls(TREES[module], name)
        )


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"denoiser"}))
def test_flax_stays_in_the_denoiser(module):
    assert "flax" not in {source.partition(".")[0] for source, _ in _imports(module)}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"parallel"}))
def test_devices_stay_in_parallel(module):
    for source, name in _imports(module):
        if source.partition(".")[0] == "jax":
            assert "sharding" not in source
            assert name not in DEVICES
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and node.attr in DEVICES:
            where = ast.unparse(node)
            assert not where.startswith("jax"), f"{module}:{node.lineno} {where}"


@pytest.mark.parametrize("module", MODULES)
def test_functions_fit_a_screen(module):
    for name, node in _functions(module):
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            first = node.body[0]
            lines -= first.end_lineno - first.lineno + 1
        assert lines <= 60, f"{name} has {lines} lines"


@pytest.mark.parametrize("module", MODULES)
def test_keys_are_typed_and_come_first(module):
    assert not list(_calls(TREES[module], "PRNGKey")), "take jax.random.key"
    for name, node in _functions(module):
        positional = [a.arg for a in node.args.posonlyargs + node.args.args]
        positional = [a for a in positional if a != "self"]
        keys = [i for i, a in enumerate(positional) if a in ("key", "keys")]
        assert keys in ([], [0]), f"{name}: key comes first, or by keyword"


@pytest.mark.parametrize("module", sorted(set(MODULES) & set(MATHEMATICS)))
def test_public_mathematics_is_annotated(module):
    for name, node in _functions(module):
        if any(part.startswith("_") for part in name.split(".")):
            continue
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        bare = [a.arg for a in arguments if a.annotation is None and a.arg != "self"]
        outer = name.count(".") == 1  # an inner function may lean on its surroundings
        assert not (outer and bare), f"{name}: {bare} without a type"
        assert not (outer and node.returns is None), f"{name}: no return type"
        assert not outer or ast.get_docstring(node), f"{name}: no docstring"


@pytest.mark.parametrize("module", sorted(set(MODULES) & set(MATHEMATICS)))
def test_options_are_keywords(module):
    """A default that is a bool or a string is an option: never by position."""
    for name, node in _functions(module):
        if name.rpartition(".")[2].startswith("_"):
            continue
        for default in node.args.defaults:
            option = isinstance(default, ast.Constant)
            option = option and isinstance(default.value, bool | str)
            assert not option, f"{name}: {ast.unparse(default)} by position"


@pytest.mark.parametrize(
    "module",
    ["checkpoint", "evaluate", "generate", "main", "optim", "parallel", "train"],
)
def test_defaults_live_in_the_config(module):
    for call in _calls(TREES[module], "get"):
        assert len(call.args) < 2, f"{module}:{call.lineno} {ast.unparse(call)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_say_their_licence_and_their_job(path):
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    doc = ast.get_docstring(ast.parse(text))
    assert doc, "say the file's job in its first line"
    assert doc.partition("\n")[0].rstrip().endswith(".")


def test_no_file_of_odds_and_ends():
    assert not {"utils", "util", "helpers", "common", "misc"} & set(MODULES)


def test_importing_the_mathematics_loads_no_edge():
    names = ("orbax", "tensorflow_datasets", "sentencepiece", "ml_collections", "absl")
    program = (
        "import dlm_jax.schedule, dlm_jax.samplers, dlm_jax.losses, sys; "
        f"print([n for n in {names} if n in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    kinds = {"capture_output": True, "text": True, "check": True, "timeout": 120}
    done = subprocess.run(command, cwd=ROOT, **kinds)
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & {"orbax", "tensorflow_datasets", "sentencepiece"}
