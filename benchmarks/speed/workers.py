"""Processes that work in turns, one round each, so that drift of the machine hits all of them alike and each has a peak
memory of its own. A request is one JSON line, and so is its answer. Nothing but the standard library: a worker may run
in another environment.
"""

import contextlib
import json
import os
import subprocess
import sys


class Worker:
    """A process that `serve`s. Ends with the `with` block."""

    def __init__(self, *command: str) -> None:
        self.command = command
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: object) -> dict:
        """The answer; SystemExit where the process ended instead (its own words are on stderr)."""
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{' '.join(self.command)} ended with exit code {self.process.wait()}")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve(answer) -> None:
    """Answers each request with `answer(**request)`, a mapping, until there are no more.

    Whatever is printed meanwhile goes to stderr.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=out, flush=True)
