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


def _convert_float(data, source, target, rounding_mode):
    # The interpreter cuts float32 off where bfloat16 ends; the GPU rounds to nearest even.
    if target != interpreter.tl.bfloat16:
        return _convert(data, source, target, rounding_mode)
    value = torch.from_numpy(np.ascontiguousarray(data).reshape(-1)).view(torch.float32)
    return value.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


interpreter._convert_float = _convert_float


def pytest_configure(config):
    for line in (
        "ignore:Conversion of an array with ndim > 0:DeprecationWarning",
        "ignore:invalid value encountered:RuntimeWarning",  # numpy, where a NaN is meant to be
        "ignore:divide by zero encountered:RuntimeWarning",
        "ignore:overflow encountered:RuntimeWarning",
    ):
        config.addinivalue_line("filterwarnings", line)
