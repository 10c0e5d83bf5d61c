"""The kernels of kernels.cpp, compiled for this machine when they are first needed and kept in accord's cache.

Without a C++ compiler, or with ``ACCORD_NATIVE=0``, torch does the same work (:mod:`accord.nn.pieces`), slower; a
line says so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from accord.nn.bundled import cache_folder
from accord.progress import console

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
P, N, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
ARGUMENTS = {
    "add_norm": (P, P, P, P, P, N, N, F),
    "norm_backward": (P, P, P, P, P, P, N, N),
    "silu_mul": (P, P, P, N, N, N),
    "silu_backward": (P, P, P, P, P, N, N),
    "rotate_heads": (P, P, P, F, P, N, N, N),
    "attend": (P, P, P, P, P, P, P, N, N, N, N, N, N),
    "draw": (P, P, F, P, P, N, N),
    "token_stats": (P, P, F, P, P, N, N),
    "token_slope": (P, P, F, P, P, P, N, N),
    "quantize": (P, P, P, N, N),
    "dequantize": (P, P, P, P, P, N, N),
}
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none."""
    if os.environ.get("ACCORD_NATIVE", "1") == "0":
        return None
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        console.print("[yellow]No C++ compiler (g++): sampling goes through torch alone, at about half the speed.[/]", soft_wrap=True)
        return None
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS, platform.machine(), _processor())).encode()).hexdigest()[:16]
    path = cache_folder() / "kernels" / f"{key}.so"
    if not path.exists() and (problem := _compile(compiler, path)):
        console.print(
            f"[yellow]{compiler} could not compile accord's kernels, so sampling goes through torch alone: {problem}[/]", soft_wrap=True
        )
        return None
    loaded = ctypes.CDLL(str(path))
    for name, arguments in ARGUMENTS.items():
        for dtype in DTYPES.values():
            function = getattr(loaded, f"{name}_{dtype}")
            function.argtypes, function.restype = arguments, None
    return loaded


def _compile(compiler: str, path: Path) -> str:
    """Write the library in one piece, however many processes do so at once. Returns what went wrong, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        made = Path(aside) / path.name
        try:
            done = subprocess.run([compiler, *FLAGS, "-o", str(made), str(SOURCE)], capture_output=True, text=True, timeout=300)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["no message"])[0]
        os.replace(made, path)
    return ""


def _processor() -> str:
    """What ``-march=native`` depends on: a cache may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def serves(x: Tensor) -> bool:
    """Whether the kernels work on this tensor: on a CPU, in float32 or bfloat16."""
    return x.device.type == "cpu" and x.dtype in DTYPES and library() is not None


def call(name: str, like: Tensor, *arguments: Tensor | int | float | None) -> None:
    """Run a kernel in ``like``'s dtype. Tensors must be contiguous, and stay alive until it returns."""
    kernels = library()
    assert kernels is not None
    given = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(kernels, f"{name}_{DTYPES[like.dtype]}")(*given)
