"""Packaging; pyproject.toml holds the metadata.

csrc/ is compiled into the wheel where torch can be imported (``pip install --no-build-isolation``)
and nvcc exists: for the GPUs present, or for the architectures in ``NEMOKERNELS_CUDA_ARCHS``, for
example ``90a;100a``. Otherwise the wheel is pure: Triton kernels and references, the CUDA sources
beside them, and ``nemokernels build`` compiles those afterwards.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # pip checks this only where it isolates
    raise SystemExit(
        f"nemokernels is built by setuptools 77 or newer, this is {setuptools.__version__}: "
        "pip install -U setuptools"
    )
from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OUTSIDE = ("models", "train", "bench")  # folders at the root that install inside nemokernels


def load_build():
    """nemokernels/_build.py without importing the package, which needs torch."""
    spec = importlib.util.spec_from_file_location("_build", ROOT / "nemokernels" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def choose_archs(build) -> list[str]:
    """Architectures to compile for; empty, and a line that says why, if nothing is compiled."""
    asked = [a for a in os.environ.get("NEMOKERNELS_CUDA_ARCHS", "").replace(";", " ").split()]
    if importlib.util.find_spec("torch") is None:
        missing = "torch cannot be imported (pip install --no-build-isolation uses yours)"
    elif build.find_nvcc() is None:
        missing = "there is no nvcc on PATH or under CUDA_HOME"
    elif unknown := sorted(set(asked).difference(build.ARCHS)):
        missing = f"{' '.join(unknown)} is none of {' '.join(build.ARCHS)}"
    elif not asked and not build.local_archs():
        missing = "there is no supported GPU here and NEMOKERNELS_CUDA_ARCHS is not set"
    elif build.needs_cutlass(asked or build.local_archs()):
        missing = "CUTLASS's headers are not installed (pip install --no-deps nvidia-cutlass)"
    else:
        return asked or build.local_archs()
    if asked:
        raise SystemExit(f"NEMOKERNELS_CUDA_ARCHS is set, but {missing}")
    print(f"nemokernels: csrc/ is not compiled: {missing}. `nemokernels build` does it later.")
    return []


BUILD = load_build()
ARCHS = choose_archs(BUILD)


class BuildPy(build_py):
    """Also puts the compiled library into the package (editable: into the user's cache)."""

    def run(self):
        package = Path(self.build_lib) / "nemokernels"
        if not self.editable_mode:  # what an earlier build left there would be shipped
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        if ARCHS:
            BUILD.build(ARCHS, out=None if self.editable_mode else package)


class Wheel(bdist_wheel):
    """A wheel with the library fits every Python, not every platform."""

    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if ARCHS else tag


class Native(Distribution):
    def has_ext_modules(self):
        return bool(ARCHS)


present = [name for name in OUTSIDE if (ROOT / name / "__init__.py").exists()]
setup(
    distclass=Native,
    packages=[
        *find_packages(include=["nemokernels*"]),
        *(f"nemokernels.{name}" for name in present),
        "nemokernels._csrc",
    ],
    cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel},
)
