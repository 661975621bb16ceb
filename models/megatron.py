"""Build a model from tensors with Megatron-LM's names and shapes.

The Mamba-2 and Mamba-2-Hybrid 8B models of NVIDIA's Mamba study are published only in this form, in
``.pt`` files, which can run code when they are opened. Nothing here opens one: a separate script
does (README, "Megatron checkpoints") and hands over the tensors.

Source: the name tables of NeMo's ``ssm.py``. The files themselves were not available.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from nemokernels.models import names
from nemokernels.models.build import build
from nemokernels.models.causal_lm import CausalLM
from nemokernels.models.config import NemotronHConfig
from nemokernels.models.families import Config
from nemokernels.models.files import Problems
from nemokernels.models.variants import find_config

__all__ = ["from_megatron", "megatron_shapes"]

_QKV = "self_attention.linear_qkv.weight"
_OUTSIDE = {
    "backbone.embeddings.weight": "embedding.word_embeddings.weight",
    "backbone.norm_f.weight": "decoder.final_norm.weight",
    "lm_head.weight": "output_layer.weight",
}
# Our name below `backbone.layers.L.` -> theirs below `decoder.layers.L.`. Other names are equal.
_LAYER = {
    "M": {},
    "*": {
        "norm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "mixer.q_proj.weight": _QKV,
        "mixer.k_proj.weight": _QKV,
        "mixer.v_proj.weight": _QKV,
        "mixer.o_proj.weight": "self_attention.linear_proj.weight",
    },
    "-": {
        "norm.weight": "mlp.linear_fc1.layer_norm_weight",
        "mixer.up_proj.weight": "mlp.linear_fc1.weight",
        "mixer.down_proj.weight": "mlp.linear_fc2.weight",
    },
}
# Later releases of Megatron-LM fuse the norm before a Mamba layer into its projection.
_FUSED_NORM = re.compile(r"(decoder\.layers\.\d+)\.mixer\.in_proj\.layer_norm_weight")


def megatron_shapes(name_or_config: str | Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor as Megatron-LM stores it on one rank, in the study's spelling.

    The rows of ``linear_qkv`` are grouped by key-value head: its query heads, then its key, then
    its value.

    Raises:
        ValueError: not a Nemotron-H of Mamba-2, attention and MLP layers.
    """
    config = _hybrid(name_or_config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in names.tensor_shapes(config):
        theirs = _theirs(config, name)
        rows = shapes.get(theirs, (0,))[0]  # of q, k and v together
        shapes[theirs] = (rows + shape[0], *shape[1:])
    return shapes


def from_megatron(name_or_config: str | Config, tensors: Mapping[str, torch.Tensor]) -> CausalLM:
    """Build the model of a variant or configuration from a Megatron-LM checkpoint's tensors.

    The model shares the tensors' memory, except for queries, keys and values and for what it holds
    in float32. ``save_pretrained`` writes every tensor in the dtype in which it was given.

    Args:
        name_or_config: see ``list_variants``.
        tensors: every tensor, whole, under its Megatron name: from one rank, or joined. The norm
            before a Mamba layer may be ``norm.weight`` or ``mixer.in_proj.layer_norm_weight``;
            ``..._extra_state`` is ignored.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: not a Nemotron-H of Mamba-2, attention and MLP layers.
        CheckpointError: a tensor is missing, unexpected or has another shape; all are named.
    """
    config, problems = _hybrid(name_or_config), Problems("Megatron tensors")
    given: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_extra_state"):
            continue
        spelled = _FUSED_NORM.sub(r"\1.norm.weight", name)
        if spelled in given:
            problems.add(f"{spelled}: given in both spellings")
        given[spelled] = tensor
    shapes = megatron_shapes(config)
    for name, shape in shapes.items():
        if name not in given:
            problems.add(f"{name}: missing")
        elif not isinstance(given[name], torch.Tensor):
            problems.add(f"{name}: is no tensor, but of type {type(given[name]).__name__}")
        elif tuple(given[name].shape) != shape:
            problems.add(f"{name}: has shape {tuple(given[name].shape)}, expected {shape}")
        elif not given[name].is_floating_point():
            problems.add(f"{name}: is {given[name].dtype}, expected a floating dtype")
    for name in given.keys() - shapes.keys():
        problems.add(f"{name}: unexpected")
    problems.raise_if_any()
    model, state = build(config, device="meta"), {}
    model.file_dtypes = {}
    for name, _ in names.tensor_shapes(config):
        value = _part(config, name, given[_theirs(config, name)])
        kept = torch.promote_types(value.dtype, torch.float32) if names.is_wide(name) else None
        state[name] = value.to(kept or value.dtype)
        model.file_dtypes[name] = (state[name].dtype, value.dtype)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _hybrid(name_or_config: str | Config) -> NemotronHConfig:
    config = find_config(name_or_config)
    hybrid = isinstance(config, NemotronHConfig) and not set(config.pattern) - set(_LAYER)
    if not hybrid or config.mtp_pattern or config.block_configs is not None:
        raise ValueError(
            "`name_or_config` must be a nemotron_h of Mamba-2, attention and MLP layers without "
            "MTP; the Megatron names of others are not known here"
        )
    return config


def _theirs(config: NemotronHConfig, name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    index, _, leaf = name.removeprefix("backbone.layers.").partition(".")
    return f"decoder.layers.{index}.{_LAYER[config.pattern[int(index)]].get(leaf, leaf)}"


def _part(config: NemotronHConfig, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The part of their tensor that is ours: all of it, or its queries, keys or values."""
    part = re.search(r"\.([qkv])_proj\.", name)
    if part is None:
        return tensor
    heads = config.num_attention_heads // config.num_key_value_heads
    grouped = tensor.view(-1, heads + 2, config.head_dim, tensor.shape[-1])
    rows = {"q": slice(heads), "k": slice(heads, heads + 1), "v": slice(heads + 1, None)}
    return grouped[:, rows[part[1]]].reshape(-1, tensor.shape[-1])
