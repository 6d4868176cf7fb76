"""A rival's process in an environment with llama-cpp-python: `python llama_worker.py FILE.gguf LENGTH THREADS`."""

import itertools
import sys
import time
from pathlib import Path

import llama_cpp
from workers import serve


def peak_rss() -> int | None:
    """Of this program; what `getrusage` says begins with the process that started it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main(path: str, length: str, threads: str) -> None:
    model = llama_cpp.Llama(
        path,
        n_ctx=int(length),
        n_batch=int(length),
        n_ubatch=512,
        n_threads=int(threads),
        n_threads_batch=int(threads),
        verbose=False,
    )

    def answer(prompt: list[int], new_tokens: int) -> dict:
        model.reset()  # nothing of an earlier prompt is reused
        start = time.perf_counter()
        tokens = list(itertools.islice(model.generate(prompt, temp=0.0), new_tokens))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": tokens, "peak": peak_rss(), "version": llama_cpp.__version__}

    serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
