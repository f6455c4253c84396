# SPDX-License-Identifier: Apache-2.0
"""The rules of the house that a machine can check, read off the syntax trees."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dlm_jax"
# An import points to the left, never to the right; packages of one column do not
# import each other.
COLUMNS = (
    "types errors",
    "ranges console interrupts",
    "nn data runtime",
    "diffusion",
    "inference",
    "configs training evaluation serving",
    "usage",
    "main",
    "__main__",
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


TREES = {
    _name(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in PACKAGE.rglob("*.py")
}
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


def _definitions(module):
    """(dotted name, node) of every function and class, methods and inner ones too."""

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            inside = prefix
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inside = f"{prefix}.{child.name}"
                yield inside, child
            yield from visit(child, inside)

    yield from visit(TREES[module], module)


def _functions(module):
    """The functions among `_definitions`."""
    for name, node in _definitions(module):
        if isinstance(node, ast.FunctionDef):
            yield name, node


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
        package = f"{longer}.__init__"
        yield next((m for m in (longer, package) if m in TREES), inner)


def _in_binary(call):
    """Whether a call of open names a binary mode."""
    modes = [a.value for a in call.args if isinstance(a, ast.Constant)]
    return any(isinstance(mode, str) and mode.endswith("b") for mode in modes)


def test_text_files_have_an_encoding():
    """Otherwise it is the locale's, and a text of another one ends the run."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    opened = ("os.open", "tensorstore.open", "tarfile.open")
    for path, tree in trees.items():
        needs = {"read_text": 1, "write_text": 2, "open": 9}
        for name, positional in needs.items():
            for call in _calls(tree, name):
                named = {keyword.arg for keyword in call.keywords}
                binary = name == "open" and (
                    _in_binary(call) or ast.unparse(call).startswith(opened)
                )
                assert binary or "encoding" in named or len(call.args) >= positional, (
                    f"{path} line {call.lineno}: give {name} an encoding"
                )


