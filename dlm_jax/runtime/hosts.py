# SPDX-License-Identifier: Apache-2.0
"""Hosts and processes: joining, ending together, forks, signals.

A user error on one host ends all hosts with one line. A lost host ends the others with
an exit status that requests a restart.
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
from jax._src import distributed, xla_bridge
from jax.experimental import multihost_utils

from dlm_jax.errors import UserError

# seconds that a host waits for a heartbeat of the others, their start, and their end
HEARTBEAT, START, END = 30, 300, 60
MISTAKE, EVERY = "dlm_jax/mistake", 2.0  # key of a user error; seconds between polls
ENDING = threading.RLock()  # held while exiting: a process prints only one last line


_started = _forked = False  # JAX had started at the last fork; in this process's parent


def _before_fork() -> None:
    global _started  # asked here: in the child another thread's lock would never open
    _started = xla_bridge.backends_are_initialized()


def _after_fork() -> None:
    global _forked
    _forked = _started


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def check_backend() -> None:
    """Starts JAX's backend. Raises UserError if it cannot start or would hang."""
    if _forked:
        raise UserError(
            "this process was forked off one in which JAX had started, where JAX hangs: "
            "start it by spawn (multiprocessing.get_context('spawn')), or fork before "
            "the first use of JAX"
        )
    try:
        jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter has no message
        if _process_index_and_count()[1] > 1:
            raise  # another host may be the reason
        config: Any = jax.config
        reason = (str(error).splitlines() or ["it has no such device"])[0][:200]
        raise UserError(
            f"JAX cannot start with JAX_PLATFORMS={config.jax_platforms or ''} "
            f"({reason}): name a backend that this machine has, or install JAX for it"
        ) from error


def initialize(coordinator: str, processes: int, process: int) -> None:
    """Connects the hosts; call it before any use of devices. A no-op for one process.

    Without a coordinator, the cluster (Slurm, Open MPI or Cloud TPU) names the hosts.
    Raises UserError.
    """
    alone = processes == 1 and not coordinator and not process
    if alone and not in_cluster(os.environ):
        return
    if not alone and (not coordinator or not 0 <= process < processes):
        raise UserError(
            f"--num_processes={processes} --process_id={process} "
            f"--coordinator={coordinator!r}: set --coordinator to host:port of process "
            "0, and --process_id from 0 to below --num_processes"
        )
    arguments = (None, None, None) if alone else (coordinator, processes, process)
    try:
        jax.distributed.initialize(
            *arguments,
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
    """Raises UserError unless Gloo can resolve this host's own name.

    JAX connects CPU backends with Gloo, even beside accelerators. JAX's own error names
    neither the host nor a remedy.
    """
    config: Any = jax.config  # its type lacks the settings
    gloo = config.jax_cpu_collectives_implementation == "gloo"
    if not gloo or "cpu" not in (config.jax_platforms or "cpu").split(","):
        return
    addresses = []
    with contextlib.suppress(OSError):
        addresses = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    if any(_is_here(family, address) for family, _, _, _, address in addresses):
        return
    what = "is not an address of this machine" if addresses else "does not resolve"
    raise UserError(
        f"the host name {name} {what}; add it to /etc/hosts ('127.0.0.1 {name}' where "
        "all hosts are on this machine)"
    )


def _is_here(family: int, address: Any) -> bool:
    with contextlib.suppress(OSError), socket.socket(family) as probe:
        probe.bind(address)
        return True
    return False


def _key_value_store() -> Any:
    """Returns the key-value store of all hosts, which has no public name in JAX."""
    return distributed.global_state.client


def _process_index_and_count() -> tuple[int, int]:
    """Like `process_index_and_count`, but starts no backend: that may have failed."""
    return distributed.global_state.process_id, distributed.global_state.num_processes


def fail_all_hosts(line: str) -> NoReturn:
    """Ends all hosts with status 2, as a restart would not help. line: the error."""
    if jax.distributed.is_initialized():
        text = line.encode("utf-8", "replace").decode()
        with contextlib.suppress(Exception):  # another host was first, or all are gone
            _key_value_store().key_value_set(
                MISTAKE, f"process {_process_index_and_count()[0]}: {text}"
            )
        _linger()
    exit_process(2)


def _linger() -> None:
    """Delays the exit of the first host, which holds the key-value store."""
    time.sleep(0 if _process_index_and_count()[0] else 2 * EVERY)


def poll_remote_error() -> None:
    """Ends this host with status 2 if another has reported a user error."""
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
            print(f"error: {line}", file=sys.__stderr__)  # sys.stderr may be redirected
            _linger()
        finally:
            exit_process(2)


def _listen() -> None:
    while _key_value_store() is not None:
        time.sleep(EVERY)
        with contextlib.suppress(Exception):
            poll_remote_error()


def in_cluster(env: Any) -> bool:
    """Returns whether the environment says that this process is part of a cluster."""
    several = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(env[name]) > 1 for name in several if name in env):
        return True
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips and importlib.util.find_spec("libtpu"))


def process_index_and_count() -> tuple[int, int]:
    """Returns (index of this host, number of hosts)."""
    return jax.process_index(), jax.process_count()


def describe() -> str:
    """Describes the processes and devices in one line."""
    kind = jax.devices()[0].device_kind
    return (
        f"process {jax.process_index()} of {jax.process_count()}, "
        f"{jax.local_device_count()} local of {jax.device_count()} devices ({kind})"
    )


def host_loss_reason(error: BaseException | None) -> str:
    """Returns the line of an error or its causes that shows a lost host, or "".

    UserError and OSError never do: their messages may name a file such as "peer".
    """
    signs = ("Gloo", "heartbeat", "oordination", "preempted", "UNAVAILABLE", "peer")
    while error is not None and _process_index_and_count()[1] > 1:
        message = "" if isinstance(error, UserError | OSError) else str(error)
        if any(sign in message for sign in signs):
            return message.splitlines()[0][:200]
        error = error.__cause__
    return ""


def barrier(name: str) -> None:
    """Waits until every host has reached this call."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_from_host0(number: int) -> int:
    """Returns the first host's value of `number` on every host."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int64(number)))


def exit_process(status: int) -> NoReturn:
    """Ends this process; with several, without cleanup, so that the others notice."""
    if jax.distributed.is_initialized():
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError):  # nobody reads on
                stream.flush()
        os._exit(status)
    sys.exit(status)


class Preemption:
    """Detects SIGTERM, as preemption and maintenance send it, and Ctrl-C: save and stop.

    Every host calls it once per step. A signal to one host stops all at the same step.
    With one process Python's signal handlers detect it, with several JAX's service,
    which hears SIGTERM only. interrupted: it was Ctrl-C; a second one is raised.
    """

    def __init__(self) -> None:
        self.asked = self.interrupted = False
        self.before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return
        if jax.process_count() == 1:
            self._handle(signal.SIGTERM)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in background
            self._handle(signal.SIGINT)

    def _handle(self, number: signal.Signals) -> None:
        self.before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, _: Any) -> None:
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if number == signal.SIGINT:
            self.interrupted = True
            if jax.process_count() > 1:
                signal.raise_signal(signal.SIGTERM)

    def __call__(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self.asked
        return multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
