"""Builds and loads `decode.cpp`: products of a few rows with weights that are read once, on CPUs.

Built by the machine's C++ compiler at the first use, for this processor, and kept where PyTorch keeps its extensions
(`TORCH_EXTENSIONS_DIR`, by default `~/.cache/torch_extensions`).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("decode.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC")
THREADS = ("-fopenmp",)
"""PyTorch's `parallel_for` is a header: without OpenMP it runs on one thread, and says nothing."""
ONE_THREAD = ("-fopenmp-simd", "-DONE_THREAD")
"""For a compiler that has no OpenMP."""
MOST_ROWS = 8
"""Rows up to which a weight is read once; more pay for a library's matrix product."""


@cache
def load() -> str | None:
    """Registers `torch.ops.dynadepth.small_linear` and `path_step`. Returns None, or in a few words why they cannot be
    had here."""
    if hasattr(torch.ops.dynadepth, "small_linear"):
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler was found (g++, clang++ or the variable CXX)"
    try:
        torch.ops.load_library(_built(compiler))
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        return f"{compiler} could not build it: {said.strip().splitlines()[0] if said.strip() else error!r}"
    torch.library.register_fake("dynadepth::small_linear")(_shape)
    torch.library.register_fake("dynadepth::path_step")(_shapes)
    return None


def _shape(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _shapes(
    x: Tensor, read: Tensor, write: Tensor, bias: Tensor, last: Tensor, total: Tensor, count: Tensor
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), torch.empty_like(last), torch.empty_like(total), torch.empty_like(count)


def _built(compiler: str) -> str:
    """The library's path; built unless the same source was built by the same compiler for the same machine."""
    from torch.utils import cpp_extension  # imports setuptools

    include = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    links = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / "dynadepth"

    def built(threads: tuple[str, ...]) -> Path:
        told = (SOURCE.read_text(), torch.__version__, version, *FLAGS, *threads, platform.platform(), _processor())
        key = hashlib.sha256("\0".join(told).encode()).hexdigest()[:16]
        target = folder / f"decode-{key}.so"
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # several processes may build at once
            output = Path(scratch) / target.name
            command = [compiler, *FLAGS, *threads, *include, str(SOURCE), "-o", str(output), *links]
            subprocess.run(command, capture_output=True, text=True, check=True)
            output.replace(target)
        return target

    try:
        return str(built(THREADS))
    except subprocess.CalledProcessError:
        library = str(built(ONE_THREAD))
        warnings.warn(
            f"{compiler} has no OpenMP, so that a compiled decode computes its products on one thread: install it, or "
            "name another compiler in the variable CXX.",
            UserWarning,
            stacklevel=2,
        )
        return library


def _processor() -> str:
    """What this processor can do: a folder of builds may be shared between machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
