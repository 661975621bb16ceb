"""Triton kernels run by its interpreter, on CPU tensors.

Triton decides between interpreter and compiler when a kernel is defined, so these tests have a
pytest run of their own: ``pytest tests/interpret``. The plain run does not collect this folder.
"""

import os
import sys

import numpy as np
import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"

if "nemokernels._tl" in sys.modules:
    raise RuntimeError("kernels were imported without the interpreter: run tests/interpret alone")

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="no Triton, no kernels")
_convert = interpreter._convert_float


ROUNDED = {
    interpreter.tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16),
    interpreter.tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8),
    interpreter.tl.float8e5: (torch.float8_e5m2, torch.uint8, np.uint8),
}
WIDE = {
    interpreter.tl.float32: (torch.float32, torch.int32, np.uint32),
    interpreter.tl.float16: (torch.float16, torch.int16, np.uint16),
}


def _convert_float(data, source, target, rounding_mode):
    # The interpreter cuts float32 off where bfloat16 ends, rounds ties of FP8 away from zero and
    # its subnormals down; the GPU rounds to nearest even.
    if target in WIDE and source in ROUNDED:  # it reads FP8's NaN as a number
        dtype, bits, stored = WIDE[target]
        value = torch.from_numpy(np.ascontiguousarray(data).reshape(-1)).view(ROUNDED[source][0])
        return value.to(dtype).view(bits).numpy().view(stored).reshape(data.shape)
    if target not in ROUNDED or source != interpreter.tl.float32:
        return _convert(data, source, target, rounding_mode)
    dtype, bits, stored = ROUNDED[target]
    value = torch.from_numpy(np.ascontiguousarray(data).reshape(-1)).view(torch.float32)
    return value.to(dtype).view(bits).numpy().view(stored).reshape(data.shape)


interpreter._convert_float = _convert_float


def pytest_configure(config):
    for line in (
        "ignore:Conversion of an array with ndim > 0:DeprecationWarning",
        "ignore:All-NaN slice encountered:RuntimeWarning",
        "ignore:invalid value encountered:RuntimeWarning",  # numpy, where a NaN is meant to be
        "ignore:divide by zero encountered:RuntimeWarning",
        "ignore:overflow encountered:RuntimeWarning",
    ):
        config.addinivalue_line("filterwarnings", line)
