"""Compiling csrc/ with nvcc: used by setup.py and by ``nemokernels build``.

Importing this module does not import torch; compiling needs torch's headers and library folder. The
result is one shared library against torch's stable C++ ABI, which works with torch 2.11 and later
and with every Python.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ARCHS = ("90a", "100a", "120a")
TORCH_TARGET_VERSION = "0x020b000000000000"  # 2.11, the oldest torch the library loads into
FLAGS = ("-std=c++20", "-O3", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
         "-Xcompiler", "-fPIC,-fvisibility=hidden")  # fmt: skip


def cache_dir() -> Path:
    """Where ``nemokernels build`` puts its results: ``$XDG_CACHE_HOME/nemokernels``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemokernels"


@functools.cache
def source_dir() -> Path:
    """The folder csrc/: inside an installed package, or beside it in a source tree."""
    for folder in (PACKAGE / "_csrc", PACKAGE.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no csrc folder in {PACKAGE} or beside it")


def _files(*suffixes: str) -> list[Path]:
    return sorted(p for p in source_dir().rglob("*") if p.suffix in suffixes)


@functools.cache
def source_digest() -> str:
    """Hash of everything that goes into the library besides the architectures."""
    return _digest(_files(".h", ".cuh", ".cu", ".cpp"), FLAGS)


def own_arch(unit: Path) -> str | None:
    """The one architecture a source named like ``*_sm100a.cu`` is for; None if it is for all."""
    match = re.search(r"_sm(\w+)$", unit.stem)
    return match and match.group(1)


def units(archs: Sequence[str]) -> list[Path]:
    """Sources to compile for these architectures."""
    return [unit for unit in _files(".cu", ".cpp") if own_arch(unit) in (None, *archs)]


def _digest(files: Sequence[Path], words: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(words).encode())
    for path in files:
        digest.update(path.relative_to(source_dir()).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def find_nvcc() -> str | None:
    """The path of nvcc: from ``CUDA_HOME`` if that is set, else from PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def find_cutlass() -> Path | None:
    """The folder of CUTLASS's headers, which the wheel nvidia-cutlass brings."""
    found = importlib.util.find_spec("cutlass_library")  # finds the package without running it
    if found is None:
        return None
    return Path(found.submodule_search_locations[0]) / "source" / "include"


def needs_cutlass(archs: Sequence[str]) -> bool:
    """Whether some source for these architectures includes CUTLASS, and its headers are absent."""
    return find_cutlass() is None and any(own_arch(unit) for unit in units(archs))


def local_archs() -> list[str]:
    """Architectures of the GPUs that torch sees here, spelt as nvcc wants them."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [arch for arch in (f"{a}{b}a" for a, b in sorted(found)) if arch in ARCHS]


def build(
    archs: Sequence[str] | None = None,
    out: str | os.PathLike | None = None,
    verbose: bool = False,
    jobs: int | None = None,
) -> Path:
    """Compile csrc/ and return the library's path. A library that is already there is kept.

    Args:
        archs: for example ``["90a", "100a"]``; default: the GPUs of this machine.
        out: folder for the library; default: the user's cache, where the package looks.
        verbose: print the compiler's commands and what it reports about registers and spills.
        jobs: how many compilers run at a time; default: one per processor. A compiler that reads
            CUTLASS takes up to 6 GB of memory.

    Raises:
        ValueError: an architecture that the sources do not support, or none was given and there is
            no GPU here.
        FileNotFoundError: there is no nvcc, or a source needs CUTLASS's headers and they are
            absent.
        RuntimeError: the compiler failed; the message is its output.
    """
    archs = sorted(set(archs or local_archs()), key=lambda a: (len(a), a))
    if not archs:
        raise ValueError(f"build: no supported GPU here; name `archs`, out of {', '.join(ARCHS)}")
    for arch in archs:
        if arch not in ARCHS:
            raise ValueError(f"build: `archs` has {arch!r}, expected some of {', '.join(ARCHS)}")
    out = Path(out) if out is not None else cache_dir()
    target = out / f"_C-{source_digest()}-{'-'.join(archs)}.so"
    if target.exists():
        return target
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("build: no nvcc on PATH or under CUDA_HOME; install CUDA 12.8+")
    if needs_cutlass(archs):
        raise FileNotFoundError(
            "build: no CUTLASS headers; run `pip install --no-deps nvidia-cutlass`"
        )
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        made = pool.map(lambda unit: compile_unit(unit, archs, nvcc, verbose)[0], units(archs))
        objects = list(made)
    with tempfile.TemporaryDirectory(dir=out, prefix=".build-") as work:
        library = Path(work) / target.name
        _link(objects, library, Path(work), nvcc, verbose)
        os.replace(library, target)
    return target


def compile_unit(
    unit: Path, archs: Sequence[str], nvcc: str, verbose: bool = False
) -> tuple[Path, str]:
    """Compile a source, or take it from the cache; return its object file and ptxas' report."""
    import torch  # only to find its headers

    include = Path(torch.__file__).parent / "include"
    own, headers = own_arch(unit), []
    codes = [f"-DNEMO_SM{arch.upper()}" for arch in archs]  # tells sources which others are linked
    for arch in (own,) if own else archs:
        codes.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
    words = [*FLAGS, *codes, torch.__version__, _run([nvcc, "--version"])]
    if own:
        headers = ["--expt-relaxed-constexpr", "-isystem", str(find_cutlass())]
        words.append((find_cutlass() / "cutlass" / "version.h").read_text())
    name = f"{unit.stem}-{_digest([*_files('.h', '.cuh'), unit], words)}"
    target = cache_dir() / "objects" / f"{name}.o"
    report = target.with_suffix(".txt")
    if target.exists() and report.exists():
        return target, report.read_text()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        made = Path(work) / target.name
        command = [nvcc, *FLAGS, *codes, "-Xptxas", "-v", f"-I{source_dir()}", *headers,
                   "-isystem", str(include), "-c", str(unit), "-o", str(made)]  # fmt: skip
        said = _run(command, verbose)
        (Path(work) / report.name).write_text(said)
        os.replace(Path(work) / report.name, report)
        os.replace(made, target)
    return target, said


def build_host(out: str | os.PathLike) -> Path:
    """Build the kernels as loops over blocks and threads on the CPU, to test them without a GPU.

    Implements nemokernels_C for CPU tensors. Undefined behaviour ends the process, where a GPU
    would carry on with whatever it computed.
    """
    import torch

    include = Path(torch.__file__).parent / "include"
    target = Path(out) / f"_host-{source_digest()}.so"
    if target.exists():
        return target
    checks = ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    flags = [*checks, "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas",
             f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
             f"-I{source_dir()}", "-isystem", str(include)]  # fmt: skip

    def compile_one(unit: Path) -> str:
        made = Path(work) / f"{unit.stem}.o"
        _run(["c++", *flags, "-x", "c++", "-c", str(unit), "-o", str(made)])
        return str(made)

    with tempfile.TemporaryDirectory(dir=out) as work, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, units([])))
        made = Path(work) / target.name
        libraries = [f"-L{include.parent / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch"]
        _run(["c++", *checks, "-shared", "-o", str(made), *objects, *libraries])
        os.replace(made, target)
    return target


