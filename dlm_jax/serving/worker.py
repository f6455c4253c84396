# SPDX-License-Identifier: Apache-2.0
"""One thread that runs the model for all clients; it joins requests of a kind in a batch."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dlm_jax.errors import UserError
from dlm_jax.inference import streaming
from dlm_jax.inference.pipeline import DiffusionLM
from dlm_jax.inference.streaming import Asked, Frame

MAX_ROWS = 32  # texts of a batch
MAX_WAITING = 64  # jobs
DRAWS = 64  # noise levels of a likelihood


class BusyError(Exception):
    """As many jobs wait as may."""


@dataclass(eq=False)
class Job:
    """Work for the model: texts to make, or ids [n l] to score.

    put receives each `Frame` of the job's own texts, or its bound, then None; or an
    exception. It is called in the worker's thread. cancelled: nobody waits for it.
    """

    work: Asked | np.ndarray
    put: Callable[[Any], Any]
    cancelled: bool = False

    @property
    def rows(self) -> int:
        """The number of texts."""
        return self.work.request.n if isinstance(self.work, Asked) else len(self.work)


def kind(work: Asked | np.ndarray) -> Any:
    """Returns what two jobs must have in common to run together."""
    if not isinstance(work, Asked):
        return "nll"
    made, rows = work.request, work.request.constraints
    bare = rows._replace(phrases=())  # phrases are padded to the longest
    shapes = [np.shape(x)[1:] for x in jax.tree.leaves(bare)]
    return made.sampling, made.guidance, jax.tree.structure(rows), shapes


class Worker:
    """The thread and its queue of jobs."""

    def __init__(self, lm: DiffusionLM):
        self.lm, self._jobs, self._ready = lm, deque[Job](), threading.Condition()
        threading.Thread(target=self._serve, daemon=True).start()

    def submit(self, job: Job) -> None:
        """Adds a job. Raises BusyError."""
        with self._ready:
            self._jobs = deque(j for j in self._jobs if not j.cancelled)
            if len(self._jobs) >= MAX_WAITING:
                raise BusyError
            self._jobs.append(job)
            self._ready.notify()

    def _serve(self) -> None:
        while True:
            jobs = self._take()
            run = self._stream if isinstance(jobs[0].work, Asked) else self._score
            try:
                run(jobs)
                ends = [None] * len(jobs)
            except Exception as error:
                ends = [error] * len(jobs)
            for job, end in zip(jobs, ends, strict=True):
                job.put(end)

    def _take(self) -> Sequence[Job]:
        """Waits for a job; takes along those of its kind that wait, in their order."""
        with self._ready:
            self._ready.wait_for(lambda: self._jobs)
            first = self._jobs.popleft()
            jobs, rows, wanted = [first], first.rows, kind(first.work)
            for job in list(self._jobs):
                if rows + job.rows <= MAX_ROWS and kind(job.work) == wanted:
                    self._jobs.remove(job)
                    jobs.append(job)
                    rows += job.rows
        return jobs

    def _stream(self, jobs: Sequence[Job]) -> None:
        ends = np.cumsum([job.rows for job in jobs])
        works: Any = [job.work for job in jobs]
        for frame in streaming.stream(self.lm, [work.request for work in works]):
            parts = zip(*(np.split(x, ends[:-1]) for x in frame[2:]), strict=True)
            for job, part in zip(jobs, parts, strict=True):
                if not job.cancelled:
                    job.put(Frame(frame.step, frame.num_steps, *part))
            if all(job.cancelled for job in jobs):
                return

    def _score(self, jobs: Sequence[Job]) -> None:
        works: Any = [job.work for job in jobs]
        bound = self.lm.nll(np.concatenate(works), draws=DRAWS)
        first = 0
        for job in jobs:
            here = slice(first, first + job.rows)
            columns = (bound.total(), bound.length, bound.stderr, bound.tokens)
            job.put(tuple(column[here] for column in columns))
            first += job.rows


def reason(error: Exception) -> str:
    """Returns what a client is told of an error."""
    return str(error) if isinstance(error, UserError) else "the model failed"
