# SPDX-License-Identifier: Apache-2.0
"""The rules of the house that a machine can check, read off the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dlm_jax"
# An import points to the left, never to the right; packages of one column do not
# import each other.
COLUMNS = (
    "types errors",
    "nn data runtime",
    "diffusion",
    "inference",
    "training evaluation",
    "main",
)
COLUMN = {name: i for i, names in enumerate(COLUMNS) for name in names.split()}
APART = {("diffusion", "data"), ("diffusion", "runtime")}
MATHEMATICS = ("types", "errors", "nn", "diffusion")
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


def _name(path):
    """The module's name inside the package, such as diffusion.schedule."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


TREES = {_name(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
MODULES = sorted(name for name in TREES if not name.endswith("__init__"))
PURE = [name for name in MODULES if name.partition(".")[0] in MATHEMATICS]
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


def _own(module):
    """The package's modules that this one imports, by their names inside it."""
    for source, name in _imports(module):
        parts = source.split(".")
        if parts[0] != "dlm_jax":
            continue
        inner = ".".join(parts[1:])
        longer = f"{inner}.{name}" if inner else str(name)
        yield longer if longer in TREES else inner


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_left(module):
    package = module.partition(".")[0]
    assert package in COLUMN, f"{module}: give its package a column"
    for other in _own(module):
        assert other in TREES, f"{module} imports {other}, which is no module"
        theirs = other.partition(".")[0]
        if theirs == package:
            continue
        assert COLUMN[theirs] < COLUMN[package], f"{module} imports {other}"
        assert (package, theirs) not in APART, f"{module} imports {other}"


def test_no_circles():
    above = {module: set(_own(module)) - {module} for module in MODULES}
    while above:
        ground = [module for module, below in above.items() if not below & set(above)]
        assert ground, f"these import each other: {sorted(above)}"
        above = {m: below for m, below in above.items() if m not in ground}


@pytest.mark.parametrize("module", PURE)
def test_mathematics_has_no_effects(module):
    found = {source.partition(".")[0] for source, _ in _imports(module)}
    assert not found & EFFECTS
    for name in ("open", "print", "input"):
        assert not any(
            isinstance(c.func, ast.Name) for c in _calls(TREES[module], name)
        )


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith("nn.")])
def test_flax_stays_in_nn(module):
    assert "flax" not in {source.partition(".")[0] for source, _ in _imports(module)}


@pytest.mark.parametrize(
    "module", sorted(set(MODULES) - {"runtime.hosts", "runtime.sharding"})
)
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


@pytest.mark.parametrize("module", PURE)
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


@pytest.mark.parametrize("module", PURE)
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
    [
        "evaluation.report",
        "inference.pipeline",
        "main",
        "runtime.checkpoint",
        "runtime.hosts",
        "runtime.sharding",
        "training.optimizer",
        "training.train_step",
        "training.trainer",
        "training.validate",
    ],
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
    assert not {"utils", "util", "helpers", "common", "misc"} & {
        m.rpartition(".")[2] for m in MODULES
    }


def test_importing_the_mathematics_loads_no_edge():
    names = ("orbax", "tensorflow_datasets", "sentencepiece", "ml_collections", "absl")
    program = (
        "import sys, dlm_jax; dlm_jax.schedule, dlm_jax.samplers, dlm_jax.losses; "
        f"print([n for n in {names} if n in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    kinds = {"capture_output": True, "text": True, "check": True, "timeout": 120}
    done = subprocess.run(command, cwd=ROOT, **kinds)
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & {"orbax", "tensorflow_datasets", "sentencepiece"}