def spills(report: str) -> dict[str, int]:
    """Bytes of register spills per kernel (mangled name) that ptxas reported, where not zero."""
    found, kernel = {}, ""
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            kernel = match.group(1)
        elif (match := re.search(r"(\d+) bytes spill stores", line)) and int(match.group(1)):
            found[kernel] = int(match.group(1))
    return found


def _link(objects: Sequence[Path], library: Path, work: Path, nvcc: str, verbose: bool) -> None:
    import torch

    folders = [Path(torch.__file__).parent / "lib"]
    if not (folders[0] / "libtorch_cuda.so").exists():
        # A CPU build of torch has no libtorch_cuda to link against, so an empty library of that
        # name stands in. The name must be among the library's dependencies, or it does not load
        # where torch has CUDA.
        stub = work / "libtorch_cuda.so"
        _run(["c++", "-shared", "-Wl,-soname,libtorch_cuda.so", "-o", str(stub)], verbose)
        folders.append(work)
    command = [nvcc, "-shared", "-o", str(library), *map(str, objects), "-cudart", "static",
               *(f"-L{folder}" for folder in folders), "-Xlinker", "--no-as-needed",
               "-ltorch_cuda", "-ltorch_cpu", "-ltorch"]  # fmt: skip
    _run(command, verbose)


def _run(command: Sequence[str], verbose: bool = False) -> str:
    if verbose:
        print(" ".join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{' '.join(command)}\n{done.stdout}")
    if verbose and done.stdout:
        print(done.stdout, flush=True)
    return done.stdout
