"""A step of every family, forward and backward, compiles to one graph that computes the same."""

import families
import hybrids
import pytest
import test_blocks
import torch
import vl

from nemokernels.models import RewardModel

MODELS = {
    **{family: lambda f=family: families.model(f) for family in families.FAMILIES},
    "nemotron_h_puzzle": test_blocks.model,
    "reward": lambda: RewardModel.on(families.model("nemotron"), "score"),
    "vision": vl.model,
}


@pytest.mark.parametrize("family", MODELS)
def test_compiles_to_one_graph(family):
    torch.compiler.reset()  # families share code, of which only so many versions are kept
    model = MODELS[family]().train()
    tokens, bounds = hybrids.tokens(1, 12), torch.tensor([0, 5, 12], dtype=torch.int32)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = run(tokens, cu_seqlens=bounds)
        out.square().mean().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append({"out": out.detach(), **grads})
    eager, compiled = results
    assert eager.keys() == compiled.keys() and len(eager) > 8
    for name, value in eager.items():
        torch.testing.assert_close(value, compiled[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_picture_and_its_words_compile_to_one_graph():
    torch.compiler.reset()
    model, tokens, pixels = vl.model(), vl.tokens(2), vl.pixels(2, 3, 32, 32)

    def say(pixels):
        return model(tokens, image_features=model.image_features(pixels))

    with torch.no_grad():
        got = torch.compile(say, fullgraph=True, backend="aot_eager")(pixels)
        torch.testing.assert_close(got, say(pixels), rtol=1e-5, atol=1e-6)
