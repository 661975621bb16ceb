"""Loading checkpoints: a folder with config.json and safetensors files.

Loading is strict. All headers are checked before anything is allocated: every tensor that the
configuration asks for must be there exactly once, with the right shape and dtype, and there must be
no other. Then each tensor is read once, straight into its parameter, so that memory stays at about
the size of one model.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

import nemokernels
from nemokernels.models import names
from nemokernels.models.build import build
from nemokernels.models.causal_lm import CausalLM
from nemokernels.models.families import Config, parse_config, unwrapped
from nemokernels.models.fields import ConfigError
from nemokernels.models.files import (
    CONFIG,
    CheckpointError,
    Problems,
    Shards,
    StoredTensor,
    read_json,
)
from nemokernels.models.init import assign, zero_counters
from nemokernels.models.kept import check_activations, keep
from nemokernels.models.names import Layout, TensorSpec
from nemokernels.models.quantization import (
    Quantization,
    Scheme,
    check_layers,
    is_scale,
    nvfp4_of,
    parse_scheme,
)
from nemokernels.models.reward_config import RewardConfig
from nemokernels.models.variants import find_config
from nemokernels.models.vl_config import NemotronVLConfig

QUANT_CONFIG = "hf_quant_config.json"
PREPROCESSOR = "preprocessor_config.json"
MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_TENSORS = 1_000_000  # 20 times the largest model's; a larger count is nonsense
WRAPPERS = ("", "language_model.")  # prefixes of all names of the language model
# Parts of multimodal checkpoints beside `language_model.` that this package has no model for. They
# are not read.
OTHER_TOWERS = ("vision_model.", "mlp1.", "sound_encoder.", "sound_projection.",
                "video_embedder.", "vision_projector.")  # fmt: skip


def checkpoint_spec(name_or_config: str | Config) -> dict[str, TensorSpec]:
    """Name -> (shape, dtype) of every tensor of the published bfloat16 checkpoint, in order.

    All are bfloat16 except the routers' correction biases, which are float32.
    """
    return {
        name: TensorSpec(shape, names.published_dtype(name, torch.bfloat16))
        for name, shape in names.tensor_shapes(find_config(name_or_config))
    }


def from_pretrained(
    folder: str | os.PathLike,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    reward_head: str | None = None,
    keep_quantized: bool = False,
    activations: str | None = None,
) -> CausalLM:
    """Load a checkpoint folder in the Hugging Face layout.

    The folder holds ``model.safetensors``, or shards with ``model.safetensors.index.json``. Names
    of ``nemotron_h`` may begin with ``backbone.`` (as published) or ``model.`` (as transformers 5
    has them in memory, experts stacked or not), those of ``bloom`` may have no prefix, and all may
    stand under ``language_model.``. Tensors are bfloat16, float16, float32 or float64, or
    ModelOpt's FP8 or NVFP4. Quantised layers are dequantised unless ``keep_quantized`` asks
    otherwise; ``model.quantization`` records what the checkpoint said of them. Of a multimodal
    checkpoint that is not of a family of this package, only the language model is loaded.

    Args:
        folder: the checkpoint.
        device: where the parameters go; the CPU by default.
        dtype: dtype of the parameters. None keeps the file's (bfloat16 where layers are
            quantised). A_log, D, dt_bias, the router and its correction bias are at least float32.
        reward_head: the name of the linear layer that a reward model has instead of ``lm_head``, if
            config.json does not say. Its sizes are those of the stored tensors.
        keep_quantized: for inference. NVFP4 linear layers stay quantised (W4A16), and so do the
            routed experts of a layer if they are all in NVFP4, or all in FP8 with activation scales
            (W8A8). The rest is dequantised. ``model.quantization.kept`` names what stays. No
            parameter requires a gradient, and the model cannot be saved.
        activations: "nvfp4" lets kept NVFP4 layers that have activation scales run in W4A4, on a
            GPU with block-scaled matrix units. ``model.quantization.w4a4`` names them.

    Returns:
        The model, in evaluation mode. ``model.file_dtypes`` records the dtypes of the file, which
        :func:`~nemokernels.models.save_pretrained` restores.

    Raises:
        ValueError, RuntimeError: ``activations`` are asked for and not possible on the device.
        CheckpointError: the folder, a file, a tensor or the configuration is not as it must be. The
            message lists every problem (the first 20 in full). Nothing has been allocated then.
    """
    device = torch.device(device or "cpu")
    if device.type == "meta":
        raise ValueError("from_pretrained: `device` is meta, expected a device that holds data")
    if dtype is not None and dtype not in MODEL_DTYPES:
        raise TypeError(f"from_pretrained: `dtype` is {dtype}, expected a floating model dtype")
    check_activations("from_pretrained", activations, keep_quantized, device)
    with open_checkpoint(folder, reward_head) as (config, plan, shards, scalars):
        model = build(config, device="meta", dtype=dtype or plan.dtype)
        try:
            _fill(model, plan, shards, scalars, device, dtype, keep_quantized, activations)
        except ValueError as error:  # only a quantised tensor's values can show this
            raise CheckpointError(f"{folder}: {error}") from error
    return model.requires_grad_(False).eval() if keep_quantized else model.eval()


@contextmanager
def open_checkpoint(folder: str | os.PathLike, reward_head: str | None = None) -> Iterator[Opened]:
    """Open a checkpoint folder and check all its headers; raises as :func:`from_pretrained`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder (one from a hub is downloaded first)")
    data = read_json(folder, CONFIG)
    problems = Problems(folder)
    with Shards(folder, problems) as shards:
        problems.raise_if_any()  # of a file that cannot be read, nothing else is worth saying
        config = _config(folder, data, shards.tensors, reward_head)
        plan = _plan(config, _scheme(folder, data, names.layout(config)), shards.tensors, problems)
        scalars = _scalars(plan, shards, problems) if plan.quantization else {}
        problems.raise_if_any()
        yield Opened(config, plan, shards, scalars)


