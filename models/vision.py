"""The C-RADIO vision encoder: a pre-norm vision transformer over linear patches.

Module names are the tensor names of the published checkpoints. Shapes: n images, (rows, columns)
their size in patches, P = rows x columns, W the encoder's width, p the side of a patch in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nemokernels._checks import check, check_tensor
from nemokernels._registry import acc_dtype
from nemokernels.models.linear import Linear
from nemokernels.models.vl_config import VisionConfig

__all__ = ["VisionModel", "bilinear_weights", "flatten_patches"]


def flatten_patches(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """(n, 3, rows * p, columns * p) -> (n, P, 3 p p), patches row by row.

    Within a patch the order is channel, row, column: the order in which vLLM and transformers 5.23
    (``models/radio``) feed the published embedder.
    """
    n, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    x = pixels.reshape(n, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(n, rows * columns, channels * patch * patch)


def bilinear_weights(size: int, given: int, device: torch.device | None = None) -> torch.Tensor:
    """Matrix (size, given), float64, that interpolates linearly from ``given`` samples to ``size``.

    As torch's ``interpolate(mode="bilinear", align_corners=False)`` along one axis: sample centres
    are aligned, edges repeat, and shrinking does not smooth.
    """
    centres = (torch.arange(size, dtype=torch.float64, device=device) + 0.5) * given / size - 0.5
    centres = centres.clamp(0, given - 1)
    samples = torch.arange(given, dtype=torch.float64, device=device)
    return (1 - (centres[:, None] - samples).abs()).clamp(min=0)


class ClassTokens(nn.Module):
    """Class and register tokens, which precede the patches."""

    def __init__(self, tokens: int, width: int, **kwargs):
        super().__init__()
        self.token = nn.Parameter(torch.empty(tokens, width, **kwargs))


class PatchGenerator(nn.Module):
    """Turn patches into tokens: a linear map without bias, learned positions, and a prefix.

    The grid is resized to the image. An image that is not square takes the upper left part of the
    square grid resized to its longer side (source: transformers 5.23, ``models/radio``).
    """

    def __init__(self, config: VisionConfig, **kwargs):
        super().__init__()
        config.check_known()
        self.patch, self.grid, width = config.patch_size, config.grid_size, config.hidden_size
        self.embedder = Linear(3 * config.patch_size**2, width, **kwargs)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2, width, **kwargs))
        self.cls_token = ClassTokens(config.num_prefix_tokens, width, **kwargs)

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """(P, W): the position grid resized to rows x columns, in float32 or wider.

        Computed as two matrix products: unlike torch's interpolation, their gradient sums in a
        fixed order.
        """
        wide = acc_dtype(self.pos_embed)
        weights = bilinear_weights(max(rows, columns), self.grid, self.pos_embed.device).to(wide)
        grid = self.pos_embed.view(self.grid, self.grid, -1).to(wide)
        across = torch.einsum("yi,ijw->yjw", weights[:rows], grid)
        return torch.einsum("xj,yjw->yxw", weights[:columns], across).flatten(0, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = flatten_patches(pixels.to(self.embedder.weight.dtype), self.patch)
        rows, columns = (size // self.patch for size in pixels.shape[-2:])
        x = self.embedder(patches)
        x = x + self.positions(rows, columns).to(x.dtype)
        return torch.cat([self.cls_token.token.to(x.dtype).expand(len(x), -1, -1), x], 1)


class Attention(nn.Module):
    """Every token attends to every token of its image, by torch's scaled dot product."""

    def __init__(self, config: VisionConfig, **kwargs):
        super().__init__()
        self.heads, width = config.num_attention_heads, config.hidden_size
        self.qkv = Linear(width, 3 * width, bias=True, **kwargs)
        self.proj = Linear(width, width, bias=True, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (n, heads, tokens, head_dim)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(-2))


class FFN(nn.Module):
    """``fc2(gelu(fc1(x)))`` with the exact GELU, x times the normal distribution function."""

    def __init__(self, config: VisionConfig, **kwargs):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True, **kwargs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """``x + attention(norm1(x))``, then ``x + ffn(norm2(x))``."""

    def __init__(self, config: VisionConfig, **kwargs):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, **kwargs)
        self.attn = Attention(config, **kwargs)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, **kwargs)
        self.mlp = FFN(config, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, config: VisionConfig, **kwargs):
        super().__init__()
        self.patch_generator = PatchGenerator(config, **kwargs)
        self.blocks = nn.ModuleList(
            Block(config, **kwargs) for _ in range(config.num_hidden_layers)
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patch_generator(pixels)
        for block in self.blocks:
            x = block(x)
        return x


class Radio(nn.Module):
    def __init__(self, config: VisionConfig, **kwargs):
        super().__init__()
        self.model = Transformer(config, **kwargs)


class VisionModel(nn.Module):
    """Turn normalised pixels into one vector per patch.

    There is no norm after the last block; the prefix tokens are dropped.

    Args:
        config: its sizes; the number of prefix tokens and the side of the grid must be known.
        device, dtype: of its parameters, unset until :meth:`reset_parameters` or a checkpoint.
    """

    def __init__(self, config: VisionConfig, **kwargs):
        super().__init__()
        self.config = config
        self.radio_model = Radio(config, **kwargs)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, height, width), normalised, in multiples of the patch -> (n, rows, columns, W)."""
        patch = self.config.patch_size
        check_tensor(
            "VisionModel",
            "pixels",
            pixels,
            shape=(None, 3, None, None),
            dims="(n, 3, height, width)",
        )
        height, width = pixels.shape[-2:]
        rows, columns = height // patch, width // patch
        whole = min(rows, columns) > 0 and (height, width) == (rows * patch, columns * patch)
        check(
            "VisionModel",
            whole,
            f"`pixels` are {height} x {width}, expected multiples of the patch {patch}",
        )
        x = self.radio_model.model(pixels)
        return x[:, self.config.num_prefix_tokens :].unflatten(1, (rows, columns))

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Norms one, biases zero, everything else normal(0, std)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif ".norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=std)
