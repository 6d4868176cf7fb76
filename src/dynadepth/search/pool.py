"""Groups of questions searched by several processes; what a process that dies was given is searched again.

A group at which process after process dies is left out, so that one prompt too large for the memory does not keep the
others from being searched; they are searched before it is tried again.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from dynadepth.errors import DynadepthError, SearchError
from dynadepth.route_file import PromptRoutes
from dynadepth.search.questions import Question
from dynadepth.search.searcher import Searcher, SearchSettings

Load = Callable[[], Any]
"""Gives the model; is sent to the processes, so it is a function of a module, or a `functools.partial` of one."""

MOST_DEATHS = 3
"""So many processes may die at one group before it is left out, or altogether before any group is finished."""

Group = list[Question]


@dataclass
class _Worker:
    process: Any
    connection: Connection
    group: Group


def in_processes(
    load: Load,
    settings: SearchSettings,
    groups: list[Group],
    workers: int,
    memory: int,
    died: Callable[[str], object] | None = None,
) -> Iterator[list[PromptRoutes]]:
    """The routes of each group, as they are finished. `memory`: bytes for each process; they share the cores.

    `died` is told of processes that were replaced, and of groups that are left out. Raises `SearchError` where process
    after process dies before any group is finished, and a `DynadepthError` that a process raised.
    """
    waiting = deque(groups)
    deaths: Counter[tuple[str, str]] = Counter()
    running: dict[Connection, _Worker] = {}
    workers = min(workers, len(groups))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = (load, settings, memory, max(1, cores // max(1, workers)))
    finished = False

    def start() -> None:
        context = mp.get_context("spawn")  # torch's threads do not survive a fork
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, *share), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends when the process does
        give(_Worker(process, ours, []))

    def give(worker: _Worker) -> None:
        worker.group = waiting.popleft() if waiting else []
        running[worker.connection] = worker
        with suppress(OSError):  # it may be dead: the pipe says so to the one who reads it
            worker.connection.send(worker.group)
        if not worker.group:
            del running[worker.connection]
            worker.process.join()
            worker.connection.close()

    try:
        for _ in range(workers):
            start()
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                worker = running[connection]
                try:
                    kind, answer = connection.recv()
                except (EOFError, OSError):
                    kind, answer = "died", None
                if kind == "raised":
                    raise answer
                if kind == "found":
                    finished = True
                    give(worker)
                    yield answer
                    continue
                del running[connection]
                worker.process.join()
                connection.close()
                first = worker.group[0].source, worker.group[0].id
                deaths[first] += 1
                why = f"exit code {worker.process.exitcode}" if answer is None else answer
                what = f"a worker died ({why}) at the {len(worker.group)} prompts from {first[1]} on"
                last = deaths[first] == MOST_DEATHS
                if not finished and deaths.total() == MOST_DEATHS:
                    raise SearchError(
                        f"{what}, for the last of {MOST_DEATHS} times: there may be too little memory; go on with "
                        f"--resume and fewer --workers than {workers}."
                    )
                if died is not None:
                    left = f"They are left out after {MOST_DEATHS} times: --resume and fewer --workers than {workers}"
                    died(f"{what}. {left} may get them done." if last else f"{what}; they are searched again.")
                if not last:
                    waiting.append(worker.group)
                if waiting:
                    start()
    finally:
        for worker in running.values():
            worker.process.terminate()
            worker.process.join()
            worker.connection.close()


def _work(connection: Connection, load: Load, settings: SearchSettings, memory: int, threads: int) -> None:
    """A process: groups in, routes out, until an empty one comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who waits
    import torch

    torch.set_num_threads(threads)
    try:
        searcher = Searcher(load(), settings, memory)
        while group := connection.recv():
            connection.send(("found", searcher.search(group)))
    except DynadepthError as error:
        connection.send(("raised", error))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the other side is gone
        return
    except Exception as error:
        traceback.print_exc()  # this process's standard error is the search's
        connection.send(("failed", "".join(traceback.format_exception_only(error)).strip()))
