"""Registration of operators with torch.library, and the table of their backends.

Every operator lives in the namespace ``nemokernels`` and is defined once, in Python. It has three
legs: CPU runs the plain-torch reference, Meta runs the fake, CUDA runs what the operator's
``plan()`` picks (a kernel, or the reference with one warning where no kernel exists yet).

Rules that hold for every operator:

* outputs are contiguous and never alias an input, so the fake is ``new_empty`` of the right shape;
* functional operators are differentiable themselves (``register_autograd``); their backward is a
  second operator, which refuses to be differentiated again;
* forward-mode differentiation raises: torch would drop the tangents without a word;
* operators that mutate (caches, states) say so in the schema and refuse inputs that need gradients.
"""

from __future__ import annotations

import functools
import pkgutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

NAMESPACE = "nemokernels"


class _Library(torch.library.Library):
    """Puts a guard before what runs under autograd, register_autograd's kernel among it."""

    def impl(self, op_name, fn, dispatch_key="", **options):
        if dispatch_key == "Autograd":
            fn = _refuse_tangents(op_name, fn)
        super().impl(op_name, fn, dispatch_key, **options)


def _refuse_tangents(name: str, kernel: Callable) -> Callable:
    @functools.wraps(kernel)
    def guard(*args, **kwargs):
        if forward_ad._current_level >= 0 and any(
            isinstance(leaf, torch.Tensor) and forward_ad.unpack_dual(leaf).tangent is not None
            for leaf in tree_leaves((args, kwargs))
        ):
            raise RuntimeError(f"forward-mode AD is not supported by {NAMESPACE}::{name}")
        return kernel(*args, **kwargs)

    return guard


LIBRARY = _Library(NAMESPACE, "FRAGMENT")


Example = Callable[[torch.device, torch.dtype], tuple]


@dataclass
class Family:
    """One folder under ``ops/``: its operators, and their backends besides the reference.

    ``backends`` maps a backend's name to a function ``device -> reason``, which says why the
    backend cannot run there or returns None if it can. The order is that of preference.
    """

    name: str
    backends: dict[str, Callable[[torch.device], str | None]] = field(default_factory=dict)
    operators: dict[str, Operator] = field(default_factory=dict)


@dataclass(frozen=True)
class Operator:
    """A registered operator. ``example(device, dtype)`` returns small arguments it accepts, and so
    do the ``probes`` of a backend."""

    overload: torch._ops.OpOverload
    reference: Callable
    example: Example | None
    probes: Mapping[str, Sequence[Example]] = field(hash=False)
    differentiable: bool


FAMILIES: dict[str, Family] = {}


def family(
    name: str, backends: dict[str, Callable[[torch.device], str | None]] | None = None
) -> Family:
    """Declare the op folder ``name`` and the fast backends it has."""
    if name in FAMILIES:
        raise RuntimeError(f"op family {name!r} is declared twice")
    FAMILIES[name] = Family(name, backends or {})
    return FAMILIES[name]


def register(
    family: Family,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    example: Example | None = None,
    probes: Mapping[str, Sequence[Example]] | None = None,
    plan: Callable | None = None,
    kernel: str = "",
    cuda: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> torch._ops.OpOverload:
    """Define ``nemokernels::<schema>`` with its legs and return the overload.

    Args:
        family: the op folder it belongs to.
        schema: torch schema without namespace, for example ``"relu2(Tensor x) -> Tensor"``.
        reference: plain-torch implementation; the CPU leg, the oracle, and the CUDA leg until a
            kernel exists. It may return views or the same tensor twice; the leg then makes copies.
        fake: shapes and dtypes of the outputs (contiguous), for Meta and FakeTensor.
        example: makes small valid arguments; used by the self-test and by the generic tests.
        probes: by backend, examples of sizes for which it has other kernels; the self-test of this
            backend runs them too.
        plan, kernel: the CUDA leg of most operators. ``plan(*args)`` returns a configuration;
            unless its ``backend`` is "reference", ``kernel(*args, configuration)`` runs, the
            function with this name under ``nemokernels.ops`` ("relu2.kernel:forward"). It is
            imported on the first call. The first argument is a tensor on the device to use.
        cuda: the CUDA leg of the others. With neither, the reference runs, with one warning per
            shape.
        setup_context, backward: as ``torch.library.register_autograd`` takes them. A functional
            operator without ``backward`` raises when it is differentiated.
    """
    name = schema.split("(", 1)[0].strip()
    LIBRARY.define(schema)
    LIBRARY.impl(name, _without_grad(reference), "CPU")
    if plan is not None:
        cuda = _planned(name, reference, plan, kernel)
    LIBRARY.impl(name, cuda or reference_on_cuda(name, reference), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    if overload._schema.is_mutable:
        LIBRARY.impl(name, _refuse_grad(name, overload), "Autograd")
    else:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}",
            backward or _no_backward(name),
            setup_context=setup_context,
            lib=LIBRARY,
        )
    family.operators[name] = Operator(
        overload, reference, example, probes or {}, backward is not None
    )
    return overload


