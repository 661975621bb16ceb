"""Run under torchrun: train a step sharded, write what the test compares. Not a test itself."""

import sys
from pathlib import Path

import families
import tiny
import torch
import torch.distributed as dist
import vl
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from nemokernels.models import RewardModel
from nemokernels.train import parallel
from nemokernels.train.preference import PairObjective, Pairs
from nemokernels.train.trainer import Trainer

CHANGES = {
    "experts2": dict(expert_parallel=2),
    "experts4": dict(expert_parallel=4, recompute=True),
}


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone().contiguous()


def model(family):
    if family in ("nemotron_h", *CHANGES):
        return tiny.model(dtype=torch.float32)
    changes = dict(vocab_size=320, tie_word_embeddings=True)
    return families.model(family, dtype=torch.float32, **changes)


def trainer(family, out, **changes):
    settings = tiny.settings(**changes)
    if family == "reward":
        torch.manual_seed(0)
        made = RewardModel.on(families.model("nemotron", dtype=torch.float32), "score")
        rows = [[list(range(3 + i + side, 9 + 2 * i)) for i in range(6)] for side in (0, 1)]
        data = Pairs(*rows, [0.1 * i for i in range(6)], windows=4, seq_len=32, seed=0)
        return Trainer(made, data, settings, out, objective=PairObjective)
    if family == "vision":
        return Trainer(vl.model(dtype=torch.float32), vl.Captions(), settings, out)
    return Trainer(model(family), tiny.batches(settings), settings, out)


def check(t):
    """One mesh per group of the optimizer; what is not sharded is the same on every rank."""
    for group in t.optimizer.param_groups:
        meshes = {p.device_mesh if isinstance(p, DTensor) else None for p in group["params"]}
        assert len(meshes) == 1
    whole = [p.detach().flatten() for p in t.objective.parameters() if not isinstance(p, DTensor)]
    if whole:
        mine, most = torch.cat(whole), torch.cat(whole)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        agree = torch.tensor(float(torch.equal(mine, most)))
        dist.all_reduce(agree, dist.ReduceOp.MIN)
        assert agree == 1


def main(out, mode, family):
    t = trainer(family, out / "run", **CHANGES.get(family, {}))
    first = t.rank == 0
    if mode == "resume":
        assert t.resume() == 3
    else:
        t.backward()
        grads = {name: whole(p.grad) for name, p in t.objective.named_parameters()}
        sharded = [n for n, p in t.objective.named_parameters() if isinstance(p, DTensor)]
        if first:
            save_file(grads, out / "grads.safetensors")
            (out / "sharded.txt").write_text("\n".join(sharded))
        counts = parallel.all_sum(torch.cat([*t.model.expert_counts, torch.zeros(0).long()]))[0]
        if first:
            save_file({"counts": counts}, out / "counts.safetensors")
        t.optimizer.zero_grad()
        for router in t.model.routers():
            router.expert_counts.zero_()
        for _ in range(3):
            t.train_step()
        check(t)
        t.save()
    state = {name: whole(p) for name, p in t.objective.state_dict().items()}
    if first:
        save_file(state, out / f"{mode}.safetensors")
    t.export(out / f"model-{mode}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, mode, *names = sys.argv[1:]
    for name in names:
        (Path(folder) / name).mkdir(exist_ok=True)
        main(Path(folder) / name, mode, name)
    parallel.leave()
