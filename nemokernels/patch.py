"""Make transformers' own Nemotron-H, Mamba-2 and Bamba classes run on the ops of this package."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType

import torch

from nemokernels.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from nemokernels.ops.gated_rms_norm import rmsnorm_fn
from nemokernels.ops.rms_norm import rms_norm
from nemokernels.ops.ssd import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from nemokernels.ops.state_update import selective_state_update

__all__ = ["patch_transformers"]

_TESTED = "5.23"
# module under transformers.models: (mixer, gated norm, classes whose forward is rms_norm)
_CLASSES = {
    "nemotron_h": ("NemotronHMamba2Mixer", "NemotronHRMSNormGated", ("NemotronHRMSNorm",)),
    "mamba2": ("Mamba2Mixer", "MambaRMSNormGated", ()),
    "bamba": ("BambaMixer", "BambaRMSNormGated", ()),
}
_MARK = "_nemokernels_patched"


def patch_transformers() -> contextlib.ExitStack:
    """Route transformers' Nemotron-H, Mamba-2 and Bamba models through nemokernels.

    This replaces, in the three modeling modules, for models built before or after and on every
    device: the causal convolution and its update, the chunk scan, the state update, the fused
    training path, the gated norm and, in Nemotron-H, the layer norm. (The layer norms of Mamba-2
    and Bamba round before they multiply by the weight; they keep doing so.) Attention, MLP and
    experts stay as they are. The fused training path cannot mask padding, so it is used only for
    batches without an attention mask.

    Unlike the torch code it replaces, a cached decode step writes into its state and refuses to
    record a gradient: call it under ``torch.no_grad()``, as ``generate`` does.

    Returns:
        A context manager. ``with patch_transformers(): ...`` or ``.close()`` undoes the patch;
        dropping it leaves the patch in place. While a patch is in place, another call changes
        nothing, and neither does undoing that call.

    Raises:
        ImportError: transformers is not installed, or lacks a name that is to be replaced.
    """
    modules = {name: _modeling(name) for name in _CLASSES}
    with contextlib.ExitStack() as undo:
        for name, module in modules.items():
            if not hasattr(module, _MARK):
                _patch(module, *_CLASSES[name], undo)
        return undo.pop_all()


def _modeling(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ImportError as error:
        raise ImportError(
            f"patch_transformers: transformers' {name} model cannot be imported ({error}); "
            f"install transformers >= {_TESTED}"
        ) from error


def _patch(
    module: ModuleType,
    mixer: str,
    gated_norm: str,
    norms: tuple[str, ...],
    undo: contextlib.ExitStack,
) -> None:
    functions = {
        "causal_conv1d_fn": _dropping_unknown(causal_conv1d_fn),
        "causal_conv1d_update": _dropping_unknown(causal_conv1d_update),
        "mamba2_chunk_scan": _dropping_unknown(mamba_chunk_scan_combined),
        "mamba2_selective_state_update": _dropping_unknown(selective_state_update),
        "mamba2_split_conv1d_scan_combined": _unless_padded(mamba_split_conv1d_scan_combined),
    }
    missing = [n for n in (*functions, mixer, gated_norm, *norms) if not hasattr(module, n)]
    if missing:
        import transformers

        raise ImportError(
            f"patch_transformers: {module.__name__} of transformers {transformers.__version__} has "
            f"no {', '.join(missing)}; install transformers >= {_TESTED}"
        )
    for name, function in functions.items():
        _set(module, name, function, undo)
    forward = getattr(module, mixer).forward
    _set(getattr(module, mixer), "forward", _telling_of_padding(forward), undo)
    _set(getattr(module, gated_norm), "forward", _gated_norm_forward, undo)
    for name in norms:
        _set(getattr(module, name), "forward", _norm_forward, undo)
    setattr(module, _MARK, True)
    undo.callback(delattr, module, _MARK)


def _set(owner: object, name: str, value: object, undo: contextlib.ExitStack) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _dropping_unknown(function: Callable) -> Callable:
    # The models hand every keyword of their own forward down to these functions.
    known = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **{k: v for k, v in kwargs.items() if k in known})

    return call


def _unless_padded(function: Callable) -> Callable:
    call = _dropping_unknown(function)

    @functools.wraps(function)
    def fused(*args, padded: bool = False, **kwargs):
        # On None the mixer takes its separate steps, in which it masks the convolution's output.
        return None if padded else call(*args, **kwargs)

    return fused


def _telling_of_padding(forward: Callable) -> Callable:
    # A mixer's extra keywords reach the fused function; the other functions drop them. What stands
    # before the mask is named differently from release to release.
    place = list(inspect.signature(forward).parameters).index("attention_mask")

    @functools.wraps(forward)
    def with_padding(*args, **kwargs):
        mask = args[place] if len(args) > place else kwargs.get("attention_mask")
        return forward(*args, padded=mask is not None, **kwargs)

    return with_padding


def _gated_norm_forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None):
    return rmsnorm_fn(
        hidden_states,
        self.weight,
        z=gate,
        eps=self.variance_epsilon,
        group_size=self.group_size,
        norm_before_gate=False,
    )


def _norm_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)
