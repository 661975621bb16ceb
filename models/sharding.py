"""Fill a model that was sharded before it had values: each rank reads its own part."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from nemokernels.models.build import build
from nemokernels.models.causal_lm import CausalLM
from nemokernels.models.checkpoint import open_checkpoint, read_value, remember
from nemokernels.models.init import local_part

__all__ = ["deferred"]


def deferred(folder: str | os.PathLike) -> tuple[CausalLM, Callable[[CausalLM], None]]:
    """Return a checkpoint's model on meta, in float32, and the function that fills it.

    Between the two calls, shard the model (``fully_shard``, ``split_experts``) and give it memory
    (``to_empty``). Every rank checks all headers and then reads only its part of each tensor, but
    the whole of a tensor that is stored quantised.

    Raises:
        CheckpointError: as :func:`~nemokernels.models.from_pretrained`, from either call.
    """
    with open_checkpoint(folder) as opened:
        model = build(opened.config, device="meta", dtype=torch.float32)
    return model, lambda model: _fill(model, folder)


@torch.no_grad()
def _fill(model: CausalLM, folder: str | os.PathLike) -> None:
    with open_checkpoint(folder) as (_, plan, shards, scalars):
        remember(model, plan, shards)
        tensors = model.state_dict()
        for source in plan.sources:
            into, box = local_part(tensors[source.target])
            stored = plan.dtype if source.algorithm else source.tensor.dtype
            unlike = plan.quantization is not None
            model.file_dtypes[source.target] = (into.dtype, into.dtype if unlike else stored)
            if source.index is not None:
                if not box[0].start <= source.index < box[0].stop:
                    continue
                into, box = into[source.index - box[0].start], box[1:]
            if into.numel() == 0:
                continue
            if source.algorithm is None:
                into.copy_(shards.read(source.tensor, box))
            else:
                into.copy_(read_value(source, plan, shards, scalars, into.dtype)[box])
