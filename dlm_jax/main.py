# SPDX-License-Identifier: Apache-2.0
"""The command line: `dlm --config grammar --workdir runs/x`; see `dlm --help`."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from dlm_jax import interrupts

if __name__ == "__main__":  # as these imports take a moment
    interrupts.end_at_first()

from absl import app, flags
from ml_collections import config_flags

from dlm_jax import console
from dlm_jax.runtime import compilation

FLAGS, RESTART = flags.FLAGS, 75
# Use large memory pages: a step on a CPU allocates and frees hundreds of MB, and faults
# of 4 kB pages took a third of its time (docs/performance.md).
MALLOC = "glibc.malloc.hugetlb=1"
config_flags.DEFINE_config_file(
    "config", None, "a bundled config or a file: NAME[:variant] or FILE.py[:variant]"
)
flags.DEFINE_string("workdir", None, "the run's directory")
flags.DEFINE_alias("model", "workdir")
flags.DEFINE_string("host", "127.0.0.1", "serve: the address")
flags.DEFINE_integer("port", 8000, "serve: the port; 0: a free one")
flags.DEFINE_string("mode", "train", "what to run: see above")
flags.DEFINE_integer(
    "step", None, "the checkpoint that sample, plot etc. load; default: the newest"
)
flags.DEFINE_bool(
    "allow_fallback",
    False,
    "train: move a damaged newest checkpoint away and resume from the one before",
)
flags.DEFINE_bool(
    "profile", False, "train: save a trace of 5 steps, after the first 10, to profile/"
)
flags.DEFINE_string("coordinator", "", "host:port of process 0, for several hosts")
flags.DEFINE_integer("num_processes", 1, "number of processes")
flags.DEFINE_integer("process_id", 0, "this process's index, from 0")


def _require_config(config: Any, example: str) -> Any:
    from dlm_jax.errors import UserError

    if config is None:
        raise UserError(f"--config: give a bundled config or a file, such as {example}")
    return config


def _given() -> dict[str, Any]:
    """Returns {name: value} of the flags --config.NAME=VALUE."""
    return config_flags.get_override_values(FLAGS["config"])


def _check_data_flags(config: Any) -> None:
    """Raises UserError for a flag of config.data that its source would ignore."""
    from dlm_jax.data import sources

    names = (name.partition(".") for name in _given())
    sources.check_options(
        config.data, [rest for first, _, rest in names if first == "data"]
    )


def _train(config: Any, workdir: str, step: int | None) -> None:
    from dlm_jax.training import loop

    config = _require_config(config, "--config grammar")
    _check_data_flags(config)
    loop.train(config, workdir, allow_fallback=FLAGS.allow_fallback)


def _train_classifier(config: Any, workdir: str, step: int | None) -> None:
    from dlm_jax.training import train_classifier

    config = _require_config(config, "--config classifier")
    train_classifier.train_classifier(
        config, workdir, allow_fallback=FLAGS.allow_fallback, given=_given()
    )


def _distill(config: Any, workdir: str, step: int | None) -> None:
    from dlm_jax.training import distill

    config = _require_config(config, "--config distill")
    distill.distill(
        config, workdir, allow_fallback=FLAGS.allow_fallback, given=_given()
    )


# sections of the config
REPLACED = ("sample", "evaluate", "export", "control", "classifier")


def _load(config: Any, workdir: str, step: int | None, *, moved: Any = ()) -> Any:
    """Loads the run's model; --config replaces sections that do not affect it.

    moved: options that flags may set besides. Another flag with another value than the
    run's raises UserError.
    """
    import json

    from dlm_jax.errors import UserError
    from dlm_jax.inference import loading
    from dlm_jax.runtime import checkpoint

    lm = loading.load(workdir, step)
    if config is None:
        return lm
    for name in REPLACED:
        lm.config[name] = json.loads(config[name].to_json_best_effort())
    own = checkpoint.flatten(lm.config)
    for name, value in checkpoint.flatten(_given()).items():
        section, _, option = name.partition(".")
        if name in moved:
            lm.config[section][option] = value
        elif section not in REPLACED and (name not in own or own[name] != value):
            raise UserError(
                f"--config.{name}={value!r}: --mode {FLAGS.mode} takes it from the run, "
                f"which has {own.get(name)!r}: leave the flag out"
            )
    return lm


def _load_with_data(config: Any, workdir: str, step: int | None) -> Any:
    """Loads the run's model and checks that its text, which may move, is the same."""
    from ml_collections import ConfigDict

    from dlm_jax.data import corpus
    from dlm_jax.errors import UserError
    from dlm_jax.inference import pretrained
    from dlm_jax.runtime import checkpoint, paths
    from dlm_jax.training import trainer

    if workdir in pretrained.bundled() and not Path(workdir).exists():
        raise UserError(
            f"--mode {FLAGS.mode} writes into --workdir, and {workdir} is a bundled model: "
            f"save it first, dlm_jax.load({workdir!r}).save_pretrained(FOLDER)"
        )
    lm = _load(config, workdir, step, moved=paths.DATA)
    if "source" not in lm.config["data"] or lm.config["data"]["source"] == "grammar":
        return lm
    if not checkpoint.all_steps(workdir):
        return lm  # a shared model, without a record of its text
    try:
        identity = corpus.load_corpus(ConfigDict(lm.config), lm.tokenizer).identity()
    except UserError:
        if config is not None and set(paths.DATA) & set(_given()):
            raise
        return lm  # the mode itself says what it needs
    saved = checkpoint.read_records(workdir, lm.step).run
    trainer.check_same_data(identity, {k: saved.get(k) for k in identity}, workdir)
    return lm


