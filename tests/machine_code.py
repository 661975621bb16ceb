"""What nvcc makes of a source of csrc/: ptxas' report and the disassembled kernels."""

import shutil
import subprocess
from pathlib import Path

import pytest

from nemokernels import _build

needs_nvcc = pytest.mark.skipif(_build.find_nvcc() is None, reason="needs nvcc; none here")


def output(*command, **kwargs):
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **kwargs}
    done = subprocess.run(command, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def compiled(name, arch="90a"):
    """Object file and ptxas' report of the source called ``name``."""
    (unit,) = (u for u in _build._files(".cu") if u.name == name)
    return _build.compile_unit(unit, [arch], _build.find_nvcc())


def functions_of(name, arch="90a"):
    """The machine code of a source's kernels, one string each, its name first."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="needs cuobjdump, from CUDA or triton")
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return output(tool, "-sass", compiled(name, arch)[0]).split("Function : ")[1:]
