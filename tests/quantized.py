"""Checkpoints of a tiny model whose layers are FP8 or NVFP4, as ModelOpt writes them."""

import json

import torch
from safetensors.torch import save_file

from nemokernels.models import NemotronHConfig, names

FIELDS = dict(
    model_type="nemotron_h", vocab_size=48, hidden_size=32, hybrid_override_pattern="ME*-",
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=48,
    mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=16, n_groups=2, chunk_size=16,
    n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=48, moe_latent_size=16, num_nextn_predict_layers=1,
    mtp_hybrid_override_pattern="*E",
)  # fmt: skip
SHAPES = dict(names.tensor_shapes(NemotronHConfig.from_dict(FIELDS)))
LINEAR = [n.removesuffix(".weight") for n in SHAPES
          if n.endswith(".weight") and names.is_linear(n.removesuffix(".weight"))]  # fmt: skip
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
INPUT, EXPERT, ATTENTION = (
    "backbone.layers.0.mixer.in_proj",
    "backbone.layers.1.mixer.experts.1.down_proj",
    "backbone.layers.2.mixer.k_proj",
)


def plain():
    return {
        n: torch.randn(s).to(names.published_dtype(n, torch.bfloat16)) for n, s in SHAPES.items()
    }


def quantise(values, module, algorithm):
    """Replace a layer by random codes and scales; return the values they stand for."""
    rows, columns = SHAPES[f"{module}.weight"]
    if algorithm == "FP8":
        codes = torch.randn(rows, columns).to(torch.float8_e4m3fn)
        scale = torch.rand(()) + 0.5
        values |= {f"{module}.weight": codes, f"{module}.weight_scale": scale}
        wide = codes.double() * scale.double()
    else:
        codes = torch.randint(0, 16, (rows, columns))
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
        blocks = (torch.rand(rows, columns // 16) * 4 + 0.1).to(torch.float8_e4m3fn)
        scale = torch.rand(()) + 0.5
        values |= {f"{module}.weight": packed, f"{module}.weight_scale": blocks,
                   f"{module}.weight_scale_2": scale}  # fmt: skip
        by_column = blocks.double().repeat_interleave(16, 1)
        wide = E2M1.double()[codes] * by_column * scale.double()
    if algorithm != "W4A16_NVFP4":
        values[f"{module}.input_scale"] = torch.rand(()) + 0.5
    return wide


def write(folder, values, declared=None, config=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**FIELDS, **(config or {})}))
    if declared is not None:
        text = json.dumps({"producer": {"name": "modelopt"}, "quantization": declared})
        (folder / "hf_quant_config.json").write_text(text)
    save_file(values, folder / "model.safetensors")
    return folder


def mixed(layers, **more):
    return {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": {
        module: {"quant_algo": algorithm, "group_size": 16} for module, algorithm in layers.items()
    }, **more}  # fmt: skip
