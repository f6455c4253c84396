# SPDX-License-Identifier: Apache-2.0
"""Interleaved measurements: each contender in a process of its own, asked in turn.

A B C, A B C, ...: what disturbs the machine disturbs all of them, and ratios are taken
within a round. A contender waits for its turn on its input, without using the machine.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlm_jax.main import MALLOC  # for all contenders alike

HERE = Path(__file__).parent
FAIR = {"GLIBC_TUNABLES": MALLOC, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Case(NamedTuple):
    """What is timed, whoever does it.

    job: train (a step), chain (the reverse steps of a batch), guided (a chain with a
    classifier of tags). change: further keys of the config, as section.name=value.
    """

    config: str
    job: str = "train"
    batch: int = 0  # 0: the config's
    length: int = 0
    vocab: int = 821
    steps: int = 20
    clamp: bool = True
    updates: int = 3
    change: tuple[str, ...] = ()


def settings(case: Case) -> Any:
    """The config of a case. Schedules do not adapt, every batch feeds its estimate back:
    so a step always does the same work."""
    path, _, variant = case.config.partition(":")
    spec = importlib.util.spec_from_file_location("config", HERE.parent / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant) if variant else module.get_config()
    config.train.batch = case.batch or config.train.batch
    config.data.length = case.length or config.data.length
    config.model.positions = max(config.model.positions, config.data.length)
    config.schedule.adaptive = ""
    config.loss.self_cond = 1.0 if config.model.self_cond else 0.0
    for pair in case.change:
        name, _, value = pair.partition("=")
        section, _, key = name.partition(".")
        kind = type(config[section][key])
        config[section][key] = value == "True" if kind is bool else kind(value)
    return config


def resident(field: str) -> float:
    """MB of the host's memory that this process has (VmRSS) or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(x.split()[1]) for x in lines if x.startswith(field)) / 1024


def serve(make: Callable[[Case, str], Callable[[], Any]], alone: str = "") -> None:
    """A contender: builds its work, then does it once for every line it reads.

    alone: what it would import if it were not measured here; its memory counts so.
    """
    case, variant = Case(*json.loads(sys.argv[1])), sys.argv[2]
    imports = resident("VmRSS")
    spared = imports - _imported(alone) if alone else 0.0
    began = time.perf_counter()
    run = make(case._replace(change=tuple(case.change)), variant)
    ready = time.perf_counter()
    run()
    say({"build": ready - began, "first": time.perf_counter() - ready})
    run()
    for line in sys.stdin:
        run()  # memory that went back to the system meanwhile is taken again
        began = time.perf_counter()
        for _ in range(int(line)):
            run()
        say({"seconds": (time.perf_counter() - began) / int(line)})
    peak = resident("VmHWM") - spared
    say({"peak_mb": peak, "imports_mb": imports - spared})


def _imported(alone: str) -> float:
    program = f"import alternate; {alone}; print(alternate.resident('VmRSS'))"
    options: Any = {"cwd": HERE, "capture_output": True, "text": True, "check": True}
    done = subprocess.run([sys.executable, "-c", program], **options)
    return float(done.stdout)


def say(record: dict) -> None:
    """A line for whoever asks."""
    print("@" + json.dumps(record), flush=True)


class Contender:
    """A process that measures when asked."""

    def __init__(self, script: str, case: Case, variant: str = "", **env: str):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script), json.dumps(case), variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **FAIR, **env},
        )
        self.started = self._heard()

    def _heard(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"{self.process.args} ended: {self.process.wait()}")

    def ask(self, times: int = 1) -> float:
        """Seconds of one run, the mean of so many."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{times}\n")
        self.process.stdin.flush()
        return self._heard()["seconds"]

    def close(self) -> dict[str, float]:
        """Its end, and what it took at most of the host's memory."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        found = self._heard()
        self.process.wait()
        return found


def alternate(
    contenders: dict[str, Callable[[], Contender]], repeats: int, seconds: float = 1.0
) -> dict[str, dict[str, Any]]:
    """All of them, round by round; a turn is as many runs as fill `seconds`."""
    living = {name: make() for name, make in contenders.items()}
    times = {n: max(1, round(seconds / c.ask())) for n, c in living.items()}
    found: dict[str, list[float]] = {name: [] for name in living}
    for _ in range(repeats):
        for name, contender in living.items():
            found[name].append(contender.ask(times[name]))
    return {
        name: {"all": found[name], **summary(found[name]), **c.started, **c.close()}
        for name, c in living.items()
    }


def summary(values: list[float]) -> dict[str, float]:
    """Median, and the quartiles as its spread."""
    low, mid, high = np.percentile(values, [25, 50, 75])
    return {"median": float(mid), "low": float(low), "high": float(high)}


def ratio(rows: dict[str, dict], over: str, under: str) -> dict[str, float]:
    """How many times as long `over` takes as `under`, round by round."""
    pairs = zip(rows[over]["all"], rows[under]["all"], strict=True)
    return summary([a / b for a, b in pairs])


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    names = [
        line.partition(":")[2].strip() for line in _cpuinfo() if "model name" in line
    ]
    versions = {}
    for name in ("jax", "jaxlib", "flax", "optax", "torch", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write(path: str, record: dict[str, Any]) -> None:
    """JSON with the machine it is of."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({**machine(), **record}, indent=1) + "\n")
    print(path)


def options(description: str | None, out: str) -> argparse.ArgumentParser:
    """What every benchmark asks."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default=out)
    return parser
