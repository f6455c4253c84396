# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: contenders in processes of their own are measured in turn.

The order is A B C, A B C, ..., so a disturbance of the machine affects all contenders.
Ratios are taken within a round. A contender waits for its turn idle, reading its input.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from dlm_jax.main import MALLOC  # the same for all contenders

HERE = Path(__file__).parents[1]  # benchmarks/
FAIR = {"GLIBC_TUNABLES": MALLOC, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Case(NamedTuple):
    """The work to time, the same for every contender.

    job: train (a step), chain (the reverse steps of a batch) or guided (a chain with a
    classifier of tags). updates: gradient updates per guided step. change: other values
    of the config, as section.name=value.
    """

    config: str
    job: str = "train"
    batch: int = 0  # 0: that of the config
    length: int = 0
    vocab: int = 821
    num_steps: int = 20
    clamp: bool = True
    updates: int = 3
    change: tuple[str, ...] = ()


def settings(case: Case) -> Any:
    """Returns the config of a case, with the same work in every step.

    Schedules do not adapt, all rows have full length, and every batch has
    self-conditioning if the model has it.
    """
    config = load_config(case.config)
    config.train.batch = case.batch or config.train.batch
    config.data.length = case.length or config.data.length
    config.model.positions = max(config.model.positions, config.data.length)
    config.schedule.adaptive, config.model.known_length = "", False
    config.loss.self_cond_prob = 1.0 if config.model.self_cond else 0.0
    return changed(config, case.change)


def load_config(name: str) -> Any:
    """Loads the config FILE[:variant]; FILE is relative to the repository's root."""
    path, _, variant = name.partition(":")
    spec = importlib.util.spec_from_file_location("config", HERE.parent / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()


def changed(config: Any, change: Iterable[str]) -> Any:
    """Sets values of the config, given as section.name=value; returns it."""
    for pair in change:
        name, _, value = pair.partition("=")
        section, _, key = name.partition(".")
        kind = type(config[section][key])
        config[section][key] = value == "True" if kind is bool else kind(value)
    return config


def resident(field: str) -> float:
    """Returns this process's host memory in MB: now (VmRSS) or its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(x.split()[1]) for x in lines if x.startswith(field)) / 1024


def serve(make: Callable[[Case, str], Callable[[], Any]], alone: str = "") -> None:
    """Runs a contender: builds its work, then reads a number of runs per line.

    alone: the imports it would need outside the benchmark; the memory of other imports
    is subtracted.
    """
    case, variant = Case(*json.loads(sys.argv[1])), sys.argv[2]
    imports = resident("VmRSS")
    spared = imports - _imported(alone) if alone and not on_gpu() else 0.0
    began = time.perf_counter()
    run = make(case._replace(change=tuple(case.change)), variant)
    built = time.perf_counter()
    run()
    say({"build": built - began, "first": time.perf_counter() - built})
    run()
    for line in sys.stdin:
        run()  # allocates again what was returned to the system while waiting
        began = time.perf_counter()
        for _ in range(int(line)):
            run()
        say({"seconds": (time.perf_counter() - began) / int(line)})
    peak = {"peak_mb": resident("VmHWM") - spared, "imports_mb": imports - spared}
    say(peak | {"device_mb": device_memory()})


def on_gpu() -> bool:
    """Returns whether this is a PyTorch peer on a GPU (no host memory is compared)."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available()


def device_memory() -> float | None:
    """Returns this process's peak accelerator memory in MB; None on a CPU.

    A PyTorch peer keeps JAX on the CPU, so the two are never counted together.
    """
    torch, jax = (sys.modules.get(name) for name in ("torch", "jax"))
    if torch is not None and on_gpu():
        return torch.cuda.max_memory_allocated() / 2**20
    stats = jax.local_devices()[0].memory_stats() if jax else None
    return stats["peak_bytes_in_use"] / 2**20 if stats else None


def _imported(alone: str) -> float:
    program = f"from lib import alternate; {alone}; print(alternate.resident('VmRSS'))"
    options: Any = {
        "cwd": HERE,
        "capture_output": True,
        "encoding": "utf-8",
        "check": True,
    }
    done = subprocess.run([sys.executable, "-c", program], **options)
    return float(done.stdout)


def say(record: dict) -> None:
    """Prints a record as a line that the parent process recognises."""
    print("@" + json.dumps(record), flush=True)


class Ended(RuntimeError):
    """A contender ended before it was measured; the message is the reason."""


OUT_OF_MEMORY = re.compile(r"out of memory|RESOURCE_EXHAUSTED|MemoryError", re.I)


class Contender:
    """A contender's process: it starts at once, and `started` waits until it is ready.

    It is killed if it is not ready after `patience` seconds, or not closed after
    `seconds`. Its methods raise Ended if the process has ended.
    """

    def __init__(
        self,
        script: str,
        case: Case,
        variant: str = "",
        patience: float | None = None,
        seconds: float | None = None,
        env: Mapping[str, str] = MappingProxyType({}),
    ):
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "lib" / script), json.dumps(case), variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
            env={**os.environ, **FAIR, "PYTHONPATH": path, **env},
        )
        longest = threading.TIMEOUT_MAX
        self.end = time.monotonic() + (seconds or longest)
        self.overdue, self.ready = False, None
        self._allow(min(patience or longest, seconds or longest))

    def _allow(self, seconds: float) -> None:
        """Sets the time after which the process is killed."""
        self.limit = threading.Timer(max(0.0, seconds), self._overdue)
        self.limit.daemon = True
        self.limit.start()

    @property
    def started(self) -> dict[str, float]:
        """Waits until it is ready; returns the seconds of its build and first run."""
        if self.ready is None:  # cached_property of Python 3.11 locks all instances
            self.ready = self._read()
            self.limit.cancel()
            self._allow(min(self.end - time.monotonic(), threading.TIMEOUT_MAX))
        return self.ready

    def ask(self, times: int = 1) -> float:
        """Returns the mean seconds of one run, over that many runs."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{times}\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise Ended(self._reason()) from error
        return self._read()["seconds"]

    def close(self) -> dict[str, float]:
        """Ends the process; returns its peak host and device memory."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        record = self._read()
        self.process.wait()
        self.limit.cancel()
        return record

    def kill(self) -> None:
        """Kills the process."""
        self.limit.cancel()
        self.process.kill()
        self.process.wait()

    def _overdue(self) -> None:
        self.overdue = True
        self.process.kill()

    def _read(self) -> dict[str, float]:
        """Returns the next record that the process prints."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        self.process.wait()
        raise Ended(self._reason())

    def _reason(self) -> str:
        if self.overdue:
            return f"not done after {self.limit.interval:.0f} s"
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        print(f"{self.process.args} ended:", *lines[-40:], sep="\n  ", flush=True)
        errors = [
            line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)
        ]
        last = (errors or lines or ["no output"])[-1]
        if OUT_OF_MEMORY.search(last):
            return "out of memory"
        return f"{last[:200]} (status {self.process.returncode})"


Makers = dict[str, Callable[[], Contender]]


def alternate(
    contenders: Makers, repeats: int, seconds: float = 1.0
) -> dict[str, dict[str, Any]]:
    """Measures all contenders in turn; a turn is as many runs as take `seconds`.

    Raises Ended if one of them fails.
    """
    alone = [{name: make} for name, make in contenders.items()]
    rows = race(alone, repeats, seconds)
    for name, row in rows.items():
        if "error" in row:
            raise Ended(f"{name}: {row['error']}")
    return rows


def race(
    waves: Sequence[Makers], repeats: int, seconds: float = 1.0
) -> dict[str, dict[str, Any]]:
    """Measures as `alternate`, but a contender that fails has a row {"error": reason}.

    The contenders of a wave start together, and are ready before the next wave starts.
    So "build" and "first" are measured while the machine is busy with the whole wave.
    """
    names = [name for wave in waves for name in wave]
    living: dict[str, Contender] = {}
    rows: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    counts: dict[str, int] = {}

    def each(work: Callable[[str], Any], subset: Iterable[str]) -> None:
        for name in [n for n in subset if n not in rows]:
            try:
                work(name)
            except Ended as error:
                rows[name] = {"error": str(error)}

    def start(name: str) -> None:
        _ = living[name].started

    def count(name: str) -> None:
        counts[name] = max(1, round(seconds / living[name].ask()))

    def measure(name: str) -> None:
        times[name].append(living[name].ask(counts[name]))

    def end(name: str) -> None:
        one = living[name]
        rows[name] = {"all": times[name], **summary(times[name]), **one.started}
        with contextlib.suppress(Ended):  # keeps the times if the memory is unknown
            rows[name] |= one.close()

    try:
        for wave in waves:
            living.update((name, make()) for name, make in wave.items())
            with ThreadPoolExecutor(
                len(wave) or 1
            ) as pool:  # each has its own time limit
                list(pool.map(lambda name: each(start, [name]), wave))
        each(count, names)
        for _ in range(repeats):
            each(measure, names)
        each(end, names)
    finally:
        for contender in living.values():
            contender.kill()
    return {name: rows[name] for name in names}


def summary(values: list[float]) -> dict[str, float]:
    """Returns the median, and the quartiles as low and high."""
    low, mid, high = np.percentile(values, [25, 50, 75])
    return {"median": float(mid), "low": float(low), "high": float(high)}


def ratio(rows: dict[str, dict], over: str, under: str) -> dict[str, float]:
    """Returns the ratio of times of `over` and `under`, taken within each round."""
    pairs = zip(rows[over]["all"], rows[under]["all"], strict=True)
    return summary([a / b for a, b in pairs])


def machine() -> dict[str, Any]:
    """Describes the machine and the versions of a measurement."""
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
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def write(path: str, record: dict[str, Any]) -> None:
    """Writes the record as JSON, with a description of the machine."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(
        json.dumps({**machine(), **record}, indent=1) + "\n", encoding="utf-8"
    )
    print(path)


def options(description: str | None, out: str) -> argparse.ArgumentParser:
    """Returns a parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default=out)
    return parser