class Source(NamedTuple):
    """Where a parameter, or expert ``index`` of a stack of experts, comes from."""

    target: str
    index: int | None
    tensor: StoredTensor
    module: str  # the layer's name in the file, for its scales
    algorithm: str | None


class Plan(NamedTuple):
    dtype: torch.dtype  # of everything that is neither quantised nor kept in float32
    shapes: dict[str, tuple[int, ...]]  # parameter -> shape
    sources: list[Source]
    trunk: str  # prefix of its names in the file
    tensors: dict[str, StoredTensor]  # canonical name -> stored tensor
    quantization: Quantization | None
    kept: dict[str, StoredTensor]  # tensors that are carried along unread


class Opened(NamedTuple):
    config: Config
    plan: Plan
    shards: Shards
    scalars: dict[str, torch.Tensor]  # of the quantised layers


def _config(
    folder: Path, data: dict, stored: dict[str, StoredTensor], reward_head: str | None
) -> Config:
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    try:
        data = unwrapped(data)
        config = parse_config({k: v for k, v in data.items() if k != "quantization_config"})
        if isinstance(config, NemotronVLConfig):
            found = os.path.lexists(folder / PREPROCESSOR)
            preprocessor = read_json(folder, PREPROCESSOR) if found else {}
            config = config.completed(shapes, preprocessor)
        if reward_head is not None:
            config = RewardConfig.of_tensors(config, reward_head, shapes)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    if next(islice(names.tensor_shapes(config), MAX_TENSORS, None), None) is not None:
        raise CheckpointError(f"{folder / CONFIG}: describes over {MAX_TENSORS} tensors")
    return config


def _scheme(folder: Path, data: dict, layout: Layout) -> Scheme | None:
    found = []
    if os.path.lexists(folder / QUANT_CONFIG):
        value = read_json(folder, QUANT_CONFIG).get("quantization")
        found.append((QUANT_CONFIG, value))
    if data.get("quantization_config") is not None:
        found.append((CONFIG, data["quantization_config"]))
    schemes = []
    for file, value in found:
        if not isinstance(value, dict):
            raise CheckpointError(f"{folder / file}: the quantisation must be an object")
        try:
            schemes.append(parse_scheme(file, value, partial(_module, layout)))
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
    if len({scheme.algorithm for scheme in schemes}) > 1:
        raise CheckpointError(f"{folder}: {QUANT_CONFIG} and {CONFIG} name different algorithms")
    return schemes[0] if schemes else None


