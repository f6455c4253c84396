# SPDX-License-Identifier: Apache-2.0
"""Measures training and sampling of the 87M model beside PyTorch on the same device.

Every contender has its own process (`lib/alternate.py`). dlm_jax is first measured
alone, so that its figures exist even if time runs out. In a race with the PyTorch peers
it starts first, the peers start together when it is ready, and all are then measured in
turn.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
from functools import partial
from typing import Any

import limit
from lib import alternate
from lib.alternate import Case, Contender, Makers

from stages import Job

CONFIGS = {"e2e": "configs/e2e.py", "e2e:modern": "configs/e2e.py:modern"}
# No dropout with self-conditioning: the peer cannot disable it in the first estimate,
# as dlm_jax does. Fused attention has none in either. The published recipe has no
# self-conditioning.
CHANGE = {"e2e": (), "e2e:modern": ("model.dropout=0.0", "model.attention_dropout=0.0")}
TINY = (
    "model.hidden_dim=32",
    "model.mlp_dim=64",
    "model.layers=1",
    "model.heads=2",
    "model.dim=16",
)
PEERS = {"e2e": ("eager", "bf16", "compiled"), "e2e:modern": ("bf16", "compiled")}
GUARD = 20.0  # seconds that a race needs after its slowest contender has started
PATIENCE = 100.0  # seconds in which a peer must be ready
PROFILE = 75.0  # seconds allowed for the trace


class Plan:
    """The sizes to measure, or those of a rehearsal; seconds: the time a race needs."""

    def __init__(self, job: Job):
        tiny = job.rehearse
        self.batches = (2,) if tiny else (64, 256)
        self.larger = (4,) if tiny else (512, 1024, 2048)
        self.chain_batch, self.num_steps = (2, (3,)) if tiny else (50, (32, 200))
        self.change = TINY if tiny else ()
        self.dtype = "float32" if tiny else "bfloat16"
        self.repeats, self.turn = (2, 0.01) if tiny else (5, 0.3)
        self.seconds = 10 if tiny else 45

    def case(self, name: str, batch: int, **other: Any) -> Case:
        """Returns a case of this config that the peers can also compute."""
        change = (*CHANGE[name], *self.change)
        length = 16 if self.change else 0
        return Case(CONFIGS[name], batch=batch, length=length, change=change, **other)


def peers(job: Job, backend: str) -> tuple[tuple[str, ...], str]:
    """Returns the peers that can run here, and a note if some cannot."""
    missing = [n for n in ("torch", "transformers") if not importlib.util.find_spec(n)]
    if missing:
        return (), f"no peers: {' and '.join(missing)} not installed (extra `peer`)"
    if backend == "tpu":
        return (), "no peers: PyTorch does not run on this device"
    if backend == "gpu":
        program = "import torch; raise SystemExit(not torch.cuda.is_available())"
        if subprocess.run([sys.executable, "-c", program]).returncode:
            return (), "no peers: this PyTorch does not see the GPU"
    return ("eager", "bf16") if job.rehearse else ("eager", "bf16", "compiled"), ""


class Races:
    """Runs races while time is left, and reports every row immediately.

    A case that was measured before is measured again beside new peers. Its row keeps
    the figures of earlier peers and the seconds of its first compilation.
    """

    def __init__(self, job: Job, plan: Plan, record: dict[str, Any]):
        self.job, self.plan, self.record = job, plan, record

    def run(
        self,
        cases: dict[str, Case],
        variants: dict[str, tuple[str, ...]] | None = None,
        *,
        apart: bool = False,
    ) -> None:
        """Races all cases with their peers; apart: starts one process at a time."""
        if self.job.left() < self.plan.seconds:
            for name in cases.keys() - self.record["rows"].keys():
                self.keep(name, {"skipped": f"{max(0, self.job.left()):.0f} s left"})
            return
        env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} if apart else {}
        ours: Makers = {
            f"{name}/ours": partial(self._ours, case, env)
            for name, case in cases.items()
        }
        peers: Makers = {
            f"{name}/{variant}": partial(self._peer, case, variant)
            for name, case in cases.items()
            for variant in (variants or {}).get(name, ())
        }
        # dlm_jax first: XLA times kernels to choose them, which peers would disturb
        plan = self.plan
        lanes = [[{n: make}] for n, make in (ours | peers).items()]
        times: dict[str, Any] = {}
        for waves in lanes if apart else [[ours, peers]]:
            times |= alternate.race(waves, plan.repeats, plan.turn)
        for name, case in cases.items():
            start = f"{name}/"
            rows = {n[len(start) :]: r for n, r in times.items() if n.startswith(start)}
            self.keep(name, self._merged(name, self._row(case, rows)))

    def _ours(self, case: Case, env: dict[str, str]) -> Contender:
        change = (*case.change, f"model.dtype={self.plan.dtype}")
        case = case._replace(change=change)
        return Contender("ours.py", case, "", self._left(), self._left(), env)

    def _peer(self, case: Case, variant: str) -> Contender:
        """Makes a peer; it uses JAX for the config only, and must be ready in time."""
        patience, env = min(self._left(), PATIENCE), {"JAX_PLATFORMS": "cpu"}
        return Contender("torch_peer.py", case, variant, patience, self._left(), env)

    def _left(self) -> float:
        return max(1.0, self.job.left() - GUARD)

    def _merged(self, name: str, row: dict[str, Any]) -> dict[str, Any]:
        old = self.record["rows"].get(name, {})
        if "ratios" not in old:
            return row
        new, before = row["contenders"], old["contenders"]
        peers = {n: r for n, r in new.items() if n != "ours"}
        if "ratios" not in row:  # dlm_jax failed this time: keep the first row
            return {**old, "contenders": before | peers}
        start = {n: before["ours"][n] for n in ("build", "first")}
        contenders = {**before, **new, "ours": new["ours"] | start}
        return {
            **row,
            "contenders": contenders,
            "ratios": old["ratios"] | row["ratios"],
        }

    def _row(self, case: Case, rows: dict[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {**case._asdict(), "contenders": rows}
        if "error" in rows["ours"]:
            return {**row, "error": rows["ours"]["error"]}
        others = [n for n in rows if n != "ours" and "error" not in rows[n]]
        row["ratios"] = {n: alternate.ratio(rows, n, "ours") for n in others}
        config = alternate.settings(case)
        forward = limit.operations(config, case.vocab)
        seconds = rows["ours"]["median"]
        passes = case.num_steps
        if case.job == "train":
            passes = 4 if config.model.self_cond else 3
            row["tokens/s"] = config.train.batch * config.data.length / seconds
        if case.job != "guided":  # the classifier's operations are not counted
            row["TFLOP/s"] = 1e-12 * passes * forward / seconds
            if peak := self.record.get("peak, TFLOP/s"):
                row["share of the peak"] = row["TFLOP/s"] / peak
        return row

    def keep(self, name: str, row: dict[str, Any]) -> None:
        """Stores and reports a row."""
        self.record["rows"][name] = row
        self.job.report(self.record)

    def rate(self, name: str) -> float:
        """Returns the tokens per second of a row; 0 if it has none."""
        return self.record["rows"].get(name, {}).get("tokens/s", 0.0)


def run(job: Job, machine: dict[str, Any]) -> None:
    """Reports a row for every case; machine: the record of that stage."""
    variants, note = peers(job, machine.get("backend", "cpu"))
    record: dict[str, Any] = {"note": note, "rows": {}}
    record["peak, TFLOP/s"] = machine.get("bfloat16, TFLOP/s")
    job.report(record)
    plan = Plan(job)
    races = Races(job, plan, record)
    beside = {n: tuple(v for v in PEERS[n] if v in variants) for n in CONFIGS}
    _ours_alone(races)
    if job.profile:
        record["profile"] = profile(job, plan)
        job.report(record)
    fast = {n: tuple(x for x in v if x != "compiled") for n, v in beside.items()}
    slow = {n: tuple(x for x in v if x == "compiled") for n, v in beside.items()}
    for batch in reversed(plan.batches):
        _beside(races, batch, fast)
    _beside(races, plan.batches[-1], slow)
    _chains(races, plan.num_steps[:1], fast)  # guided chains take minutes to compile
    for name in CONFIGS:
        _largest(races, name, fast[name] + slow[name])
    _beside(races, plan.batches[0], slow)
    _check(record)


def _check(record: dict[str, Any]) -> None:
    """Raises the first error of dlm_jax other than a lack of memory or time."""
    for name, row in record["rows"].items():
        why = row.get("error", "")
        if why and why != "out of memory" and not why.startswith("not done"):
            raise RuntimeError(f"{name}: {why}")


def _training(races: Races, batch: int) -> dict[str, Case]:
    return {_title(n, batch): races.plan.case(n, batch) for n in CONFIGS}


def _title(name: str, batch: int) -> str:
    return f"{name}, training step, batch {batch}"


def _ours_alone(races: Races) -> None:
    """Measures steps and chains of dlm_jax, without peers."""
    cases: dict[str, Case] = {}
    for batch in races.plan.batches:
        cases |= _training(races, batch)
    races.run(cases)
    _chains(races, races.plan.num_steps, {})


def _beside(races: Races, batch: int, variants: dict[str, tuple[str, ...]]) -> None:
    """Measures training steps beside these peers, if there are any."""
    titles = {_title(n, batch): v for n, v in variants.items() if v}
    cases = {t: c for t, c in _training(races, batch).items() if t in titles}
    if cases:
        races.run(cases, titles)


def _chains(
    races: Races, steps: tuple[int, ...], beside: dict[str, tuple[str, ...]]
) -> None:
    """Measures chains and guided chains of each number of steps."""
    plan, cases, variants = races.plan, {}, {}
    for name in CONFIGS:
        for job, n in itertools.product(("chain", "guided"), steps):
            title = f"{name}, {job}, {n} steps, {plan.chain_batch} samples"
            cases[title] = plan.case(name, plan.chain_batch, job=job, num_steps=n)
            variants[title] = beside.get(name, ())
    if not beside or any(variants.values()):
        races.run(cases, variants)


def _largest(races: Races, name: str, variants: tuple[str, ...]) -> None:
    """Doubles the batch while that is faster; then measures the peers at the best.

    Runs one process at a time, because each may need all of the memory.
    """
    best, rate = 0, max(races.rate(_title(name, b)) for b in races.plan.batches)
    for batch in races.plan.larger:
        races.run({_title(name, batch): races.plan.case(name, batch)}, apart=True)
        if races.rate(_title(name, batch)) <= rate:
            break
        best, rate = batch, races.rate(_title(name, batch))
    if best and variants:
        peers = tuple(v for v in variants if v != "eager")
        title = _title(name, best)
        races.run({title: races.plan.case(name, best)}, {title: peers}, apart=True)


def profile(job: Job, plan: Plan) -> list[str]:
    """Saves the trace of a training step beside the JSON; returns its summary."""
    case = plan.case("e2e", plan.batches[-1])
    change = (*case.change, f"model.dtype={plan.dtype}")
    command = [
        sys.executable,
        str(alternate.HERE / "stages" / "trace.py"),
        str(job.path.with_name("trace.tar.gz")),
        json.dumps(case._replace(change=change)),
    ]
    limit = max(1.0, min(PROFILE, job.left() - GUARD))
    options: Any = {"capture_output": True, "encoding": "utf-8", "timeout": limit}
    try:
        done = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        return [f"no profile: not done after {limit:.0f} s"]
    if done.returncode:
        return [f"no profile: {(done.stderr.strip().splitlines() or ['?'])[-1]}"]
    return done.stdout.splitlines()


HEAD = f"{'':52s}{'ms':>10s}{'eager':>7s}{'best':>7s}{'tokens/s':>11s}{'peak':>6s}{'MB':>8s}{'compile':>9s}"


def table(record: dict[str, Any]) -> list[str]:
    """Returns a line per row: ms, the peers' times over it, rate, memory, start-up."""
    lines = [record["note"]] if record.get("note") else []
    lines.append(HEAD)
    for name, row in record.get("rows", {}).items():
        lines.append(f"{name:52s}" + _cells(row))
        for peer, result in row.get("contenders", {}).items():
            if peer != "ours" and "error" in result:
                lines.append(f"    {peer}: {result['error']}")
    return lines + record.get("profile", [])


def _cells(row: dict[str, Any]) -> str:
    if why := row.get("error") or row.get("skipped"):
        return f"  {why}"
    ours, ratios = row["contenders"]["ours"], row["ratios"]
    fast = [r["median"] for n, r in ratios.items() if n != "eager"]
    eager = f"{ratios['eager']['median']:7.2f}" if "eager" in ratios else f"{'-':>7s}"
    best = f"{min(fast):7.2f}" if fast else f"{'-':>7s}"
    rate = f"{row['tokens/s']:11,.0f}" if "tokens/s" in row else f"{'-':>11s}"
    share = row.get("share of the peak")
    share = f"{share:6.0%}" if share else f"{'-':>6s}"
    memory = ours.get("device_mb") or ours["peak_mb"]
    ready = ours["build"] + ours["first"]
    return f"{1e3 * ours['median']:10.1f}{eager}{best}{rate}{share}{memory:8.0f}{ready:8.0f}s"
