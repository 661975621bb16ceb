"""Run under torchrun: end while gloo's threads still hold tensors. Not a test itself."""

import atexit
import sys

import torch
import torch.distributed as dist

from nemokernels.train import parallel

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    held = dist.group.WORLD  # as torch's caches of sharded tensors hold it
    sys.setswitchinterval(10)  # whoever waits for the interpreter's lock waits to the end
    for _ in range(50):
        dist.all_reduce(torch.ones(100))
    atexit.register(print, "shutting down")
    print("last words")
    parallel.leave()
    raise AssertionError("still here")