def acc_dtype(x: torch.Tensor | torch.dtype) -> torch.dtype:
    """Accumulation type: float64 stays float64, everything else accumulates in float32."""
    dtype = x if isinstance(x, torch.dtype) else x.dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def _without_grad(reference: Callable) -> Callable:
    # Under autograd the torch ops inside the leg would record a graph of their own, which opcheck
    # rejects and which would bypass the registered backward.
    @functools.wraps(reference)
    def leg(*args, **kwargs):
        taken = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if _has_data(leaf)}

        def own(out):
            if not isinstance(out, torch.Tensor):
                return out
            # A slice of a one-row tensor counts as contiguous but keeps offset and strides.
            fresh = out.is_contiguous() and out.untyped_storage().nbytes() == out.nbytes
            if not fresh or (_has_data(out) and _storage(out) in taken):
                out = out.clone(memory_format=torch.contiguous_format)
            taken.add(_storage(out))
            return out

        # Autocast would round the operands of every product inside, even those the leg has widened.
        with torch.no_grad(), torch._C._DisableAutocast():
            return tree_map(own, reference(*args, **kwargs))

    return leg


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _has_data(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() > 0


def _planned(name: str, reference: Callable, plan: Callable, kernel: str) -> Callable:
    instead = reference_on_cuda(name, reference)

    def leg(*args):
        config = plan(*args)
        if config.backend == "reference":
            return instead(*args)
        launch = pkgutil.resolve_name(f"nemokernels.ops.{kernel}")
        with torch.cuda.device_of(args[0]):
            return launch(*args, config)

    return leg


def reference_on_cuda(name: str, reference: Callable) -> Callable:
    """The CUDA leg where no kernel takes the call: one warning per shape, then the reference."""
    leg = _without_grad(reference)

    @functools.wraps(reference)
    def warn_and_run(*args, **kwargs):
        warn_reference(name, *args)
        return leg(*args, **kwargs)

    return warn_and_run


def filling(function: Callable, **places: int) -> Callable:
    """``function``, which then also copies results into tensors that it is given by keyword.

    ``filling(backward, dx=0)(*args, dx=slice)`` leaves the first result in ``slice``, as kernels
    do that write into a part of something larger.
    """

    def fill(*args, **targets):
        results = function(*args)
        for name, target in targets.items():
            if target is not None:
                target.copy_(results[places[name]])
        return results

    return fill


def warn_reference(name: str, *args) -> None:
    """Say once per operator and shape that the plain-torch reference runs on a CUDA device."""
    shapes = tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))
    _warn_once(
        f"{NAMESPACE}::{name} has no kernel for shapes {shapes} on this device; "
        "the plain-torch reference runs instead. `nemokernels env` lists the backends."
    )


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _refuse_grad(name: str, overload: torch._ops.OpOverload) -> Callable:
    def guard(*args, **kwargs):
        if torch.is_grad_enabled() and any(
            isinstance(leaf, torch.Tensor) and leaf.requires_grad
            for leaf in tree_leaves((args, kwargs))
        ):
            raise RuntimeError(
                f"{NAMESPACE}::{name} writes into its state and has no gradient; "
                "call it under torch.no_grad() or detach its inputs"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args, **kwargs)

    return guard


def _no_backward(name: str) -> Callable:
    forward = name.removesuffix("_backward")
    message = (
        f"double backward is not supported by {NAMESPACE}::{forward}"
        if forward != name
        else f"{NAMESPACE}::{name} is not differentiable"
    )

    def backward(ctx, *grads):
        raise RuntimeError(message)

    return backward
