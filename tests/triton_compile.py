"""Compile the Triton kernels without a GPU and read what the machine code takes.

    python tests/triton_compile.py --update [family ...]

rewrites triton_resources.json, which test_triton_compile.py holds the kernels to.
"""

import contextlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import nemokernels

TABLE = Path(__file__).with_name("triton_resources.json")
ARCHS = (90, 100)
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Target:
    """As much of a Triton driver as compiling needs. One device number per architecture."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def compile_only(arch):
    """Launches inside compile for ``arch`` and do not run; yields the list of their kernels."""
    kernels, run, before = [], JITFunction.run, driver._active

    def compile_instead(self, *args, grid, warmup, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(Target(arch))
    try:
        with mock.patch.object(JITFunction, "run", compile_instead):
            yield kernels
    finally:
        driver._active = before


def dump(kernel, what):
    """What the tool says of a kernel: ``"resource-usage"``, or ``"sass"``, its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([TOOL, f"--dump-{what}", file.name], check=True,
                              capture_output=True, text=True).stdout  # fmt: skip


def resources(kernel):
    """Registers per thread, bytes of stack per thread (spills), bytes of shared memory."""
    text = dump(kernel, "resource-usage")
    registers, stack = re.search(rf"Function {kernel.name}:\s+REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack), "shared": kernel.metadata.shared}


def specialisations():
    """``{(family, label): launch}`` of every op folder with Triton kernels."""
    found = {}
    for path in sorted(Path(nemokernels.__file__).parent.glob("ops/*/kernel.py")):
        if "def specialisations" in path.read_text():
            family = path.parent.name
            kernel = importlib.import_module(f"nemokernels.ops.{family}.kernel")
            for label, launch in kernel.specialisations():
                assert (family, label) not in found, f"{family}: two specialisations named {label}"
                found[family, label] = launch
    return found


def measure(launch, arch):
    """``{"kernel name": resources}``; a kernel launched again is numbered."""
    measured = {}
    with compile_only(arch) as kernels:
        launch()
    for kernel in kernels:
        again = sum(name.split("#")[0] == kernel.name for name in measured)
        measured[f"{kernel.name}#{again + 1}" if again else kernel.name] = resources(kernel)
    return measured


def update(families):
    """Rewrite the table, or only the rows of these families."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    kernels = table.get("kernels", {}) if families else {}
    kernels = {key: row for key, row in kernels.items() if key.split("/")[0] not in families}
    for (family, label), launch in specialisations().items():
        if not families or family in families:
            for arch in ARCHS:
                for name, row in measure(launch, arch).items():
                    key = f"{family}/{label}/sm_{arch}/{name}"
                    kernels[key] = row
                    print(key, row)
    table = {"triton": triton.__version__, "kernels": dict(sorted(kernels.items()))}
    rows = ",\n".join(f'  "{key}": {json.dumps(row)}' for key, row in table["kernels"].items())
    TABLE.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{rows}\n }}\n}}\n')


if __name__ == "__main__":
    if sys.argv[1:2] != ["--update"]:
        sys.exit(__doc__)
    update(sys.argv[2:])
