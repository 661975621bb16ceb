"""Run under torchrun: experts over 2 and 4 ranks. Not a test itself."""

import json
import sys
from pathlib import Path
from unittest import mock

import hybrids
import pytest
import torch
import torch.distributed as dist
from allocations import Allocations
from safetensors.torch import save_file

from nemokernels import moe_experts, moe_route, testing
from nemokernels.models import expert_parallel
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
    "integers": ((7, 3, 0, 11), range(8), 4, torch.bfloat16),
}


def problem(name):
    """x, up, down, gradient of y, and the route of all ranks' tokens.

    Of integers, and weights of seven bits, every wide sum is exact: where results are rounded
    decides each of their bits.
    """
    sizes, chosen, slots, dtype = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    tokens = sum(sizes)
    shapes = (tokens, WIDTH), (EXPERTS, INNER, WIDTH), (EXPERTS, WIDTH, INNER), (tokens, WIDTH)

    def draw(*shape):
        if name == "integers":
            return torch.randint(-1, 2, shape, generator=generator, dtype=torch.float64)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = [draw(*shape).to(dtype) for shape in shapes]
    logits = torch.randn(tokens, EXPERTS, generator=generator, dtype=torch.float64)
    logits[:, [e for e in range(EXPERTS) if e not in chosen]] -= 50
    wide = torch.promote_types(dtype, torch.float32)
    route = moe_route(logits.to(wide), top_k=slots, scale=2.5)
    if name == "integers":
        weights = torch.randint(64, 128, (tokens, slots), generator=generator) / 128
        route = route._replace(weights=weights)
    return tensors, route


def split(name, ranks):
    """How many tokens each of so many ranks has."""
    sizes, each = CASES[name][0], 4 // ranks
    return [sum(sizes[i : i + each]) for i in range(0, 4, each)]


def run(name, group=None, wide=False):
    """Result and gradients of a case: of all tokens and experts, or of this rank's."""
    (x, up, down, dy), route = testing.to_double(problem(name)) if wide else problem(name)
    if group is not None:
        rows, ranks = split(name, group.size()), group.size()
        x, dy, weights, experts = (
            t.split(rows)[group.rank()] for t in (x, dy, route.weights, route.experts)
        )
        up, down = (t.chunk(ranks)[group.rank()] for t in (up, down))
        counts = torch.bincount(experts.flatten(), minlength=EXPERTS).int()
        route = route._replace(weights=weights, experts=experts, counts=counts)
    leaves = [t.clone().requires_grad_() for t in (x, up, down, route.weights)]
    route = route._replace(weights=leaves[3])
    over = () if group is None else (group,)
    y = (moe_experts_over if over else moe_experts)(*leaves[:3], route, *over)
    y.backward(dy)
    names = ("dx", "dup", "ddown", "dweights")
    return {"y": y.detach(), **{n: t.grad for n, t in zip(names, leaves)}}


def traffic(name, group):
    """Shape of what is sent and of what arrives in every exchange of forward and backward, and
    bytes of floating and of other tensors that are kept in between."""
    seen, kept, send = [], {}, dist.all_to_all_single

    def watched(arrived, sent, *args, **kwargs):
        seen.append((list(sent.shape), list(arrived.shape)))
        return send(arrived, sent, *args, **kwargs)

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (tensor.is_floating_point(), storage.nbytes())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with mock.patch.object(dist, "all_to_all_single", watched), hooks:
        run(name, group)
    sizes = [sum(n for real, n in kept.values() if real is what) for what in (True, False)]
    return {"exchanges": seen, "kept": sizes}


def largest(group):
    """Bytes of the largest tensor made around the experts, forward and backward, and of one row per
    slot. All eight experts of a token are chosen."""
    x = torch.randn(5, 64, requires_grad=True)
    up, down = torch.empty(2, 1, 64), torch.empty(2, 64, 1)
    route = moe_route(torch.randn(5, EXPERTS), top_k=EXPERTS)
    stub = lambda rows, *_: rows * 2  # noqa: E731
    with mock.patch.object(expert_parallel, "moe_experts", stub), Allocations() as seen:
        moe_experts_over(x, up, down, route, group).backward(torch.ones(5, 64))
    return {"largest": max(seen.sizes), "copy": 5 * EXPERTS * 64 * 4, "same": x.grad.tolist()}


def main(out):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with testing.poisoned_empty():
        for world, group in ((4, dist.group.WORLD), (2, pairs[rank // 2])):
            for name in CASES:
                result, again = run(name, group), run(name, group)
                assert all(torch.equal(result[what], again[what]) for what in result)
                save_file(result, out / f"{name} {world} {rank}.safetensors")
                path = out / f"{name} {world} {rank}.json"
                path.write_text(json.dumps(traffic(name, group)))
    (out / f"largest {rank}.json").write_text(json.dumps(largest(dist.group.WORLD)))
    odd = hybrids.model("E", moe_intermediate_size=25, dtype=torch.float32)
    with pytest.raises(ValueError, match="experts.up_proj has 25 rows, which cannot be split"):
        parallel.shard(odd, odd, torch.device("cpu"), torch.float32, expert_parallel=2)
    dist.barrier()
    parallel.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
