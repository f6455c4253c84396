# SPDX-License-Identifier: Apache-2.0
"""Saves the trace of one training step and prints its longest kernels.

python benchmarks/stages/trace.py TRACE.tar.gz CASE-AS-JSON
"""

import collections
import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import limit
from lib import alternate, ours
from lib.alternate import Case


def kernels(path: Path) -> dict[str, float]:
    """Returns the milliseconds by kernel, of the device's planes if there are any."""
    data = jax.profiler.ProfileData.from_file(str(path))
    planes = [p for p in data.planes if "/device:" in (p.name or "")]
    spent: collections.Counter = collections.Counter()
    for plane in planes or data.planes:
        for line in plane.lines:
            for event in line.events:
                if "hlo_op" in dict(event.stats):
                    spent[str(event.name)] += event.duration_ns / 1e6
    return dict(spent.most_common())


def main(out: str, case: Case) -> None:
    """Traces one step after two warm-up steps; prints the shares of its kernels."""
    step = ours.Training(alternate.settings(case), case.vocab)
    for _ in range(2):
        step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step()
        with tarfile.open(out, "w:gz") as file:
            file.add(folder, "trace")
        (path,) = Path(folder).rglob("*.xplane.pb")
        spent = kernels(path)
    total = sum(spent.values()) or 1.0
    parts: dict[str, Any] = limit.profiled(step, step.compiled().as_text())
    print("parts: " + ", ".join(f"{name} {share:.0%}" for name, share in parts.items()))
    print(f"kernels of one step, {total:.1f} ms:")
    for name, ms in list(spent.items())[:15]:
        print(f"  {ms:8.2f} ms {ms / total:5.1%}  {name[:90]}")


if __name__ == "__main__":
    main(sys.argv[1], Case(*json.loads(sys.argv[2])))
