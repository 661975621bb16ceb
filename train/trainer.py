"""The training loop. Everything that decides what a run computes is in :class:`Settings`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from nemokernels import update_correction_bias
from nemokernels.models import (
    Balance,
    CausalLM,
    Fp8Recipe,
    build,
    check_fp8,
    convert_to_fp8,
    held_fp8_weights,
    inner_layers,
    is_fp8_state,
    reset_buffers,
    save_pretrained,
    update_fp8,
)
from nemokernels.train import checkpoint, optim, parallel
from nemokernels.train.data import Batch, Batches
from nemokernels.train.objective import Objective
from nemokernels.train.schedule import wsd


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of a run. Defaults are those published for Nemotron 3 where they exist."""

    steps: int
    """Optimizer steps in the whole run."""
    seq_len: int = 8192
    """Tokens per window."""
    windows: int = 8
    """Windows per optimizer step, over all ranks and micro-batches."""
    micro_batches: int = 1
    """Parts each rank's windows are split into; gradients accumulate."""
    lr: float = 4.5e-4
    """Peak learning rate."""
    min_lr: float = 4.5e-6
    """Learning rate at the start of warm-up and the end of decay."""
    warmup: int = 0
    """Steps of linear warm-up."""
    decay: int = 0
    """Last steps, with minus-sqrt decay."""
    weight_decay: float = 0.1
    """AdamW's, of matrices and convolution taps."""
    clip: float = 1.0
    """Largest global gradient norm."""
    mtp_depths: int = 2
    """How many times the MTP block is applied, if the model has one."""
    mtp_weight: float = 0.3
    """Weight of the mean MTP loss."""
    balance_rate: float = 1e-3
    """Step of the loss-free expert balancing, per optimizer step."""
    balance_coefficient: float = 1e-4
    """Weight of the routers' auxiliary loss per window, as for Nemotron 3 Nano and Super (Ultra's
    is not known); 0 turns it off. Only the default objective uses it."""
    seed: int = 0
    """Order of the data."""
    fp8: Literal["off", "delayed", "current"] = "off"
    """Whether the trunk's linear layers multiply in FP8, with delayed or current scaling."""
    fp8_ends: int = 2
    """How many first and how many last layers stay out of FP8."""
    recompute: bool = False
    """Save memory: keep only the inputs of every layer and run it again in the backward."""
    expert_parallel: int = 1
    """How many ranks divide the experts among them; a token travels once to each that holds one."""

    def check(self) -> None:
        """Raise ValueError for sizes below 1, a schedule longer than the run, or reversed rates."""
        for name in ("steps", "seq_len", "windows", "micro_batches", "expert_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warmup < 0 or self.decay < 0 or self.warmup + self.decay > self.steps:
            raise ValueError(
                f"warmup ({self.warmup}) and decay ({self.decay}) must not be negative and must "
                f"fit into steps ({self.steps})"
            )
        if self.balance_coefficient < 0:
            raise ValueError(f"balance_coefficient is {self.balance_coefficient}, expected >= 0")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"need 0 <= min_lr <= lr, got min_lr {self.min_lr}, lr {self.lr}")

    def check_ranks(self, world: int) -> None:
        """Raise ValueError unless the work divides evenly among ``world`` ranks."""
        if self.windows % (world * self.micro_batches):
            raise ValueError(
                f"windows ({self.windows}) must be a multiple of ranks x micro_batches "
                f"({world} x {self.micro_batches})"
            )
        if world % self.expert_parallel:
            raise ValueError(
                f"expert_parallel ({self.expert_parallel}) must divide the number of ranks "
                f"({world})"
            )


@dataclass(frozen=True)
class Report:
    """What one optimizer step did. Losses are global means, the next token's first."""

    step: int
    losses: list[float]
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    load_max: float
    """Tokens of the busiest expert over the mean, worst layer: 1 is balanced; 0 without experts."""