def test_output_of_commands_has_an_encoding():
    """text=True means the locale's, and a command that prints UTF-8 ends the caller."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [getattr(node, "arg", None)]
            if isinstance(node, ast.Dict):
                named = [getattr(key, "value", None) for key in node.keys]
                named = [
                    n for n, v in zip(named, node.values, strict=True) if _is_true(v)
                ]
            elif not isinstance(node, ast.keyword) or not _is_true(node.value):
                continue
            assert not {"text", "universal_newlines"} & set(named), (
                f"{path} line {node.lineno}: give encoding='utf-8' instead of text=True"
            )


def test_lines_are_printed_by_the_console():
    """print raises for a character that the locale lacks, and if nobody reads on."""
    for module in set(MODULES) - {"console"}:
        for call in _calls(TREES[module], "print"):
            to_stderr = "file" in {keyword.arg for keyword in call.keywords}
            assert to_stderr, f"{module} line {call.lineno}: call console.say"


def _is_true(node):
    return isinstance(node, ast.Constant) and node.value is True


def test_imports_point_left():
    for module in MODULES:
        package = module.partition(".")[0]
        assert package in COLUMN, f"{module}: give its package a column"
        for other in _own(module):
            assert other in TREES, f"{module} imports {other}, which is no module"
            home = other.partition(".")[0]
            if home != package:
                assert COLUMN[home] < COLUMN[package], f"{module} imports {other}"
                assert (package, home) not in APART, f"{module} imports {other}"


def test_no_circles():
    above = {module: set(_own(module)) - {module} for module in MODULES}
    while above:
        ground = [module for module, below in above.items() if not below & set(above)]
        assert ground, f"these import each other: {sorted(above)}"
        above = {m: below for m, below in above.items() if m not in ground}


def test_mathematics_has_no_effects():
    for module in PURE:
        used = {source.partition(".")[0] for source, _ in _imports(module)}
        assert not used & EFFECTS, f"{module} imports {used & EFFECTS}"
        for name in ("open", "print", "input"):
            for call in _calls(TREES[module], name):
                assert not isinstance(call.func, ast.Name), f"{module} calls {name}"


def test_flax_stays_in_nn():
    for module in MODULES:
        used = {source.partition(".")[0] for source, _ in _imports(module)}
        assert module.startswith("nn.") or "flax" not in used, module


def test_devices_stay_in_two_modules():
    for module in set(MODULES) - {"runtime.hosts", "runtime.sharding"}:
        for source, name in _imports(module):
            if source.partition(".")[0] == "jax":
                assert "sharding" not in source, module
                assert name not in DEVICES, f"{module} imports {name}"
        for node in ast.walk(TREES[module]):
            if isinstance(node, ast.Attribute) and node.attr in DEVICES:
                where = ast.unparse(node)
                assert not where.startswith("jax"), f"{module}:{node.lineno} {where}"


def test_sizes():
    """A function fits a screen, a class a few; a file has one job."""
    for module in MODULES:
        for name, node in _definitions(module):
            if isinstance(node, ast.ClassDef):
                assert _lines(node) <= 150, f"{name} has {_lines(node)} lines"
            else:
                doc = node.body[0] if ast.get_docstring(node) is not None else None
                lines = _lines(node) - (_lines(doc) if doc else 0)
                assert lines <= 60, f"{name} has {lines} lines"
    for path in SOURCES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        most = 450 if path.is_relative_to(PACKAGE) else 650
        assert lines <= most, f"{path} has {lines} lines"


def _lines(node):
    return node.end_lineno - node.lineno + 1


def test_keys_are_typed_and_come_first():
    for module in MODULES:
        assert not list(_calls(TREES[module], "PRNGKey")), "take jax.random.key"
        for name, node in _functions(module):
            positional = [a.arg for a in node.args.posonlyargs + node.args.args]
            positional = [a for a in positional if a != "self"]
            keys = [i for i, a in enumerate(positional) if a in ("key", "keys")]
            assert keys in ([], [0]), f"{name}: key comes first, or by keyword"


def test_public_names_are_documented():
    for module in MODULES:
        nodes = TREES[module].body
        classes = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        for name, node in _definitions(module):
            outer, _, inner = name.removeprefix(f"{module}.").rpartition(".")
            public = not outer.startswith("_") and not inner.startswith("_")
            if public and outer in {"", *classes}:
                assert ast.get_docstring(node), f"{name}: no docstring"


def test_public_mathematics_is_annotated():
    for module in PURE:
        for name, node in _functions(module):
            inside = name.removeprefix(f"{module}.")
            if inside.startswith("_") or "." in inside:
                continue  # an inner function may lean on its surroundings
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            bare = [a.arg for a in arguments if a.annotation is None]
            assert not bare, f"{name}: {bare} without a type"
            assert node.returns is not None, f"{name}: no return type"


def test_options_are_keywords():
    """A default that is a bool or a string is an option: never by position."""
    for module in PURE:
        for name, node in _functions(module):
            if name.rpartition(".")[2].startswith("_"):
                continue
            for default in node.args.defaults:
                option = isinstance(default, ast.Constant)
                option = option and isinstance(default.value, bool | str)
                assert not option, f"{name}: {ast.unparse(default)} by position"


def test_defaults_live_in_the_config():
    """No module that reads a config has a default of its own for a missing key."""
    packages = ("inference", "runtime", "training", "main")
    others = {"inference.constraints", "inference.published"}  # they read no config
    for module in MODULES:
        if module.partition(".")[0] in packages and module not in others:
            for call in _calls(TREES[module], "get"):
                where = f"{module}:{call.lineno} {ast.unparse(call)}"
                assert len(call.args) < 2, where


def test_files_state_their_licence_and_their_job():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), path
        doc = ast.get_docstring(ast.parse(text))
        assert doc, f"{path}: state the file's job in its first line"
        assert doc.partition("\n")[0].rstrip().endswith("."), path


def test_documents_that_are_cited_exist():
    """A docstring cites a page of this repository, or a paper."""
    cited = re.compile(
        r"docs/[a-z_]+\.md|benchmarks/[a-z_/]+\.py|configs/[a-z_0-9]+\.py"
    )
    code = [path for path in SOURCES if path.parent.name != "tests"]
    for path in [*code, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        text = path.read_text(encoding="utf-8")
        for name in set(cited.findall(text)):
            assert (ROOT / name).exists(), f"{path} cites {name}"
        assert not re.search(r"\bRE(FERENCE|CIPES) ?(section)? ?\d", text), path


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
    kinds = {"capture_output": True, "encoding": "utf-8", "check": True, "timeout": 120}
    done = subprocess.run(command, cwd=ROOT, **kinds)
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & {"orbax", "tensorflow_datasets", "sentencepiece"}
