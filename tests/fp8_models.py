"""Small models whose linear layers run in FP8."""

import hybrids
import torch
from torch import nn

from nemokernels.models import Fp8Linear, convert_to_fp8
from nemokernels.models.mixers import MLP
from nemokernels.models.norms import RMSNorm

SIZES = dict(intermediate_size=64, head_dim=16, mamba_num_heads=16, mamba_head_dim=4, vocab_size=96)


def hybrid(pattern="M*-", recipe=None, **changes):
    model = hybrids.model(pattern, dtype=torch.float32, **{**SIZES, **changes}).train()
    return convert_to_fp8(model, recipe)


def blocks(recipe=None, count=2, dtype=torch.float32):
    """A stack of MLPs, each with the norm that emits its input and its residual connection."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = RMSNorm(16, 1e-5, dtype=dtype)
            self.mlp = MLP(16, 32, dtype=dtype)
            for p in self.parameters():
                nn.init.normal_(p, std=0.3)

        def forward(self, x):
            return x + self.mlp(self.norm(x, readers=self.mlp.readers))

    stack = nn.Sequential(*(Block() for _ in range(count)))
    return convert_to_fp8(stack, recipe, lambda name, module: True)


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, Fp8Linear)}


def state(model):
    return {n: b.clone() for n, b in model.named_buffers() if ".fp8_state." in n}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
