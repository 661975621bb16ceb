"""attention through the kernels of torch and of flash-attn, as backends beside our own.

Both take packed sequences, so a batch is passed as one. torch's kernels add up dq in any order
unless ``torch.use_deterministic_algorithms`` is on; flash-attn is asked for a fixed order always.
"""

from __future__ import annotations

import importlib.util

import torch

from nemokernels import _triton

WIDEST = 256  # head size of either


def torch_reason(device: torch.device) -> str | None:
    """Why torch's flash attention cannot run on ``device``; None if it can."""
    why = _triton.cuda_reason(device)
    if why is None and not torch.backends.cuda.is_flash_attention_available():
        why = f"torch {torch.__version__} is built without flash attention"
    return why


def flash_attn_reason(device: torch.device) -> str | None:
    """Why flash-attn cannot run on ``device``; None if it can."""
    why = _triton.cuda_reason(device)
    if why is None and importlib.util.find_spec("flash_attn") is None:
        why = "flash-attn is not installed"
    return why


def unsupported(name: str, dtype: torch.dtype, dim: int, slopes: bool, global_tokens: int) -> str:
    """Why the backend ``name`` cannot take such a call; empty if it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{name} takes bfloat16 and float16, got {dtype}"
    if dim % 8 or dim > WIDEST:
        return f"{name} takes head sizes that are multiples of 8 up to {WIDEST}, got {dim}"
    if global_tokens:
        return f"{name} has no global tokens"
    if slopes and name == "torch":
        return f"{name} has no ALiBi"
    return ""


def forward(name, q, k, v, cu_seqlens, slopes, scale, window):
    """As ref.forward without global tokens, through the backend ``name``."""
    tensors, lengths, sides = _packed(q, k, v, cu_seqlens, window)
    if name == "torch":
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *tensors, *lengths, 0.0, window is None, False, scale=scale, **sides
        )
    else:
        from flash_attn import flash_attn_interface

        out, lse, *_ = flash_attn_interface._flash_attn_varlen_forward(
            *tensors, *lengths, 0.0, scale, causal=True, alibi_slopes=slopes, **sides
        )
    rows, length, heads, _ = q.shape
    return out.reshape(q.shape), lse.view(heads, rows, length).transpose(0, 1).contiguous()


def backward(name, dout, q, k, v, out, lse, cu_seqlens, slopes, scale, window):
    """As ref.backward without global tokens, through the backend ``name``."""
    tensors, lengths, sides = _packed(q, k, v, cu_seqlens, window)
    dout, out = _flat(dout), _flat(out)
    lse = lse.transpose(0, 1).reshape(q.shape[2], -1)
    if name == "torch":
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the dropout there is none
        grads = torch.ops.aten._flash_attention_backward(
            dout, *tensors, out, lse, *lengths, 0.0, window is None, state, state.new_empty(0),
            scale=scale, **sides,
        )  # fmt: skip
    else:
        from flash_attn import flash_attn_interface

        grads = [t.new_empty(t.shape) for t in tensors]
        flash_attn_interface._flash_attn_varlen_backward(
            dout, *tensors, out, lse, *grads, *lengths, 0.0, scale, causal=True, softcap=0.0,
            alibi_slopes=slopes, deterministic=True, **sides,
        )  # fmt: skip
    return tuple(g.reshape(t.shape) for g, t in zip(grads, (q, k, v)))


def _packed(q, k, v, cu_seqlens, window):
    # q, k, v as (tokens, heads, D); bounds and the most tokens of a sequence; the window's sides.
    (rows, length), keys = q.shape[:2], k.shape[1]
    if cu_seqlens is None:
        of_q, of_k = (
            torch.arange(0, rows * n + 1, n, dtype=torch.int32, device=q.device)
            for n in (length, keys)
        )
    else:
        of_q = of_k = cu_seqlens.clamp(0, length)  # whatever it holds, nothing outside is read
    # The longest sequence is not known without waiting for the device; none is longer than the row.
    sides = {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
    return [_flat(t) for t in (q, k, v)], (of_q, of_k, length, keys), sides


def _flat(t: torch.Tensor) -> torch.Tensor:
    t = t.flatten(0, 1)
    return t if t.stride(-1) == 1 else t.contiguous()
