"""What is allocated while something runs, and what is kept for its backward."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Follows the memory of tensors that are made inside: bytes at most, and of the largest."""

    def __enter__(self):
        self.live, self.peak, self.sizes = 0, 0, []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs or {}))
                 if isinstance(t, torch.Tensor)}  # fmt: skip
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:
                self._made(t.untyped_storage())
        return out

    def _made(self, storage):
        size = storage.nbytes()
        self.live += size
        self.sizes.append(size)
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size):
        self.live -= size


def kept_beside(given, run):
    """Bytes that ``run()`` saves for its backward, beside the memory of the ``given`` tensors."""
    known = {t.untyped_storage().data_ptr() for t in given}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(kept.values())