def _require_one_host() -> None:
    from dlm_jax.errors import UserError
    from dlm_jax.runtime import hosts

    if hosts.process_index_and_count()[1] > 1:
        raise UserError(f"--mode {FLAGS.mode} runs on one host only: start one process")


def _sample(config: Any, workdir: str, step: int | None) -> None:
    lm = _load(config, workdir, step)
    from dlm_jax.inference import translation
    from dlm_jax.runtime import hosts

    options = lm.config["sample"]
    if options["out"]:
        console.check_new(options["out"])
    if options["sources"] or lm.cfg.known_source:
        texts = translation.translate_file(lm, options["sources"])
    else:
        texts = lm.sample(options["n"])
    if hosts.process_index_and_count()[0] == 0:
        console.write_lines(texts, options["out"])


def _evaluate(config: Any, workdir: str, step: int | None) -> None:
    from dlm_jax.evaluation import conditional, report

    lm = _load_with_data(config, workdir, step)
    (conditional if lm.cfg.known_source else report).evaluate(lm, workdir)


def _control(config: Any, workdir: str, step: int | None) -> None:
    from dlm_jax.errors import UserError
    from dlm_jax.evaluation import control

    lm = _load_with_data(config, workdir, step)
    if lm.cfg.known_source:
        raise UserError(
            "--mode control measures models of texts, and this one is of pairs: use "
            "--mode evaluate, or lm.translate(sources, template=...)"
        )
    control.evaluate_control(lm, workdir)


def _export(config: Any, workdir: str, step: int | None) -> None:
    from dlm_jax.evaluation import shared

    _require_one_host()
    console.say(shared.export(_load(config, workdir, step), workdir))


def _plot(config: Any, workdir: str, step: int | None) -> None:
    from dlm_jax.evaluation import plots

    _require_one_host()
    for path in plots.save_plots(_load_with_data(config, workdir, step), workdir):
        console.say(path)


