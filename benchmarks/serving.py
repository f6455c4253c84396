# SPDX-License-Identifier: Apache-2.0
"""Load on the web API: 50 clients at once, each its next request when answered.

    python benchmarks/serving.py --out benchmarks/results/serving.json

Starts `dlm serve` in a process of its own and counts the answers by status; a client that
is told to wait (503) waits as told and asks again. Requests that get no answer are lost.
"""

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np


async def _client(number: int, http: httpx.AsyncClient, body: dict, end: float, found):
    seed = number * 10**6
    while time.monotonic() < end:
        seed, start = seed + 1, time.monotonic()
        try:
            answer = await http.post("/v1/sample", json=body | {"seed": seed})
        except httpx.HTTPError as error:
            found["lost"].append(repr(error))
            continue
        found["status"][answer.status_code] += 1
        if answer.status_code == 503:
            await asyncio.sleep(float(answer.headers["retry-after"]))
        elif answer.status_code == 200:
            assert len(answer.json()["texts"]) == body["n"]
            found["seconds"].append(time.monotonic() - start)


async def _load(url: str, clients: int, seconds: float, body: dict) -> dict:
    found = {"status": Counter(), "seconds": [], "lost": []}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        await http.post("/v1/sample", json=body)  # compiles
        end = time.monotonic() + seconds
        await asyncio.gather(
            *(_client(i, http, body, end, found) for i in range(clients))
        )
    return found


def _wait(url: str) -> None:
    for _ in range(300):
        try:
            httpx.get(f"{url}/v1/model", timeout=5)
            return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise TimeoutError(url)


def main() -> None:
    """Prints the answers by status, the texts per second and the latencies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="e2e")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--num_steps", type=int, default=16)
    parser.add_argument("--out")
    args = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "dlm_jax.main", "--mode", "serve"]
    command += ["--model", args.model, "--port", str(port)]
    body = {"n": 2, "num_steps": args.num_steps}
    server = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url)
        found = asyncio.run(_load(url, args.clients, args.seconds, body))
    finally:
        server.terminate()
        server.wait()
    seconds = np.array(found["seconds"])
    result = {
        "model": args.model,
        "clients": args.clients,
        "seconds": args.seconds,
        "request": body,
        "answers": {str(k): v for k, v in sorted(found["status"].items())},
        "lost": len(found["lost"]),
        "texts_per_second": round(len(seconds) * body["n"] / args.seconds, 1),
        "latency_seconds": {
            name: round(float(np.quantile(seconds, q)), 2)
            for name, q in (("median", 0.5), ("95%", 0.95), ("most", 1.0))
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