class Trainer:
    """Trains ``model`` on ``batches``. Every rank must pass the same arguments.

    Under torchrun the model is sharded with FSDP2 (train/parallel.py says how). ``param_dtype`` is
    the compute type of gathered weights: bfloat16 on CUDA, float32 on CPU unless given.

    A ``model`` on meta is sharded before it gets memory, so that no rank ever holds all of it. Then
    ``fill`` gives it its values, the same on every rank (:func:`~nemokernels.models.deferred`, or a
    seed and ``reset_parameters``).

    ``objective`` makes the module that computes the loss, by default an :class:`Objective`. It
    needs that class's two methods and takes the batches that ``batches.at`` returns.
    """

    def __init__(
        self,
        model: CausalLM,
        batches: Batches,
        settings: Settings,
        out: Path,
        *,
        fill: Callable[[CausalLM], None] | None = None,
        objective: Callable[[CausalLM], nn.Module] | None = None,
        keep: int = 2,
        param_dtype: torch.dtype | None = None,
    ):
        settings.check()
        self.settings, self.batches, self.out, self.keep = settings, batches, Path(out), keep
        self.rank, self.world, self.device = parallel.start()
        settings.check_ranks(self.world)
        on_meta = any(parameter.is_meta for parameter in model.parameters())
        if on_meta and fill is None:
            raise ValueError("a model on meta needs `fill`, which gives it its values")
        self.model = (model if on_meta else model.to(self.device)).train()
        if objective is None and settings.balance_coefficient:
            balance = Balance(settings.balance_coefficient, settings.seq_len, settings.windows)
            for router in self.model.routers():
                router.balance = balance
        self.fp8_checked = settings.fp8 == "off"
        if settings.fp8 != "off":
            inner = inner_layers(self.model, settings.fp8_ends)
            convert_to_fp8(self.model, Fp8Recipe(settings.fp8), inner)
        self.objective = (
            objective(self.model)
            if objective
            else Objective(
                self.model, mtp_depths=settings.mtp_depths, mtp_weight=settings.mtp_weight
            )
        )
        if settings.recompute:
            parallel.recompute(self.model.fsdp_units())
        if dist.is_initialized():
            on_cuda = self.device.type == "cuda"
            dtype = param_dtype or (torch.bfloat16 if on_cuda else torch.float32)
            parallel.shard(self.objective, self.model, self.device, dtype, settings.expert_parallel)
        if on_meta:
            self.objective.to_empty(device=self.device)
            reset_buffers(self.model)
            fill(self.model)
        self.optimizer = optim.adamw(
            self.objective.named_parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.step = 0

    def facts(self) -> dict:
        """What a checkpoint must share with this run to continue it: model and order of the data.

        Steps and learning rates may change: WSD is meant for prolonging the stable phase.
        """
        config = json.loads(json.dumps(self.model.config.to_dict(), default=str))
        tokens = hashlib.sha256(self.batches.corpus.tokens.numpy()).hexdigest()[:16]
        keys = ("seed", "seq_len", "windows")
        if self.settings.fp8 != "off":
            keys += ("fp8", "fp8_ends")
        order = {key: getattr(self.settings, key) for key in keys}
        return {"model": config, "tokens": tokens, **order}

    def resume(self) -> int:
        """Continue from the newest checkpoint in ``out``, if there is one; return the step."""
        path = checkpoint.latest(self.out / "checkpoints")
        if path is not None:
            self.step = checkpoint.load(path, self.objective, self.optimizer, self.facts())
        return self.step

    def save(self) -> Path:
        """Write a checkpoint of the current step."""
        return checkpoint.save(
            self.out / "checkpoints",
            self.step,
            self.objective,
            self.optimizer,
            self.facts(),
            keep=self.keep,
        )

    def export(self, folder: Path) -> None:
        """Write the model in the Hugging Face layout, replacing ``folder``. Rank 0 writes."""
        full = {}
        for name, tensor in self.model.state_dict().items():
            if is_fp8_state(name):
                continue
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.rank == 0:
                full[name] = whole.cpu()
        if self.rank == 0:
            copy = build(self.model.config, device="meta", dtype=torch.float32)
            copy.load_state_dict(full, assign=True)
            copy.kept = self.model.kept
            fresh = folder.with_name(folder.name + ".new")
            shutil.rmtree(fresh, ignore_errors=True)
            save_pretrained(copy, fresh)
            shutil.rmtree(folder, ignore_errors=True)
            fresh.rename(folder)
        if dist.is_initialized():
            dist.barrier()

    def run(self, *, save_every: int, on_step: Callable[[Report], None]) -> None:
        """Train to the last step, saving every ``save_every`` steps and at the end."""
        while self.step < self.settings.steps:
            on_step(self.train_step())
            if self.step % save_every == 0 or self.step == self.settings.steps:
                self.save()

    def train_step(self) -> Report:
        """One optimizer step over the global batch of ``self.step``.

        Raises:
            FloatingPointError: a gradient is not finite on some rank; no weight has changed.
        """
        started, s = time.perf_counter(), self.settings
        losses, tokens = self.backward()
        norm = optim.clip_gradients(self.objective.parameters(), s.clip)
        lr = wsd(
            self.step, steps=s.steps, warmup=s.warmup, decay=s.decay, peak=s.lr, floor=s.min_lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        load = self._balance()
        self.step += 1
        seconds = time.perf_counter() - started
        return Report(self.step, losses, lr, norm, tokens, seconds, load)

    def backward(self) -> tuple[list[float], int]:
        """Fill every gradient for the global batch of ``self.step``; return losses and tokens.

        Raises:
            RuntimeError: in the first step, if a product of a converted layer did not run, or on a
                GPU not in FP8.
        """
        micro = list(self._micro_batches())
        (totals,) = parallel.all_sum(sum(self.objective.label_counts(batch) for batch in micro))
        losses = torch.zeros_like(totals)
        several = self.settings.fp8 != "off" and len(micro) > 1
        with held_fp8_weights(self.model) if several else contextlib.nullcontext():
            for batch in micro:
                # FSDP reduces after each micro-batch; waiting would keep whole gradients in memory.
                loss, terms = self.objective(batch, totals.clamp(min=1))
                loss.backward()
                update_fp8(self.model)
                losses += terms
        if not self.fp8_checked:
            check_fp8(self.model)
            self.fp8_checked = True
        parallel.sum_whole_gradients(self.objective.parameters())
        tokens = torch.tensor(float(sum(b.tokens.numel() for b in micro)), device=self.device)
        parallel.all_sum(losses, tokens)
        return losses.tolist(), int(tokens)

    def _micro_batches(self) -> Iterator[Batch]:
        parts = self.settings.micro_batches
        for part in range(parts):
            shard, shards = self.rank * parts + part, self.world * parts
            batch = self.batches.at(self.step, shard, shards)
            yield type(batch)(*(part if part is None else part.to(self.device) for part in batch))

    def _balance(self) -> float:
        """Loss-free balancing: move every router's correction bias once per optimizer step."""
        routers = list(self.model.routers())
        if not routers:
            return 0.0
        counts = self.model.expert_counts
        (total,) = parallel.all_sum(torch.cat(counts))
        counts = total.split([len(row) for row in counts])
        for router, row in zip(routers, counts):
            update_correction_bias(
                router.e_score_correction_bias, row, rate=self.settings.balance_rate
            )
            router.expert_counts.zero_()
        return torch.stack([row.max() / row.double().mean() for row in counts]).max().item()
