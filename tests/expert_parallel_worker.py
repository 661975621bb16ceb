"""Run under torchrun: experts over 2 and 4 ranks. Not a test itself."""

import sys
from pathlib import Path

import hybrids
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from nemokernels import moe_experts, moe_route, testing
from nemokernels.models.expert_parallel import moe_experts_over
from nemokernels.train import parallel

EXPERTS, WIDTH, INNER = 8, 6, 10
CASES = {  # tokens of each quarter of the ranks, experts that are chosen, slots, dtype
    "even": ((4, 4, 4, 4), range(8), 3, torch.float64),
    "uneven": ((5, 0, 9, 1), range(8), 3, torch.float32),
    "one expert": ((3, 2, 0, 4), (5,), 1, torch.float32),
    "two ranks without rows": ((3, 2, 1, 4), (2, 3), 2, torch.float64),
    "every expert": ((2, 1, 0, 0), range(8), 8, torch.float32),
    "no tokens": ((0, 0, 0, 0), range(8), 2, torch.float32),
    "bfloat16": ((7, 3, 0, 11), range(8), 4, torch.bfloat16),
}


def problem(name):
    """x, up, down and logits of all ranks' tokens."""
    sizes, chosen, _, dtype = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    tokens = sum(sizes)
    shapes = (tokens, WIDTH), (EXPERTS, INNER, WIDTH), (EXPERTS, WIDTH, INNER), (tokens, EXPERTS)
    x, up, down, logits = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes
    )
    away = [e for e in range(EXPERTS) if e not in chosen]
    logits[:, away] -= 50
    return [t.to(dtype) for t in (x, up, down)] + [
        logits.to(torch.promote_types(dtype, torch.float32))
    ]


def run(name, group=None, wide=False):
    """Result and gradients of a case: of all tokens and experts, or of this rank's."""
    sizes, _, slots, _ = CASES[name]
    x, up, down, logits = (t.double() if wide else t for t in problem(name))
    gradient = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x).to(x.dtype)
    if group is not None:
        each = len(sizes) // group.size()
        rows = [sum(sizes[i : i + each]) for i in range(0, len(sizes), each)]
        mine = lambda t: t.split(rows)[group.rank()]  # noqa: E731
        x, logits, gradient = mine(x), mine(logits), mine(gradient)
        up, down = (t.chunk(group.size())[group.rank()] for t in (up, down))
    leaves = [t.clone().requires_grad_() for t in (x, up, down, logits)]
    route = moe_route(leaves[3], top_k=slots, scale=2.5)
    over = () if group is None else (group,)
    y = (moe_experts_over if over else moe_experts)(*leaves[:3], route, *over)
    y.backward(gradient)
    names = ("dx", "dup", "ddown", "dlogits")
    return {"y": y.detach(), **{n: t.grad for n, t in zip(names, leaves)}}


def main(out):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with testing.poisoned_empty():
        for world, group in ((4, dist.group.WORLD), (2, pairs[rank // 2])):
            for name in CASES:
                save_file(run(name, group), out / f"{name} {world} {rank}.safetensors")
    odd = hybrids.model("E", moe_intermediate_size=25, dtype=torch.float32)
    with pytest.raises(ValueError, match="experts.up_proj has 25 rows, which cannot be split"):
        parallel.shard(odd, odd, torch.device("cpu"), torch.float32, expert_parallel=2)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
