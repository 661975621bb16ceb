"""Run under torchrun: FP8 training, sharded; writes what the test compares. Not a test itself."""

import sys
from pathlib import Path

import fp8_models
import tiny
import torch
import torch.distributed as dist
from fsdp_worker import whole
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from nemokernels.models import Fp8Recipe, held_fp8_weights, update_fp8
from nemokernels.train import parallel
from nemokernels.train.trainer import Trainer

SPECIAL = {2: 0.0, 3: torch.inf, 5: torch.nan}  # what the last row of the batch is, in these steps


def model():
    torch.manual_seed(0)
    return fp8_models.blocks(Fp8Recipe(amax_history_len=3), dtype=torch.float64)


def steps(model, rank, world, group=None):
    """Scaling state after every step, and the weights at the end. The batch has 4 rows of 3 tokens,
    in two micro-batches; a rank has its share of the rows of each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    record = {}
    for step in range(7):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(2, 4, 3, 16, generator=generator, dtype=torch.float64)
        batch *= 1 + torch.arange(4.0).reshape(4, 1, 1)  # each row, so each rank, has its maximum
        if step in SPECIAL:
            batch[0, 3] = SPECIAL[step]
        with held_fp8_weights(model):
            for part, rows in enumerate(batch):
                model(rows.tensor_split(world)[rank]).square().sum().backward()
                update_fp8(model, group)
                for name, buffer in fp8_models.state(model).items():
                    record[f"{step}.{part}.{name}"] = buffer
        if step not in SPECIAL:
            optimizer.step()
        optimizer.zero_grad()
    found = {layer.quantised_by for n, layer in fp8_models.layers(model).items() if "up" in n}
    assert found == {"norm"}
    return record, {name: whole(p.detach()) for name, p in model.named_parameters()}


def sharded(mesh):
    policy = MixedPrecisionPolicy(torch.float64, torch.float64, cast_forward_inputs=False)
    stack = model()
    for module in (*stack, stack):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return stack


def trainer(out, scaling="delayed"):
    settings = tiny.settings(windows=8, micro_batches=2, fp8=scaling, fp8_ends=0)
    batches = tiny.batches(settings)
    return Trainer(tiny.model(dtype=torch.float32), batches, settings, out)


def main(out):
    """On four ranks: all of them, then two pairs that know nothing of each other."""
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "shard"))
    for mesh in (init_device_mesh("cpu", (4,)), pairs["shard"]):
        world, group = mesh.size(), mesh.get_group()
        record, weights = steps(sharded(mesh), mesh.get_local_rank(), world, group)
        everyone = [None] * world
        dist.all_gather_object(everyone, record, group=group)
        for other in everyone:
            assert all(torch.equal(other[name], record[name]) for name in record)
        if first:
            save_file({**record, **weights}, out / f"steps{world}.safetensors")
    t = trainer(out / "run")
    for _ in range(2):
        t.train_step()
    t.save()
    t.export(out / "model")
    state = {name: whole(p) for name, p in t.objective.state_dict().items()}
    if first:
        save_file(state, out / "trainer.safetensors")
    parallel.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
