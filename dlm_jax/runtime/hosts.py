# SPDX-License-Identifier: Apache-2.0
"""Hosts: joining them, ending them together, signals.

One host's mistake ends all of them with one line; a lost host ends the others with a
status that asks for a restart.
"""

import contextlib
import glob
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from dlm_jax.errors import UserError

# seconds that hosts wait for: a sign of life, each other's start, each other's end
HEARTBEAT, START, END = 30, 300, 60
MISTAKE, EVERY = "dlm_jax/mistake", 2.0  # what a host tells; seconds between questions
ENDING = threading.RLock()  # one line is a process's last


def initialize(coordinator: str, processes: int, process: int) -> None:
    """Joins the other hosts, before any device is touched; a no-op for one alone.

    Without a coordinator the cluster says who they are: Slurm, Open MPI or Cloud TPU.
    """
    alone = processes == 1 and not coordinator and not process
    if alone and not in_cluster(os.environ):
        return
    if not alone and (not coordinator or not 0 <= process < processes):
        raise UserError(
            f"--num_processes={processes} --process_id={process} "
            f"--coordinator={coordinator!r}: give host:port of process 0 and a number "
            "from 0 up to num_processes"
        )
    named = (None, None, None) if alone else (coordinator, processes, process)
    try:
        jax.distributed.initialize(
            *named,
            initialization_timeout=START,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=END,
        )
    except (RuntimeError, ValueError) as error:
        where = f"--coordinator={coordinator}" if coordinator else "this cluster"
        raise UserError(f"{where}: {error}") from error
    threading.Thread(target=_listen, daemon=True).start()
    _check_name(socket.gethostname())


def _check_name(name: str) -> None:
    """UserError unless Gloo, which links CPUs, will find this host by its own name.

    JAX makes that link wherever a CPU is one of its backends, and its own word for the
    failure names neither the host nor a remedy.
    """
    config: Any = jax.config  # types do not show its settings
    gloo = config.jax_cpu_collectives_implementation == "gloo"
    if not gloo or "cpu" not in (config.jax_platforms or "cpu").split(","):
        return
    found = []
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    if any(_is_here(family, address) for family, _, _, _, address in found):
        return
    what = "is no address of this machine" if found else "does not resolve"
    raise UserError(
        f"the host name {name} {what}; add it to /etc/hosts ('127.0.0.1 {name}' where "
        "all hosts are on this machine)"
    )


def _is_here(family: int, address: Any) -> bool:
    with contextlib.suppress(OSError), socket.socket(family) as tried:
        tried.bind(address)
        return True
    return False


def _key_value_store() -> Any:
    """What hosts know together; JAX has no public name for it."""
    return distributed.global_state.client


def _process_index_and_count() -> tuple[int, int]:
    """`hosts()`, but starts no backend: errors may be that none can be started."""
    return distributed.global_state.process_id, distributed.global_state.num_processes


def fail_all_hosts(line: str) -> NoReturn:
    """Ends all hosts, status 2: to start the others again would be no help."""
    if jax.distributed.is_initialized():
        text = line.encode("utf-8", "replace").decode()
        with contextlib.suppress(Exception):  # another was first, or all are gone
            _key_value_store().key_value_set(
                MISTAKE, f"process {_process_index_and_count()[0]}: {text}"
            )
        _linger()
    exit_process(2)


def _linger() -> None:
    """The first host ends last: it keeps what they know."""
    time.sleep(0 if _process_index_and_count()[0] else 2 * EVERY)


def poll_remote_error() -> None:
    """Ends this host, status 2, if another has told what their user must mend."""
    try:
        line = _key_value_store().key_value_try_get(MISTAKE)
    except Exception as error:
        if "NOT_FOUND" in str(error):
            return
        raise
    if line.startswith(f"process {_process_index_and_count()[0]}:"):
        return
    with ENDING:
        try:
            print(f"error: {line}", file=sys.__stderr__)  # sys.stderr may be set aside
            _linger()
        finally:
            exit_process(2)


def _listen() -> None:
    while _key_value_store() is not None:
        time.sleep(EVERY)
        with contextlib.suppress(Exception):
            poll_remote_error()


def in_cluster(env: Any) -> bool:
    """Whether this process is one of a cluster's, by what the cluster sets."""
    several = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(env[name]) > 1 for name in several if name in env):
        return True
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips and importlib.util.find_spec("libtpu"))


def process_index_and_count() -> tuple[int, int]:
    """(this host's number, number of hosts)."""
    return jax.process_index(), jax.process_count()


def describe() -> str:
    """One line on the devices at hand."""
    kind = jax.devices()[0].device_kind
    return (
        f"process {jax.process_index()} of {jax.process_count()}, "
        f"{jax.local_device_count()} local of {jax.device_count()} devices ({kind})"
    )


def host_loss_reason(error: BaseException | None) -> str:
    """What it, or what it came of, tells of another host's end; else "".

    A user's mistake and a disk's names a file, whatever that is called.
    """
    signs = ("Gloo", "heartbeat", "oordination", "preempted", "UNAVAILABLE", "peer")
    while error is not None and _process_index_and_count()[1] > 1:
        said = "" if isinstance(error, UserError | OSError) else str(error)
        if any(sign in said for sign in signs):
            return said.splitlines()[0][:200]
        error = error.__cause__
    return ""


def barrier(name: str) -> None:
    """Until every host has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_from_host0(number: int) -> int:
    """The first host's number, on all of them."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int64(number)))


def exit_process(status: int) -> NoReturn:
    """Ends this process; one of several at once, so that the others see it."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class Preemption:
    """Whether to save and stop: SIGTERM, as preemption and maintenance send it.

    Asked once a step by every host; a signal to one stops all at the same step. With one
    process Python's handler sees it, with several JAX's service does.
    """

    def __init__(self) -> None:
        self.asked = False
        main = threading.current_thread() is threading.main_thread()
        self.handler = jax.process_count() == 1 and main
        if self.handler:
            self.before = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def __call__(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self.asked
        return multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Gives the signal back."""
        if self.handler:
            signal.signal(signal.SIGTERM, self.before)
