"""The activations between the two matrices of an MLP, under their names in config.json."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F

from nemokernels import relu2

__all__ = ["ACTIVATIONS"]

ACTIVATIONS = {
    "relu2": relu2,
    "gelu": F.gelu,  # x times the normal distribution's cumulative function
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