def _module(layout: Layout, name: str) -> str:
    """Our spelling of a module's name in a quantisation list."""
    if not layout.trunk.startswith("language_model."):
        name = name.removeprefix("language_model.")
    trunk = next((trunk for trunk in layout.trunks if name.startswith(trunk)), "")
    return layout.trunk + name.removeprefix(trunk) if trunk else name


def _canonical(
    layout: Layout, stored: dict[str, StoredTensor], problems: Problems
) -> tuple[str, dict[str, StoredTensor]]:
    """The trunk's prefix in the file, and the tensors under their published names. A tensor without
    such a name is a problem."""
    both = [(wrapper, trunk) for wrapper in WRAPPERS for trunk in layout.trunks]
    fitting = [pair for pair in both if "".join(pair) + layout.embeddings in stored]
    if len(fitting) > 1:
        prefixes = ", ".join("".join(pair) for pair in fitting)
        problems.add(f"{layout.embeddings}: stored under several prefixes ({prefixes})")
    wrapper, trunk = (fitting or both)[0]
    tensors = {}
    for name, tensor in stored.items():
        bare = name.removeprefix(wrapper)
        if wrapper and not name.startswith(wrapper):
            if not name.startswith(OTHER_TOWERS):
                problems.add(f"{name}: unexpected (in {tensor.file})")
        elif bare.startswith(trunk):
            tensors[layout.trunk + bare.removeprefix(trunk)] = tensor
        elif bare.startswith(layout.beside):
            tensors[bare] = tensor
        else:
            problems.add(f"{name}: unexpected (in {tensor.file})")
    return trunk, tensors


def _plan(
    config: Config,
    scheme: Scheme | None,
    stored: dict[str, StoredTensor],
    problems: Problems,
) -> Plan:
    layout = names.layout(config)
    kept = {name: tensor for name, tensor in stored.items() if layout.keeps(name)}
    stored = {name: tensor for name, tensor in stored.items() if name not in kept}
    trunk, tensors = _canonical(layout, stored, problems)
    shapes: dict[str, tuple[int, ...]] = {}
    wanted: dict[str, tuple[str, int | None, tuple[int, ...]]] = {}
    listed = list(names.tensor_shapes(config))
    experts = Counter(stack[0] for name, _ in listed if (stack := names.stacked(name)))
    for name, shape in listed:
        target, index = names.stacked(name) or (name, None)
        if index is not None:
            shape = (experts[target], *shape)
        shapes[target] = shape
        if index is None or target in tensors:
            wanted[target] = (target, None, shape)
        else:
            wanted[name] = (target, index, shape[1:])
    modules = {
        name.removesuffix(".weight"): shape
        for name, (_, _, shape) in wanted.items()
        if name.endswith(".weight") and names.is_linear(name.removesuffix(".weight"))
    }
    layers, scales = check_layers(modules, tensors, scheme, problems)
    dtype = _model_dtype(tensors[name] for name in wanted if name in tensors)
    sources = []
    for name, (target, index, shape) in wanted.items():
        module = name.removesuffix(".weight")
        tensor = tensors.get(name)
        if tensor is None:
            problems.add(f"{name}: missing")
            continue
        sources.append(Source(target, index, tensor, module, layers.get(module)))
        if module in layers:
            continue
        if tensor.shape != shape:
            problems.add(f"{name}: {tensor.file} stores shape {tensor.shape}, expected {shape}")
        may_be_wide = names.is_wide(name) or len(shape) == 1
        if tensor.dtype != dtype and not (may_be_wide and tensor.dtype == torch.float32):
            problems.add(f"{name}: {tensor.file} stores {tensor.dtype}, expected {dtype}")
    for name in tensors.keys() - wanted.keys() - scales:
        what = "a scale without its quantised layer" if is_scale(name) else "unexpected"
        problems.add(f"{tensors[name].name}: {what} (in {tensors[name].file})")
    quantization = None if scheme is None else Quantization(layers)
    return Plan(dtype, shapes, sources, trunk, tensors, quantization, kept)


