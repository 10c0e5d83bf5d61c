"""The kernels of kernels.cpp, compiled for this machine when they are first needed and kept in accord's cache.

Without a C++ compiler torch does the same work, slower, and a line says so. ``ACCORD_NATIVE=0`` asks for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from accord.nn.bundled import cache_folder
from accord.progress import console

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
# Apple's compiler has no OpenMP runtime, and a second one beside torch's would be one too many: there a kernel has one thread.
MACHINE = ("-mcpu=native", "-fopenmp-simd") if platform.system() == "Darwin" else ("-march=native", "-fopenmp")
ARGUMENTS = {
    "add_norm": "TTTTfnnx",
    "norm_backward": "TTTfTfnn",
    "silu_mul": "SSTnnn",
    "silu_backward": "TTTTTnn",
    "lay_heads": "STTlTnnnnn",
    "collect_heads": "TTTllTnnnn",
    "causal_softmax": "Txnnn",
    "causal_softmax_backward": "TTxnnn",
    "attend": "TTTTTlTnnnnnn",
    "draw": "Tdxlfnn",
    "token_stats": "Tlxffnn",
    "token_slope": "TlxffTnn",
    "quantize": "Tbfnn",
    "dequantize": "iffTTnn",
    "multiply": "TTTTnnn",
}
"""What a kernel is given, a letter each: tensors of its own dtype (T; S: with any stride between rows), float32 (f), float64 (d),
int64 (l), int32 (i), int8 (b); and numbers, whole (n) or not (x)."""
ONLY = {"multiply": [torch.bfloat16]}  # kernels that are not there for both dtypes
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
TENSORS = {"f": torch.float32, "d": torch.float64, "l": torch.int64, "i": torch.int32, "b": torch.int8}
NUMBERS = {"n": ctypes.c_int64, "x": ctypes.c_float}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none."""
    if os.environ.get("ACCORD_NATIVE", "1") == "0":
        return None
    compiler = shlex.split(os.environ.get("CXX", "")) or [found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))][:1]
    if not compiler:
        _without("there is no C++ compiler (g++)")
        return None
    try:
        loaded = _load(compiler)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # no home, a full disk, a cache that may not be run from
        _without(f"accord's kernels could not be made with {shlex.join(compiler)} ({_first_line(error)})")
        return None
    for name, letters in ARGUMENTS.items():
        for dtype in ONLY.get(name, DTYPES):
            function = getattr(loaded, f"{name}_{DTYPES[dtype]}")
            function.argtypes, function.restype = [NUMBERS.get(letter, ctypes.c_void_p) for letter in letters], None
    return loaded


def _without(why: str) -> None:
    console.print(f"[yellow]Sampling and training go through torch alone, up to twice as slow: {why}.[/]", soft_wrap=True)


def _first_line(error: Exception) -> str:
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    return (str(text).strip().splitlines() or ["no message"])[0]


def _load(compiler: list[str]) -> ctypes.CDLL:
    """From the cache; what is there and cannot be loaded is made anew."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    about = repr((compiler, version, FLAGS, MACHINE, platform.machine(), _processor()))
    path = cache_folder() / "kernels" / f"{hashlib.sha256(SOURCE.read_bytes() + about.encode()).hexdigest()[:16]}.so"
    check = path.with_suffix(".sha256")
    if path.exists() and check.exists() and check.read_text() == _digest(path):  # a library that was cut would end the process
        with contextlib.suppress(OSError):  # of another machine's libraries
            return ctypes.CDLL(str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:  # whole or not at all, however many processes do this at once
        made = Path(aside) / path.name
        command = [*compiler, *FLAGS, *MACHINE, "-o", str(made), str(SOURCE)]
        subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        (Path(aside) / check.name).write_text(_digest(made))
        path.unlink(missing_ok=True)  # whoever has it open keeps it
        os.replace(made, path)
        os.replace(Path(aside) / check.name, check)
    return ctypes.CDLL(str(path))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _processor() -> str:
    """What the flags of this machine depend on: a cache may be shared by several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def serves(x: Tensor) -> bool:
    """Whether the kernels work on this tensor: on a CPU, in float32 or bfloat16."""
    return x.device.type == "cpu" and x.dtype in DTYPES and library() is not None


def multiplies() -> bool:
    """Whether the kernel ``multiply`` is a fast one: on a processor with AVX512-BF16."""
    kernels = library()
    return kernels is not None and bool(kernels.multiplies())


def call(name: str, like: Tensor, *arguments: Tensor | int | float | None) -> None:
    """Run a kernel in ``like``'s dtype. Tensors stay alive until it returns; None is a null pointer.

    Raises:
        TypeError: a tensor is not what the kernel reads: another dtype, another device, with gaps.
    """
    kernels = library()
    assert kernels is not None
    given: list[int | float | None] = []
    for letter, argument in zip(ARGUMENTS[name], arguments, strict=True):
        if isinstance(argument, Tensor):
            wanted = TENSORS.get(letter, like.dtype)
            if argument.dtype != wanted or argument.device.type != "cpu" or not (letter == "S" or argument.is_contiguous()):
                raise TypeError(f"{name} reads a {wanted} without gaps on the CPU here, not {argument.dtype} {tuple(argument.stride())}")
            given.append(argument.data_ptr())
        else:
            given.append(argument)
    getattr(kernels, f"{name}_{DTYPES[like.dtype]}")(*given)