def _serve(config: Any, workdir: str, step: int | None) -> None:
    from dlm_jax.errors import UserError

    _require_one_host()
    try:
        from dlm_jax.serving import server
    except ImportError as error:
        raise UserError(f"{error}: install 'dlm_jax[demo]'") from error
    lm = _load(config, workdir, step)
    server.serve(lm, Path(workdir).name, FLAGS.host, FLAGS.port)


def _prepare_data(config: Any, workdir: str, step: int | None) -> None:
    from dlm_jax.data import prepare
    from dlm_jax.runtime import ownership

    _require_one_host()
    config = _require_config(config, "--config stories")
    _check_data_flags(config)
    with ownership.claim(workdir):
        prepare.prepare_data(config, workdir)


MODES: dict[str, Callable] = {
    "prepare_data": _prepare_data,
    "train": _train,
    "train_classifier": _train_classifier,
    "distill": _distill,
    "sample": _sample,
    "evaluate": _evaluate,
    "control": _control,
    "plot": _plot,
    "serve": _serve,
    "export": _export,
}
LOCAL = ("prepare_data", "evaluate", "control", "plot", "export")


def main(argv: list[str]) -> None:
    """Runs a mode; a user's mistake exits with one line and status 2.

    Status 75 (sysexits' "temporary failure") means: rerun the same command to resume.
    """
    from dlm_jax.errors import PreemptedError, UserError, choose
    from dlm_jax.runtime import checkpoint, hosts

    sys.unraisablehook = _unraisable
    for name in ("absl", "asyncio"):  # Orbax writes some fifty lines per save
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        if len(argv) > 1:
            raise UserError(f"{argv[1]}: not a flag; see --help")
        run = choose("--mode", MODES, FLAGS.mode)
        if not FLAGS.workdir:
            raise UserError("--workdir: name the run's directory, such as runs/first")
        _check_flags()
        hosts.initialize(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
        if FLAGS.mode in LOCAL and "://" in FLAGS.workdir:
            raise UserError(
                f"--mode {FLAGS.mode} needs a local folder: copy {FLAGS.workdir} to "
                "a disk first"
            )
        checkpoint.check_reachable(FLAGS.workdir)
        interrupts.raise_at_first()
        run(FLAGS.config, FLAGS.workdir, FLAGS.step)
    except PreemptedError as error:  # raised by all hosts at the same step
        print(error, file=sys.stderr, flush=True)
        sys.exit(RESTART)
    except Exception as error:
        with hosts.ENDING:  # prints this error or that of another host, not both
            _end(error)
        raise


def _check_flags() -> None:
    """Raises UserError for a flag that the mode would ignore."""
    from dlm_jax.errors import UserError

    trains = FLAGS.mode in ("train", "train_classifier", "distill")
    if FLAGS.allow_fallback and not trains:
        raise UserError(f"--allow_fallback: --mode {FLAGS.mode} does not take it")
    if FLAGS.profile:
        if not trains:
            raise UserError(f"--profile: --mode {FLAGS.mode} does not take it")
        _require_config(FLAGS.config, "--config grammar").train.profile_steps = 5
    if FLAGS.step is not None and (trains or FLAGS.mode == "prepare_data"):
        raise UserError(f"--step={FLAGS.step}: --mode {FLAGS.mode} does not take it")


def _end(error: Exception) -> None:
    """Exits with one line if the cause is a lost host or a user error."""
    from dlm_jax.errors import UserError
    from dlm_jax.runtime import hosts

    if reason := hosts.host_loss_reason(error):
        with contextlib.suppress(Exception):  # its key-value store may be lost
            hosts.poll_remote_error()
        print(f"another host is lost ({reason}): restart all hosts", file=sys.stderr)
        hosts.exit_process(RESTART)
    if isinstance(error, UserError):
        _fail(error, hosts.fail_all_hosts)
    if isinstance(error, OSError):
        line = f"{error}; check the file, or --workdir {FLAGS.workdir}"
        _fail(line, hosts.fail_all_hosts)


def _unraisable(found: Any) -> None:
    """Suppresses Orbax reader-thread warnings after a failed restore."""
    if isinstance(found.exc_value, KeyboardInterrupt):
        interrupts.raise_again()
    elif "Event loop is closed" not in str(found.exc_value):
        sys.__unraisablehook__(found)


def _fail(error: object, end: Callable[[str], NoReturn] | None = None) -> NoReturn:
    """Prints one line and exits with status 2, by end(line) if it is given."""
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.stderr = io.StringIO()  # suppresses warnings of Orbax reader threads
    if end is not None:
        end(line)
    sys.exit(2)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses absl flags; an unknown config key or file is one line, not a traceback.

    A mode may come first, without its flag: `dlm serve --model e2e`.
    """
    if argv[1:] and argv[1] in MODES:
        argv = [argv[0], f"--mode={argv[1]}", *argv[2:]]
    try:
        rest = FLAGS(list(_with_config_files(argv)))
        if FLAGS["verbosity"].using_default_value:
            FLAGS.verbosity = -1  # warnings only; app.run would add JAX's info
        if FLAGS.config is not None:
            FLAGS.config.keys()  # raises if the config file is missing
        return rest
    except (KeyError, AttributeError) as error:
        inner = error.args[0]  # str() of a KeyError would add quotes
        text = inner.args[0] if isinstance(inner, KeyError) else inner
        _fail(f"--config has no key {text}; configs/default.py lists all keys")
    except (flags.Error, OSError, ValueError, TypeError) as error:
        lines = str(error).strip().splitlines()  # a traceback is cut to two lines
        _fail(" ".join(dict.fromkeys((lines[0], lines[-1].strip()))))
    except Exception as error:  # others in the code of a config file
        _fail(f"--config: the file raises {type(error).__name__}: {error}; correct it")


def _with_config_files(argv: list[str]) -> Iterator[str]:
    """Yields argv, with a bundled config's name after --config replaced by its file."""
    before = ""
    for arg in argv:
        flag, equals, value = arg.partition("=")
        if equals and flag in ("--config", "-config"):
            yield f"{flag}={_config_file(value)}"
        else:
            yield _config_file(arg) if before in ("--config", "-config") else arg
        before = arg


def _config_file(value: str) -> str:
    """Returns the file of a bundled config's name; a path is returned unchanged."""
    name, colon, variant = value.partition(":")
    if not name.isidentifier():
        return value
    from dlm_jax import usage
    from dlm_jax.errors import UserError, choices

    files = usage.config_files()
    if name not in files:
        raise UserError(
            f"--config={name}: no bundled config has this name; "
            f"{choices(name, files)}, or give a file, {name}.py"
        )
    return f"{files[name]}{colon}{variant}"


def large_pages() -> None:
    """Restarts the process with large pages, unless GLIBC_TUNABLES is set."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = MALLOC
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _asked_for_lines(arguments: list[str]) -> str:
    """Returns what `dlm --help` and `dlm configs` print, or ""."""
    if not ({"--help", "-help", "-h"} & set(arguments) or arguments == ["configs"]):
        return ""
    from dlm_jax import usage

    if arguments == ["configs"]:
        return usage.table(usage.config_lines(), margin="")
    return usage.help_text(__name__)


def cli() -> None:
    """Parses the flags and runs `main`."""
    app.run(main, flags_parser=parse_flags)


def command() -> None:
    """The command: sets the environment, then calls `cli`.

    Ctrl-C exits with one line and status 130, as shells expect.
    """
    try:
        interrupts.end_at_first()
        if asked := _asked_for_lines(sys.argv[1:]):
            return console.say(asked)
        compilation.keep_for_command()
        large_pages()
        interrupts.end_at_second()
        cli()
    except KeyboardInterrupt as error:
        interrupts.end(error)
    finally:
        interrupts.drop_unread_output()


if __name__ == "__main__":
    command()