def _model_dtype(tensors: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype of most matrices, so that the message names the odd one out."""
    counts = Counter(t.dtype for t in tensors if len(t.shape) > 1 and t.dtype in MODEL_DTYPES)
    return counts.most_common(1)[0][0] if counts else torch.bfloat16


def _scalars(plan: Plan, shards: Shards, problems: Problems) -> dict[str, torch.Tensor]:
    """Read the scalar scales of the quantised layers; record those of activations and caches."""
    record = plan.quantization
    kinds = {"input_scale": record.input_scales, "k_scale": record.kv_scales,
             "v_scale": record.kv_scales}  # fmt: skip
    scalars = {}
    for name, tensor in plan.tensors.items():
        module, _, leaf = name.rpartition(".")
        if not is_scale(name) or math.prod(tensor.shape) != 1 or tensor.dtype != torch.float32:
            continue
        scalars[name] = shards.read(tensor).reshape(())
        value = scalars[name].item()
        if not (math.isfinite(value) and value >= 0):
            problems.add(f"{tensor.name}: is {value}, expected a finite number >= 0")
        if leaf in kinds:
            kinds[leaf][module] = value
    return scalars


def _fill(
    model: CausalLM,
    plan: Plan,
    shards: Shards,
    scalars: dict[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
    keep_quantized: bool,
    activations: str | None,
) -> None:
    """Give every meta tensor of the model memory and read the checkpoint into it."""
    meta = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in meta.items()}
    if shapes != plan.shapes:
        differ = sorted(set(shapes.items()) ^ set(plan.shapes.items()))
        raise RuntimeError(f"the model and its list of tensor names disagree: {differ[:10]}")
    remember(model, plan, shards)
    filled: dict[str, torch.Tensor] = {}
    sources = plan.sources
    if keep_quantized and (plan.quantization is not None or activations):
        read = partial(_part, plan, shards, scalars)
        gone, w4a4 = keep(model, sources, read, device, dtype or plan.dtype, activations)
        plan.quantization.kept = frozenset(s.module for s in sources if s.target in gone)
        plan.quantization.w4a4 = frozenset(s.module for s in sources if s.target in w4a4)
        sources = [source for source in sources if source.target not in gone]
    with torch.no_grad():
        for source in sources:
            target, index = source.target, source.index
            stored = plan.dtype if source.algorithm else source.tensor.dtype
            if target not in filled:
                kept = dtype or stored
                if names.is_wide(target):
                    kept = torch.promote_types(kept, torch.float32)
                filled[target] = torch.empty_like(meta[target], dtype=kept, device=device)
                assign(model, target, filled[target])
                # A model that was dequantised to a chosen dtype is no longer the file's.
                unlike = plan.quantization is not None and dtype is not None
                model.file_dtypes[target] = (kept, kept if unlike else stored)
            into = filled[target] if index is None else filled[target][index]
            into.copy_(read_value(source, plan, shards, scalars, into.dtype))
    zero_counters(model, device)


def remember(model: CausalLM, plan: Plan, shards: Shards) -> None:
    """Record on the model what saving needs to know about the file."""
    model.quantization, model.file_dtypes, model.file_trunk = plan.quantization, {}, plan.trunk
    model.kept = {name: shards.read(tensor) for name, tensor in plan.kept.items()}


def _part(
    plan: Plan, shards: Shards, scalars: dict[str, torch.Tensor], source: Source, leaf: str
) -> torch.Tensor | None:
    """A tensor of the source's layer; None if it is not in the file."""
    name = f"{source.module}.{leaf}"
    if leaf == "weight":
        return shards.read(source.tensor)
    if name in scalars:
        return scalars[name]
    return shards.read(plan.tensors[name]) if name in plan.tensors else None


def read_value(
    source: Source,
    plan: Plan,
    shards: Shards,
    scalars: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The values of a source, dequantised."""
    part = partial(_part, plan, shards, scalars, source)
    if source.algorithm is None:
        return part("weight")
    if source.algorithm == "FP8":
        return nemokernels.dequantize_fp8(part("weight"), part("weight_scale"), dtype=dtype)
    return nemokernels.dequantize_nvfp4(*nvfp4_of(source.module, part), dtype=dtype)
