"""The tuples of tensors that functions return: copied, and written with torch.save."""

import copy
import io

import pytest
import torch

import nemokernels

TUPLES = [kind for kind in map(nemokernels.__dict__.get, nemokernels.__all__)
          if isinstance(kind, type) and issubclass(kind, tuple)]  # fmt: skip
DTYPES = [torch.uint8, torch.float8_e4m3fn, torch.float32, torch.bfloat16]


def made(kind):
    """One with the fields' types, which for this is all that matters."""
    parts = [
        7
        if kind.__annotations__[name] in (int, "int")
        else torch.randn(3, 4).to(DTYPES[i % len(DTYPES)])
        for i, name in enumerate(kind._fields)
    ]
    return kind(*parts)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_there_are_some():
    assert nemokernels.NVFP4 in TUPLES and nemokernels.TiledNVFP4 in TUPLES and len(TUPLES) >= 9


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, saved])
@pytest.mark.parametrize("kind", TUPLES, ids=lambda kind: kind.__name__)
def test_comes_back_as_it_was(kind, again):
    value = made(kind)
    other = again(value)
    assert type(other) is kind
    for a, b in zip(value, other, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            assert (a.data_ptr() == b.data_ptr()) == (again is copy.copy)
        else:
            assert a == b


def test_a_quantised_weight_works_after_torch_load():
    weight = nemokernels.tile_nvfp4(nemokernels.quantize_nvfp4(torch.randn(16, 64)))
    x = torch.randn(3, 64)
    loaded = saved({"layer": weight})["layer"]
    assert torch.equal(nemokernels.nvfp4_linear(x, loaded), nemokernels.nvfp4_linear(x, weight))
