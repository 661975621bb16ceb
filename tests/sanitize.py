"""Five small problems of every Mamba-2 op, for compute-sanitizer to watch (``make sanitize``).

    compute-sanitizer --tool memcheck python tests/sanitize.py [op ...]

Nothing is compared here; tests/test_fuzz.py does that.
"""

import sys

import fuzz
import torch
from fuzz_draw import Draw

from nemokernels import use_backend
from nemokernels._registry import FAMILIES

PROBLEMS = 5


def run(fuzzed, device, call):
    """``call(operator, args)`` on the problems, spread over the specialisations."""

    def judge(name, *args):
        print("  ", name, *(tuple(a.shape) for a in args if isinstance(a, torch.Tensor)))
        return call(FAMILIES[fuzzed.family].operators[name], args)

    every = fuzzed.specialisations
    for n in range(PROBLEMS):
        options = every[n * len(every) // PROBLEMS]
        print(fuzzed.name, options)
        fuzzed.problem(Draw(n, 150, device), judge, **options)


def main(families):
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device; none here")
    device, ran = torch.device("cuda"), False
    for fuzzed in fuzz.FUZZED:
        for backend, reason in FAMILIES[fuzzed.family].backends.items():
            if families and fuzzed.family not in families:
                continue
            if why := reason(device):
                print(f"NOT RUN: {fuzzed.name} by {backend}: {why}")
                continue
            ran = True
            with use_backend(fuzzed.family, backend, device):
                run(fuzzed, device, lambda o, args: o.overload(*args))
    torch.cuda.synchronize()
    if not ran:
        sys.exit(f"nothing ran of {families or 'all'}")


if __name__ == "__main__":
    main(sys.argv[1:])
