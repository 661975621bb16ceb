"""Vision encoder, pixel shuffle and pruning: second formulas and hand-computed cases."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
import vl

from nemokernels.models.nemotron_vl import pixel_shuffle, retained
from nemokernels.models.vision import VisionModel, bilinear_weights, flatten_patches
from nemokernels.testing import assert_matches


def encoder(dtype=torch.float64, **changes):
    made = VisionModel(vl.vision_config(**changes), dtype=dtype)
    vl.redraw(made)
    return made


def norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def second_formula(model, pixels, dtype=torch.float64):
    """The encoder by its definition: one image, one head and one patch at a time."""
    p = {name: value.detach().to(dtype) for name, value in model.named_parameters()}
    prefix = "radio_model.model."
    c = model.config
    rows, columns = (size // c.patch_size for size in pixels.shape[-2:])
    side, d = max(rows, columns), c.hidden_size // c.num_attention_heads
    grid = p[prefix + "patch_generator.pos_embed"][0].view(c.grid_size, c.grid_size, -1)
    grid = F.interpolate(grid.permute(2, 0, 1)[None], size=(side, side), mode="bilinear")[0]
    out = []
    for image in pixels.to(dtype):
        tokens = list(p[prefix + "patch_generator.cls_token.token"])
        for y in range(rows):
            for x in range(columns):
                size = c.patch_size
                patch = image[:, y * size : (y + 1) * size, x * size : (x + 1) * size]
                weight = p[prefix + "patch_generator.embedder.weight"]
                tokens.append(weight @ patch.flatten() + grid[:, y, x])
        x = torch.stack(tokens)
        for block in range(c.num_hidden_layers):
            b = {name.removeprefix(f"{prefix}blocks.{block}."): value for name, value in p.items()}
            h = norm(x, b["norm1.weight"], b["norm1.bias"])
            q, k, v = (h @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]).chunk(3, -1)
            heads = []
            for head in range(c.num_attention_heads):
                part = slice(head * d, (head + 1) * d)
                scores = q[:, part] @ k[:, part].T / math.sqrt(d)
                weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                heads.append(weights @ v[:, part])
            x = x + torch.cat(heads, -1) @ b["attn.proj.weight"].T + b["attn.proj.bias"]
            h = norm(x, b["norm2.weight"], b["norm2.bias"])
            h = h @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
            h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
            x = x + h @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
        out.append(x[c.num_prefix_tokens :].view(rows, columns, -1))
    return torch.stack(out)


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (40, 40), (16, 40), (40, 16), (128, 128)])
def test_encoder_against_a_second_formula(size):
    model, pixels = encoder(), vl.pixels(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(model(pixels), second_formula(model, pixels), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_in_low_precision(dtype):
    model, pixels = encoder(dtype), vl.pixels(2, 3, 32, 32).to(dtype)
    exact, low = (second_formula(model, pixels, kind) for kind in (torch.float64, dtype))
    assert_matches(model(pixels), exact, low)
    assert model(pixels).dtype == dtype


def test_images_do_not_see_each_other():
    model, pixels = encoder(torch.float32), vl.pixels(3, 3, 32, 32)
    alone = model(pixels)[1]
    pixels[0], pixels[2] = float("nan"), 1e4
    assert torch.equal(model(pixels)[1], alone)
    assert model(pixels[:0]).shape == (0, 4, 4, 24)


@pytest.mark.parametrize("size", [(4, 4), (16, 16), (23, 23), (5, 11)])
def test_encoder_against_transformers(size):
    c = vl.vision_config()
    peer = transformers.RadioModel(
        transformers.RadioConfig(
            hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads, patch_size=c.patch_size,
            mlp_ratio=c.intermediate_size / c.hidden_size, num_cls_tokens=2, num_registers=3,
            max_img_size=c.grid_size * c.patch_size, norm_mean=[0.0] * 3, norm_std=[1.0] * 3,
        )
    ).double().eval()  # fmt: skip
    model = encoder()
    ours = {name.removeprefix("radio_model.model."): v for name, v in model.state_dict().items()}
    generator = peer.embeddings
    with torch.no_grad():
        generator.patch_projection.weight.copy_(ours["patch_generator.embedder.weight"])
        generator.position_embedding.copy_(ours["patch_generator.pos_embed"])
        generator.cls_register_token.copy_(ours["patch_generator.cls_token.token"])
        for index, layer in enumerate(peer.encoder.layer):
            b = {name.removeprefix(f"blocks.{index}."): value for name, value in ours.items()}
            for leaf in ("weight", "bias"):
                parts = b[f"attn.qkv.{leaf}"].chunk(3)
                attention = layer.attention
                for proj, part in zip(
                    (attention.q_proj, attention.k_proj, attention.v_proj), parts
                ):
                    getattr(proj, leaf).copy_(part)
                getattr(attention.o_proj, leaf).copy_(b[f"attn.proj.{leaf}"])
                pairs = {"norm1": layer.norm1, "norm2": layer.norm2}
                pairs |= {"mlp.fc1": layer.mlp.fc1, "mlp.fc2": layer.mlp.fc2}
                for name, module in pairs.items():
                    getattr(module, leaf).copy_(b[f"{name}.{leaf}"])
        pixels = vl.pixels(2, 3, *(8 * n for n in size), dtype=torch.float64)
        theirs = peer(pixels).features
    # transformers resizes the positions in float32.
    assert (model(pixels).flatten(1, 2) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize(("size", "given"), [(32, 128), (1, 7), (7, 1), (5, 5), (9, 4), (4, 9)])
def test_bilinear_weights_are_torchs(size, given):
    x = torch.randn(3, given, dtype=torch.float64)
    theirs = F.interpolate(x[None], size=size, mode="linear", align_corners=False)[0]
    torch.testing.assert_close(x @ bilinear_weights(size, given).T, theirs, rtol=0, atol=1e-12)


def test_positions_by_hand():
    """A grid of 4 made into 2: the mean of the inner pairs. An image 1 x 2 takes the first row."""
    generator = encoder(grid_size=4).radio_model.model.patch_generator
    grid = torch.arange(16, dtype=torch.float64).view(1, 16, 1).expand(1, 16, 24)
    with torch.no_grad():
        generator.pos_embed.copy_(grid)
    assert generator.positions(2, 2)[:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert generator.positions(1, 2)[:, 0].tolist() == [2.5, 4.5]
    assert generator.positions(2, 1)[:, 0].tolist() == [2.5, 10.5]
    assert torch.equal(generator.positions(4, 4), generator.pos_embed[0])


def test_positions_of_a_16_bit_grid_are_resized_in_float32():
    exact, low = encoder(), encoder(torch.bfloat16)
    exact.load_state_dict(low.state_dict())
    generators = (model.radio_model.model.patch_generator for model in (exact, low))
    want, got = (generator.positions(5, 7) for generator in generators)
    assert got.dtype == torch.float32
    assert_matches(got, want, want.float())


def test_initial_values():
    model = VisionModel(vl.vision_config(), dtype=torch.float64)
    model.reset_parameters(0.5)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif ".norm" in name:
            assert (value == 1).all(), name
        else:
            assert 0.35 < value.std() < 0.65, name


def test_patches_are_flattened_channel_by_channel():
    pixels = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = flatten_patches(pixels, 2)
    assert patches.shape == (2, 6, 12)
    assert patches[0, 0].tolist() == [0, 1, 6, 7, 24, 25, 30, 31, 48, 49, 54, 55]
    assert patches[1, 4].tolist() == [
        72 + v for v in (14, 15, 20, 21, 38, 39, 44, 45, 62, 63, 68, 69)
    ]


def test_gradients():
    """Of everything at once, by finite differences along random directions."""
    model = encoder(num_hidden_layers=1, grid_size=3, num_prefix_tokens=1, patch_size=2)
    names, values = zip(*model.named_parameters())
    pixels = vl.pixels(1, 3, 4, 4, dtype=torch.float64).requires_grad_()

    def run(pixels, *values):
        return torch.func.functional_call(model, dict(zip(names, values)), (pixels,))

    assert torch.autograd.gradcheck(run, (pixels, *values), fast_mode=True)
    run(pixels, *values).square().sum().backward()
    assert all(value.grad.abs().sum() > 0 for value in values)


@pytest.mark.parametrize(
    "bad", [(1, 3, 32), (1, 1, 32, 32), (1, 3, 30, 32), (1, 3, 32, 4), (1, 3, 0, 32)]
)
def test_bad_pixels(bad):
    with pytest.raises((ValueError, TypeError), match="pixels"):
        encoder(torch.float32)(torch.zeros(bad))


@pytest.mark.parametrize("name", ["num_prefix_tokens", "grid_size"])
def test_what_only_a_checkpoint_knows_is_asked_for(name):
    with pytest.raises(ValueError, match=name):
        encoder(**{name: None})


def test_pixel_shuffle_by_hand():
    """A 2 x 4 image of vectors (row, column): 1 x 2 tokens, each square row by row."""
    x = torch.tensor([[[[r, c] for c in range(4)] for r in range(2)]])
    assert pixel_shuffle(x).tolist() == [[[[0, 0, 0, 1, 1, 0, 1, 1], [0, 2, 0, 3, 1, 2, 1, 3]]]]
    assert pixel_shuffle(torch.zeros(3, 32, 32, 1280)).shape == (3, 16, 16, 5120)
    for shape in ((1, 3, 4, 2), (1, 4, 3, 2)):
        with pytest.raises(ValueError, match="patches"):
            pixel_shuffle(torch.zeros(shape))


# Two tokens per frame, each a unit vector in the plane given by its angle in degrees.
CLIP = [(0, 0), (0, 60), (90, 60), (90, 240)]  # scores: 255 255, 0 1/2, 1 0, 0 2
CASES = {
    0.0: [[1, 1], [1, 1], [1, 1], [1, 1]],
    0.3: [[1, 1], [0, 1], [1, 0], [0, 1]],  # int(8 * 0.7) = 5
    0.5: [[1, 1], [0, 0], [1, 0], [0, 1]],  # 4
    0.625: [[1, 1], [0, 0], [0, 0], [0, 1]],  # 3
    0.75: [[1, 1], [0, 0], [0, 0], [0, 0]],  # 2, a frame
    0.99: [[1, 1], [0, 0], [0, 0], [0, 0]],  # never less than a frame
}


def clip(angles, scale=1.0, dtype=torch.float64):
    radians = torch.tensor(angles, dtype=torch.float64) * math.pi / 180
    return (scale * torch.stack([radians.cos(), radians.sin()], -1)).to(dtype)


@pytest.mark.parametrize("rate", CASES)
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_retained_by_hand(rate, scale):
    assert retained(clip(CLIP, scale), rate).int().tolist() == CASES[rate]


def test_retained_keeps_the_earlier_of_equals_and_the_whole_first_frame():
    still = torch.tensor([[1.0, 0], [0, 1], [0, -1]]).expand(5, 3, 2)  # cosines exactly 1
    kept = retained(still, 0.4)  # 9 of 15, all scores equal after the first frame
    assert kept.flatten().int().tolist() == [1] * 9 + [0] * 6
    assert retained(still[:1], 0.9).all()  # a video of one frame
    long = retained(torch.ones(400, 50, 2), 0.5).flatten()  # enough for a sort to be unstable
    assert long[:10_000].all() and not long[10_000:].any()
    turned = torch.tensor([[[1.0, 0]], [[-1, 0]], [[1, 0]]])  # scores 255, 2, 2
    assert retained(turned, 0.3).flatten().tolist() == [True, True, False]


def test_retained_counts_in_floating_point():
    assert retained(vl.pixels(10, 100, 4), 0.9).sum() == 100  # a frame
    assert retained(vl.pixels(10, 10, 4), 0.7).sum() == int(100 * (1 - 0.7)) == 30
    assert retained(vl.pixels(1000, 1, 4), 0.9).sum() == 99


def test_retained_scores_16_bit_features_in_float32():
    """Turns of 1 and 2.4 degrees score 0.0002 and 0.0009; in bfloat16 both cosines are 1."""
    features = clip([(0, 0), (1, 2.4)], scale=8.0, dtype=torch.bfloat16)
    assert retained(features, 0.25).flatten().tolist() == [True, True, False, True]


def test_retained_against_transformers():
    from transformers.models.nemotron_h_omni.modeling_nemotron_h_omni import compute_retention_mask

    features = vl.pixels(7, 12, 16).cumsum(0)
    for rate in (0.0, 0.1, 0.5, 0.77, 0.95):
        theirs = compute_retention_mask(
            video_embeds=features, thw=(7, 3, 4), spatial_merge_size=1, q=rate
        )
        assert torch.equal(retained(features, rate).flatten(), theirs)


@pytest.mark.parametrize(
    ("features", "rate", "name"),
    [(torch.zeros(2, 3), 0.5, "features"), (torch.zeros(2, 3, 4), 1.0, "rate"),
     (torch.zeros(2, 3, 4), -0.1, "rate"), (torch.zeros(2, 3, 4), float("nan"), "rate")],
)  # fmt: skip
def test_bad_pruning(features, rate, name):
    with pytest.raises((ValueError, TypeError), match=name):
        retained(features, rate)
