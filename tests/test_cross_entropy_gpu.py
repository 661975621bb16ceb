"""The Triton kernels of linear_cross_entropy on a GPU."""

import on_gpu
import pytest
import torch

from nemokernels import linear_cross_entropy, testing, use_backend

pytestmark = pytest.mark.gpu
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("cross_entropy", "triton"):
        yield


def problem(tokens, features, classes, dtype=BF16, device="cpu"):
    hidden = torch.randn(tokens, features, device=device).to(dtype)
    weight = (torch.randn(classes, features, device=device) / features**0.5).to(dtype)
    targets = torch.randint(classes, (tokens,), device=device)
    targets[1::7] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (130, 72, 1000), (257, 2688, 4099), (33, 31, 77), (3000, 64, 20000)]
)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}])
def test_against_the_reference(shape, dtype, options):
    hidden, weight, targets = problem(*shape, dtype)

    def fn(h, w):
        where = targets.to(h.device)
        return linear_cross_entropy(h, w, where, reduction="none", **options)

    on_gpu.compare(fn, [hidden, weight], [torch.randn(shape[0])])


def test_same_bits_and_memory():
    """Twice the same, and beside the gradients no more than three times hidden."""
    hidden, weight, targets = problem(8192, 2688, 131072, device="cuda")
    fn = lambda h, w: linear_cross_entropy(h, w, targets)  # noqa: E731
    first = testing.gradients(fn, [hidden, weight])
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn(*leaves).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert on_gpu.same_bits(first[1], [t.grad for t in leaves])
    assert extra < weight.nbytes + 3.5 * hidden.nbytes


def test_graph():
    hidden, weight, targets = problem(500, 256, 5000, device="cuda")
    fn = lambda: testing.gradients(  # noqa: E731
        lambda h, w: linear_cross_entropy(h, w, targets, z_loss=1e-3), [hidden, weight]
    )[1]
    assert on_gpu.same_bits(fn(), on_gpu.replay(fn))


def test_targets_that_are_no_class():
    hidden, weight, targets = problem(64, 128, 1000, device="cuda")
    targets[3], targets[9] = 1000, -1
    loss = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [3, 9]


def test_past_two_to_the_31_elements():
    hidden, _, _ = problem(16, 4096, 1, device="cuda")
    weight = torch.zeros(2**31 // 4096 + 300, 4096, device="cuda", dtype=BF16)
    weight[-1] = hidden[0]
    targets = torch.full((16,), weight.shape[0] - 1, device="cuda")
    fn = lambda h, w: linear_cross_entropy(h, w, targets, reduction="none")  # noqa: E731
    (loss,), (_, dweight) = testing.gradients(fn, [hidden, weight])
    assert loss[0] < 1e-3 < loss[1] and dweight[-1].any() and dweight[0].any()
