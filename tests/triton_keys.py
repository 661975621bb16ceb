"""Count what Triton would compile, without a GPU and without compiling.

Triton compiles a kernel for every combination of dtypes, constants, options and absent arguments,
of integers that are 1 or divisible by 16, and of addresses that are divisible by 16, unless the
kernel says ``do_not_specialize``.
"""

import collections
import contextlib
from unittest import mock

import torch
import triton_compile
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from nemokernels import _backends, _triton
from nemokernels.ops.fp8 import op as fp8

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@contextlib.contextmanager
def counted(arch=90):
    """Launches inside run nothing; yields ``{kernel: {key}}``, a key per compilation."""
    keys, before = collections.defaultdict(set), driver._active

    def count(self, *args, grid, warmup=False, **options):
        bind = self.device_caches[arch][4]
        _, values, rest = bind(*args, **options)
        named = zip((p.name for p in self.params), map(str, values))
        keys[self.__name__].add((*named, *sorted(rest.items())))

    driver.set_active(triton_compile.Target(arch))
    try:
        with (
            mock.patch.object(JITFunction, "run", count),
            mock.patch.object(_backends, "usable", lambda family, device: ("triton",)),
            mock.patch.object(_triton, "processors", lambda device: 132),
            mock.patch.object(fp8, "reason", lambda device: None),
            mock.patch.object(torch.cuda, "get_device_capability", lambda device: divmod(arch, 10)),
        ):
            yield keys
    finally:
        driver._active = before


def launch(operator, args):
    """The CUDA leg of an operator on CPU tensors; what it returns is not computed."""
    return operator.overload.redispatch(CUDA, *args)


def differ(keys):
    """``{argument: values}`` of those in which the keys differ."""
    values = collections.defaultdict(set)
    for key in keys:
        for name, value in key:
            values[name].add(value)
    return {name: of for name, of in values.items() if len(of) > 1}
