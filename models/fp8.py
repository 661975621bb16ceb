"""Linear layers whose products run in FP8: conversion of a model, scaling state, what really ran.

A training step of a converted model::

    with held_fp8_weights(model):          # one cast per weight and step
        for batch in micro_batches:
            loss(model, batch).backward()
            update_fp8(model)              # one reduction over the ranks, one kernel
    optimizer.step()

The scales of a forward are read when it runs and renewed after its backward, those of gradients and
of forward tensors in one update. Nothing reads a forward tensor's scale in between except a
recomputation, which needs the old one. So the scales that a step uses are Transformer Engine's, and
a recomputed forward finds the state as the first one did, raises the same maxima to the same values
and changes nothing.

Under delayed scaling a norm that only such layers read emits its result in FP8: the scale is known
before. The codes are those that the layer would have made of it. One pass over the activations is
saved, for queries, keys and values three.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from nemokernels import (
    Fp8Codes,
    Fp8Normed,
    cast_fp8_weight,
    delayed_scaling_update,
    fp8_linear,
    fp8_products,
    relu2,
)
from nemokernels._checks import check
from nemokernels.models.linear import Linear, each_row, is_exact
from nemokernels.models.mixers import Experts

__all__ = [
    "Fp8Layer",
    "Fp8Linear",
    "Fp8Recipe",
    "check_fp8",
    "convert_to_fp8",
    "fp8_report",
    "held_fp8_weights",
    "inner_layers",
    "is_fp8_state",
    "update_fp8",
]

MULTIPLE = 16  # an FP8 product's sizes, on every GPU that has it
STATE = "fp8_state"
_models = itertools.count()  # tells two models' layers of the same name apart in the ledger


@dataclass(frozen=True)
class Fp8Recipe:
    """How tensors are scaled into FP8. The defaults are Transformer Engine's delayed scaling.

    Raises:
        ValueError: a field has no such value.
    """

    scaling: str = "delayed"
    """"delayed": from the maxima of earlier steps. "current": from the tensor itself, stateless."""
    grad_format: str = "e5m2"
    """"e5m2" is HYBRID, "e4m3" is E4M3 everywhere. Inputs and weights are always E4M3."""
    margin: float = 0.0
    """Powers of two left unused above the maximum (delayed)."""
    amax_history_len: int = 1024
    """Steps a maximum is remembered, at least 1 (delayed)."""
    amax_algorithm: str = "max"
    """"max" over the history, or "most_recent" (delayed)."""

    def __post_init__(self) -> None:
        choices = {
            "scaling": ("delayed", "current"),
            "grad_format": ("e5m2", "e4m3"),
            "amax_algorithm": ("max", "most_recent"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            check("Fp8Recipe", value in allowed, f"`{name}` is {value!r}, expected {allowed}")
        length = self.amax_history_len
        check("Fp8Recipe", length >= 1, f"`amax_history_len` is {length}, expected at least 1")


class Fp8State(nn.Module):
    """Delayed scaling's state of one layer, float32 in a model of any dtype.

    ``scale`` (2) and ``amax_history`` (L, 2) of input and weight; ``grad_scale`` (1) and
    ``grad_amax_history`` (L, 1) of the output's gradient. The backward writes into storage of its
    own: torch.compile refuses a backward whose forward's storage has been written since.
    """

    def __init__(self, length: int, device: torch.device):
        super().__init__()
        options = {"dtype": torch.float32, "device": device}
        self.register_buffer("scale", torch.ones(2, **options))
        self.register_buffer("amax_history", torch.zeros(length, 2, **options))
        self.register_buffer("grad_scale", torch.ones(1, **options))
        self.register_buffer("grad_amax_history", torch.zeros(length, 1, **options))

    def reset(self) -> None:
        """As at the start of training."""
        for name, buffer in self.named_buffers():
            buffer.fill_(1.0 if name.endswith("scale") else 0.0)

    def _apply(self, fn, recurse=True):
        def apply(tensor: torch.Tensor) -> torch.Tensor:
            out = fn(tensor)
            return out if out.dtype == torch.float32 else tensor.to(out.device)

        return super()._apply(apply, recurse)


class Fp8Linear(Linear):
    """A linear layer whose three products run in FP8; see :func:`nemokernels.fp8_linear`.

    It shares its parameters with the layer it replaces. If the weight has an attribute
    ``main_grad`` (Megatron's convention), the weight's gradient is added to that, and ``grad``
    stays None.
    """

    def __init__(self, linear: Linear, recipe: Fp8Recipe, layer: str):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.recipe, self.layer = recipe, layer
        delayed = recipe.scaling == "delayed"
        device = linear.weight.device
        self.fp8_state = Fp8State(recipe.amax_history_len, device) if delayed else None
        self.holding = False
        self.held: Fp8Codes | None = None
        self.held_version = 0
        self.quantised_by = ""

    def input_scale(self) -> torch.Tensor | None:
        # A row on its own is not a row of codes.
        return None if self.fp8_state is None or is_exact() else self.fp8_state.scale[0]

    def forward(
        self,
        x: torch.Tensor | Fp8Normed,
        act: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The layer of x, or of ``act(x)``; of x as its norm has emitted it, if it has."""
        emitted = isinstance(x, Fp8Normed)
        self.quantised_by = "norm" if emitted else "layer"
        if emitted:
            return self._product(x.y, x_codes=x.codes, x_amax=x.amax)
        squared_relu = act is relu2
        if act is not None and not squared_relu:
            x = act(x)
        if is_exact() and self.fp8_state is None:
            raise RuntimeError("exact mode: current FP8 scaling makes a row depend on its batch")
        return each_row(lambda rows: self._product(rows, squared_relu=squared_relu), x)

    def _product(
        self,
        x: torch.Tensor,
        *,
        squared_relu: bool = False,
        x_codes: Fp8Codes | None = None,
        x_amax: torch.Tensor | None = None,
    ) -> torch.Tensor:
        slots = {}
        if (state := self.fp8_state) is not None:
            slots = {
                "x_scale": state.scale[0],
                "w_scale": state.scale[1],
                "dy_scale": state.grad_scale[0],
                "x_amax": state.amax_history[0, 0],
                "w_amax": state.amax_history[0, 1],
                "dy_amax": state.grad_amax_history[0, 0],
            }
        if x_amax is not None and torch.is_grad_enabled():
            slots["x_amax"].clamp_(min=x_amax)
        return fp8_linear(
            x, self.weight, self.bias, **slots, grad_format=self.recipe.grad_format,
            squared_relu=squared_relu, x_codes=x_codes, weight_codes=self._weight_codes(slots),
            main_grad=getattr(self.weight, "main_grad", None), layer=self.layer,
        )  # fmt: skip

    def _weight_codes(self, slots: dict[str, torch.Tensor]) -> Fp8Codes | None:
        # In training, a forward without gradients (the first one under reentrant checkpointing)
        # records no maximum, so its cast is not the one to keep.
        if not self.holding or (self.training and not torch.is_grad_enabled()):
            return None
        if self.held is None:
            slot = slots.get("w_amax") if torch.is_grad_enabled() else None
            self.held = cast_fp8_weight(self.weight, slots.get("w_scale"), slot)
            if not torch.compiler.is_compiling():
                self.held_version = self.weight._version
        elif not torch.compiler.is_compiling() and self.held_version != self.weight._version:
            raise RuntimeError(f"{self.layer}: the weight was changed while its FP8 cast is held")
        return self.held


def inner_layers(model: nn.Module, ends: int = 0) -> Callable[[str, Linear], bool]:
    """A filter for :func:`convert_to_fp8`: the linear layers of the trunk's layers.

    Head, embeddings and MTP block are not among them, nor the first and last ``ends`` layers, which
    Nemotron-H's recipes keep in bfloat16 (Megatron-Bridge's: 2).
    """
    layers = list(model.trunk.layers)
    check("inner_layers", 0 <= 2 * ends < max(len(layers), 1),
          f"`ends` is {ends}, which leaves none of {len(layers)} layers")  # fmt: skip
    chosen = {m for layer in layers[ends : len(layers) - ends] for m in layer.modules()}
    return lambda name, module: module in chosen


def convert_to_fp8(
    model: nn.Module,
    recipe: Fp8Recipe | None = None,
    filter: Callable[[str, Linear], bool] | None = None,
) -> nn.Module:
    """Replace linear layers of ``model`` by :class:`Fp8Linear`, in place, before it is sharded.

    Args:
        model: a model of this package, or any module with :class:`Linear` layers in it.
        recipe: the scaling; None is ``Fp8Recipe()``.
        filter: ``(name, layer) -> whether``; None: those of :func:`inner_layers`. A layer whose
            sizes are not multiples of 16 stays as it is; :func:`fp8_report` names it.

    Returns:
        model.

    Raises:
        ValueError: no layer is left to convert, or the model is converted already.
    """
    recipe = recipe or Fp8Recipe()
    filter = filter or inner_layers(model)
    check("convert_to_fp8", not any(True for _ in _layers(model)), "`model` is converted already")
    number, left_out = next(_models), {}
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            left_out[name] = "expert weights: their FP8 products have no gradient"
        if not isinstance(module, Linear):
            continue
        n, k = module.weight.shape
        if not filter(name, module):
            left_out[name] = "the filter leaves it out"
        elif n % MULTIPLE or k % MULTIPLE:
            left_out[name] = f"its sizes {n} x {k} are not multiples of {MULTIPLE}"
        else:
            parent, _, leaf = name.rpartition(".")
            layer = Fp8Linear(module, recipe, f"{number}/{name}").train(module.training)
            setattr(model.get_submodule(parent), leaf, layer)
    reasons = "; ".join(f"{name}: {why}" for name, why in itertools.islice(left_out.items(), 3))
    check("convert_to_fp8", any(True for _ in _layers(model)),
          f"no linear layer of `model` is converted ({reasons or 'it has none'})")  # fmt: skip
    model.fp8_left_out = left_out
    return model


@torch.no_grad()
def update_fp8(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Renew the scales of all FP8 layers, after every backward: one launch on a GPU.

    In a process group the maxima are reduced over ``group`` (None: all ranks) by one all-reduce
    before, so that ranks that share a weight or a batch share its scales. Every rank takes part,
    with the same layers; a layer that no rank used keeps its state. Does nothing under current
    scaling. It can be captured in a CUDA graph after one call outside of it.
    """
    layers = [layer for layer in _layers(model) if layer.fp8_state is not None]
    if not layers:
        return
    recipe, states = layers[0].recipe, [layer.fp8_state for layer in layers]
    scales = [scale for s in states for scale in (s.scale, s.grad_scale)]
    histories = [h for s in states for h in (s.amax_history, s.grad_amax_history)]
    amax = None
    if dist.is_initialized():
        amax = torch.cat([history[0] for history in histories])
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
    delayed_scaling_update(
        scales, histories, amax, format=["e4m3", recipe.grad_format] * len(states),
        margin=recipe.margin, algorithm=recipe.amax_algorithm,
    )  # fmt: skip


@contextlib.contextmanager
def held_fp8_weights(model: nn.Module) -> Iterator[None]:
    """Cast every FP8 weight at its first use inside the block and use these codes until its end.

    For the micro-batches of one optimizer step, and for inference. The codes take two bytes per
    parameter on every rank. Weights must not change inside.

    Raises:
        RuntimeError: at a forward that sees a weight changed since its cast (not when compiled).
    """
    layers = list(_layers(model))
    for layer in layers:
        layer.holding = True
    try:
        yield
    finally:
        for layer in layers:
            layer.holding, layer.held = False, None


def is_fp8_state(name: str) -> bool:
    """Whether a name in a ``state_dict`` is scaling state, which a model that is not converted
    lacks."""
    return f".{STATE}." in f".{name}"


@dataclass(frozen=True)
class Fp8Layer:
    """What became of one linear layer.

    ``promised``: it was converted. ``products``: where its "forward", "dgrad" and "wgrad" have run,
    as :func:`nemokernels.fp8_products` tells. ``reason``: why it was not converted.
    ``quantised_by``: what quantised the input of the last forward, the "norm" before the layer or
    the "layer".
    """

    name: str
    promised: bool
    products: dict[str, str]
    reason: str = ""
    quantised_by: str = ""


def fp8_report(model: nn.Module) -> list[Fp8Layer]:
    """Every linear layer of a converted model: promised or not, and what of it has really run."""
    found = [
        Fp8Layer(name, True, fp8_products(module.layer), quantised_by=module.quantised_by)
        for name, module in model.named_modules()
        if isinstance(module, Fp8Linear)
    ]
    left_out = getattr(model, "fp8_left_out", {})
    return found + [Fp8Layer(name, False, {}, why) for name, why in left_out.items()]


def check_fp8(model: nn.Module) -> None:
    """Hold a model that has trained a step to its conversion.

    Raises:
        RuntimeError: a product of a converted layer has not run, or on a GPU not in FP8; the
            message names the layers.
    """
    wrong = []
    for layer in fp8_report(model):
        module = model.get_submodule(layer.name)
        if not layer.promised:
            continue
        wanted = ["forward", "dgrad"] + ["wgrad"] * module.weight.requires_grad
        missing = [product for product in wanted if product not in layer.products]
        emulated = [p for p, where in layer.products.items() if where != "scaled_mm"]
        if missing:
            wrong.append(f"{layer.name}: {', '.join(missing)} has not run")
        elif emulated and module.weight.device.type == "cuda":
            wrong.append(f"{layer.name}: {', '.join(emulated)} ran in the reference")
    if wrong:
        raise RuntimeError("layers converted to FP8 that did not run in it: " + "; ".join(wrong))


def _layers(model: nn.Module) -> Iterator[Fp8Linear]:
    return (module for module in model.modules() if isinstance(module, Fp8Linear))
