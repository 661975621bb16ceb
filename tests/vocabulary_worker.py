"""Run under torchrun: the loss with its vocabulary split over ranks. Not a test itself."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from nemokernels import linear_cross_entropy, testing
from nemokernels.train import parallel

CASES = {
    "plain": (29, {"reduction": "none"}, torch.float64),
    "all options": (30, {"label_smoothing": 0.2, "z_loss": 0.03}, torch.float64),
    "fewer classes than chunks": (5, {"z_loss": 0.1, "label_smoothing": 0.1}, torch.float64),
    "one class": (1, {"reduction": "sum"}, torch.float64),
    "float32": (77, {"label_smoothing": 0.1}, torch.float32),
    "bfloat16": (77, {"reduction": "none"}, torch.bfloat16),
}
COMPILED = ("all options", "bfloat16")  # over pairs, as one graph


def problem(classes, dtype):
    generator = torch.Generator().manual_seed(classes)
    hidden, weight = (torch.randn(n, 6, generator=generator).to(dtype) for n in (23, classes))
    targets = torch.randint(classes, (23,), generator=generator)
    targets[::5] = -100
    hidden[0] = torch.nan  # its target is ignored
    return hidden, weight, targets


def run(name, group=None, wide=False, compiled=False):
    """Loss, dhidden and dweight of a case: whole, or this rank's rows of the weight."""
    classes, options, dtype = CASES[name]
    hidden, weight, targets = problem(classes, dtype)
    if wide:
        hidden, weight = hidden.double(), weight.double()
    if group is not None:
        chunks = [*weight.chunk(group.size()), *[weight[:0]] * group.size()]
        weight = chunks[group.rank()]
        options = {**options, "group": group, "vocab_size": classes}
    fn = lambda h, w: linear_cross_entropy(h, w, targets, **options)  # noqa: E731
    if compiled:
        torch._dynamo.reset()
        fn = torch.compile(fn, backend="aot_eager", fullgraph=True)
    (loss,), (dhidden, dweight) = testing.gradients(fn, [hidden, weight])
    return {"loss": loss.detach(), "dhidden": dhidden, "dweight": dweight}


def main(out):
    dist.init_process_group("gloo")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for world, group in ((4, dist.group.WORLD), (2, pairs[dist.get_rank() // 2])):
        for name in CASES:
            save_file(run(name, group), out / f"{name} {world} {dist.get_rank()}.safetensors")
    for name in COMPILED:
        save_file(run(name, group, compiled=True), out / f"{name} {dist.get_rank()}.safetensors")
    parallel.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
