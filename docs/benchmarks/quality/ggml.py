"""llama.cpp's quantizers, called directly: builds its base library and binds one function.

The sources come with the source package of llama-cpp-python; only the part
that quantizes is compiled (no model runs in it).  What was quantized is decoded
by the `gguf` package, an independent implementation.
"""

import ctypes
import subprocess
import sys
import tarfile
from pathlib import Path

import gguf
import numpy as np

PACKAGE = "llama-cpp-python==0.3.36"
SOURCES = (
    "ggml.c",
    "ggml.cpp",
    "ggml-alloc.c",
    "ggml-backend.cpp",
    "ggml-backend-meta.cpp",
    "ggml-opt.cpp",
    "ggml-threading.cpp",
    "ggml-quants.c",
    "gguf.cpp",
)
FLAGS = ("-O3", "-march=native", "-fPIC", "-DNDEBUG", "-D_GNU_SOURCE")
VERSION_HEADER = '#define GGML_VERSION "0"\n#define GGML_COMMIT "0"\n'  # its own build writes this file


def _sources(work):
    """The folder of ggml's sources, fetched and unpacked if need be."""
    fetch = Path(work) / "fetch"
    fetch.mkdir(parents=True, exist_ok=True)
    name, version = PACKAGE.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    archive = fetch / f"{stem}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name, PACKAGE]
        subprocess.run(command, cwd=fetch, check=True)
    inside = f"{stem}/vendor/llama.cpp/ggml/"
    folder = Path(work) / "ggml"
    if not (folder / inside).exists():
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name.startswith(inside) and member.name.endswith((".c", ".cpp", ".h")):
                    tar.extract(member, folder, filter="data")
    return folder / inside


def build(work):
    """The path of the library."""
    library = Path(work) / "ggml" / "libggml-base.so"
    if library.exists():
        return library
    root = _sources(work)
    (root / "src" / "ggml-version.h").write_text(VERSION_HEADER)
    objects = []
    for name in SOURCES:
        source, target = root / "src" / name, library.parent / f"{name}.o"
        compiler = ["gcc", "-std=gnu11"] if name.endswith(".c") else ["g++", "-std=gnu++17"]
        includes = [f"-I{root / 'include'}", f"-I{root / 'src'}"]
        subprocess.run([*compiler, *FLAGS, *includes, "-c", source, "-o", target], check=True)
        objects.append(target)
    part = library.with_suffix(".part")
    subprocess.run(["g++", "-shared", "-pthread", *objects, "-lm", "-o", part], check=True)
    part.rename(library)
    return library


class Quantizer:
    """`quantize(type, matrix, importance)` of ggml."""

    def __init__(self, work):
        self.library = ctypes.CDLL(str(build(work)))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self.chunk = self.library.ggml_quantize_chunk
        self.chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
        self.chunk.restype = ctypes.c_size_t
        self.library.ggml_quantize_init.argtypes = [ctypes.c_int]

    def prepare(self, kind):
        """Makes a type's tables; before the first `quantize` of it, from one thread."""
        self.library.ggml_quantize_init(int(kind))

    def quantize(self, kind, matrix, importance):
        """The bytes of a matrix, [rows, bytes]; importance is one value per column, or None."""
        rows, columns = matrix.shape
        matrix = np.ascontiguousarray(matrix, np.float32)
        address = None
        if importance is not None:
            importance = np.ascontiguousarray(importance, np.float32)
            if importance.shape != (columns,):
                raise ValueError(f"{importance.shape} importances for {columns} columns")
            address = importance.ctypes.data
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if columns % block:
            raise ValueError(f"{kind.name} has blocks of {block}, which do not divide {columns} columns")
        out = np.zeros((rows, columns // block * size), np.uint8)
        written = self.chunk(int(kind), matrix.ctypes.data, out.ctypes.data, 0, rows, columns, address)
        if written != out.nbytes:
            raise ValueError(f"{kind.name}: {written} bytes written, {out.nbytes} expected")
        return out
