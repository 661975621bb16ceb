"""Run under torchrun: models sharded before they have values. Not a test itself."""

import sys
import weakref
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemokernels.models import build, deferred
from nemokernels.models.files import Shards
from nemokernels.train import parallel
from nemokernels.train.trainer import Trainer


class Live(TorchDispatchMode):
    """Follows the bytes of storages made inside the block; ``peak`` is the most at once."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DTensor):
                self._see(leaf)
        return out

    def _see(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.is_meta or key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self.known.discard(key)
        self.now -= size


def seeded(model):
    torch.manual_seed(3)
    model.reset_parameters()


def fresh():
    return build(tiny.config(), device="meta", dtype=torch.float32), seeded


def count_reads(read):
    def counted(self, tensor, box=None):
        value = read(self, tensor, box)
        counted.elements += value.numel()
        return value

    counted.elements = 0
    return counted


def trainer(source, out, **changes):
    model, fill = fresh() if source is None else deferred(source)
    settings = tiny.settings(**changes)
    return Trainer(model, tiny.batches(settings), settings, out, fill=fill)


def main(out):
    Shards.read = reads = count_reads(Shards.read)
    dist.init_process_group("gloo")
    for name, source, changes in (
        ("fresh", None, {}),
        ("fresh experts", None, dict(expert_parallel=2)),
        ("read", out / "saved", {}),
        ("read experts", out / "saved", dict(expert_parallel=2)),
    ):
        reads.elements = 0
        with Live() as live:
            t = trainer(source, out / "run", **changes)
        held = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes
                   for p in t.objective.parameters())  # fmt: skip
        facts = torch.tensor([live.peak, held, reads.elements])
        state = {
            n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for n, p in t.model.state_dict().items()
        }
        save_file({"facts": facts, **state}, out / f"{name} {t.rank}.safetensors")
        t.train_step()
    dist.barrier()
    parallel.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
