"""The vision-language model as a whole: parity, caches, prompts, training, sizes."""

import dataclasses
import math

import hybrids
import pytest
import tiny
import torch
import vl
from PIL import Image
from transformers.models.nemotron_h_omni.configuration_nemotron_h_omni import (
    NemotronH_Omni_Reasoning_V3_Config,
)
from transformers.models.nemotron_h_omni.modeling_nemotron_h_omni import NemotronH_Omni_Reasoning_V3

from nemokernels.models import (
    Clip,
    build,
    find_variant,
    from_pretrained,
    generate,
    save_pretrained,
    vision_prompt,
)
from nemokernels.models.images import frame_pixels, tile_pixels
from nemokernels.models.memory import memory, precision_of
from nemokernels.models.nemotron_vl import retained
from nemokernels.models.vision import flatten_patches
from nemokernels.train.objective import Objective
from nemokernels.train.trainer import Trainer

N = vl.TOKENS


@pytest.fixture(scope="module")
def model():
    return vl.model(dtype=torch.float32)


@pytest.fixture(scope="module")
def wide():
    return vl.model(dtype=torch.float64)


def features(model, tiles):
    with torch.no_grad():
        return model.image_features(vl.pixels(tiles, 3, 32, 32))


def test_parity_with_transformers(model, tmp_path):
    """Its Omni class without a sound encoder, through the checkpoint we write."""
    save_pretrained(model, tmp_path)
    v = vl.CONFIG["vision_config"]
    NemotronH_Omni_Reasoning_V3_Config(
        text_config=model.config.llm_config.to_dict(),
        vision_config={
            "model_type": "radio", "hidden_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 3, "mlp_ratio": v["intermediate_size"] / 24, "patch_size": 8,
            "max_img_size": 128, "num_cls_tokens": 2, "num_registers": 3,
            "video_temporal_patch_size": 2,
        },
        projector_hidden_size=40, vision_hidden_size=24, image_token_id=vl.IMAGE,
        dtype="float32",
    ).save_pretrained(tmp_path)  # fmt: skip
    peer = NemotronH_Omni_Reasoning_V3.from_pretrained(tmp_path).eval()
    for module in peer.modules():  # see test_parity
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)
    pixels, ids = vl.pixels(3, 3, 32, 32), vl.tokens(1, 2)
    images = {
        "pixel_values": flatten_patches(pixels, 8).flatten(0, 1),
        "image_grid_hw": torch.tensor([[4, 4]] * 3),
    }
    with torch.no_grad():
        theirs = peer(ids, **images).logits
        ours = model(ids, image_features=model.image_features(pixels))
        assert hybrids.difference(ours, theirs) <= 1e-4
        assert hybrids.difference(model(ids), theirs) > 1e-2  # the images matter
        state = model.new_state(1, 40)
        cached = [model(ids, image_features=model.image_features(pixels), state=state)]
        out = peer(ids, **images, use_cache=True)
        for step in vl.text(4)[None].split(1, 1):
            out = peer(step, past_key_values=out.past_key_values, use_cache=True)
            cached.append(model(step, state=state, decode=True))
            state.accept()
            assert hybrids.difference(cached[-1], out.logits) <= 1e-4


def test_images_replace_embeddings_in_order(model):
    ids, seen = vl.tokens(1, 2), features(model, 3)
    embedded = model.language_model.backbone.embeddings(ids).clone()
    places = iter(seen.flatten(0, 1))
    for index, token in enumerate(ids[0].tolist()):
        if token == vl.IMAGE:
            embedded[0, index] = next(places)
    want = model.language_model.hidden(ids, embedded=embedded)
    assert torch.equal(model.hidden(ids, image_features=seen), want)
    assert torch.equal(model.hidden(ids, image_features=seen.flatten(0, 1)), want)


def test_text_alone_is_the_language_models(model):
    ids = vl.tokens()
    assert torch.equal(model(ids), model.language_model(ids))
    assert torch.equal(model(ids, image_features=features(model, 0)), model(ids))
    assert torch.equal(model(vl.tokens(1)), model.language_model(vl.tokens(1)))  # a token as any


def test_rows_take_their_images_in_turn(wide):
    rows = torch.cat([vl.tokens(2), vl.tokens(2, seed=9)])
    seen = features(wide, 4)
    both = wide(rows, image_features=seen)
    for row in range(2):
        alone = wide(rows[row : row + 1], image_features=seen[2 * row : 2 * row + 2])
        torch.testing.assert_close(both[row], alone[0], rtol=0, atol=1e-9)


def test_packed_and_continued_sequences(wide):
    first, second, seen = vl.tokens(1), vl.tokens(2, seed=5), features(wide, 3)
    packed, bounds = torch.cat([first, second], 1), [0, first.shape[1]]
    cu_seqlens = torch.tensor([*bounds, packed.shape[1]], dtype=torch.int32)
    together = wide(packed, image_features=seen, cu_seqlens=cu_seqlens)
    alone = [wide(first, image_features=seen[:1]), wide(second, image_features=seen[1:])]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=0, atol=1e-9)
    # A clip cut in the middle of its tokens: the second call has the rest of the vectors.
    state, cut, vectors = wide.new_state(1, 40), 6, seen[1:].flatten(0, 1)
    before = int((second[:, :cut] == vl.IMAGE).sum())
    assert 0 < before < len(vectors)
    parts = [
        wide(second[:, :cut], image_features=vectors[:before], state=state),
        wide(second[:, cut:], image_features=vectors[before:], state=state),
    ]
    torch.testing.assert_close(torch.cat(parts, 1), alone[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("exact", [False, True])
def test_generate(model, exact):
    prompts, seen = [vl.tokens(1)[0].tolist(), vl.tokens(2, seed=5)[0].tolist()], features(model, 3)
    options = {"max_new_tokens": 6, "exact": exact}
    result = generate(model, prompts, image_features=seen.flatten(0, 1), **options)
    for row, part in ((0, seen[:1]), (1, seen[1:])):
        ids = torch.tensor([prompts[row] + result.tokens[row]])
        with torch.no_grad():
            want = model(ids, image_features=part)[0, len(prompts[row]) - 1 : -1]
        assert result.tokens[row] == want.argmax(-1).tolist()
    blind = generate(model, [vl.tokens()[0].tolist()], max_new_tokens=3)
    assert len(blind.tokens[0]) == 3


@pytest.mark.parametrize("count", [1, 3])
def test_counts_must_agree(model, count):
    ids, seen = vl.tokens(2), features(model, count)
    with pytest.raises(ValueError, match=f"`image_features` are {count * N} vectors for {2 * N}"):
        model(ids, image_features=seen)
    with pytest.raises(ValueError, match=f"hold {2 * N} image tokens"):
        generate(model, [ids[0].tolist()], max_new_tokens=2, image_features=seen.flatten(0, 1))
    with pytest.raises(ValueError, match="hold 4 image tokens, `image_features` 0 vectors"):
        generate(model, [vl.tokens(1)[0].tolist()], max_new_tokens=2)


def test_the_image_token_is_never_assumed():
    model = vl.model(dtype=torch.float32, img_context_token_id=None)
    seen = features(model, 1)
    picture = Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match="`image_token_id` is not known"):
        model(vl.tokens(1), image_features=seen)
    with pytest.raises(ValueError, match="no image token"):
        generate(model, [[7]], max_new_tokens=2, image_features=seen.flatten(0, 1))
    with pytest.raises(ValueError, match="`model.image_token_id` is not known"):
        vision_prompt(model, encode, "what?", images=[picture])
    model.image_token_id = vl.IMAGE
    assert model(vl.tokens(1), image_features=seen).shape == (1, 9, 330)
    assert vision_prompt(model, encode, "what?", images=[picture]).tokens.count(vl.IMAGE) == N


def test_a_text_model_sees_nothing():
    blind = tiny.model(dtype=torch.float32)
    with pytest.raises(ValueError, match="no image token"):
        generate(blind, [[7]], max_new_tokens=2, image_features=torch.zeros(1, 48))


def encode(piece):
    """One token per character, from 100 on, so that prompts can be read back."""
    return [100 + ord(c) for c in piece]


def decode(ids):
    return "".join("#" if token == vl.IMAGE else chr(token - 100) for token in ids)


def shade(value, size=(32, 32)):
    return Image.new("RGB", size, (value, value, 255 - value))


def test_prompt_of_pictures_by_hand(model):
    wide = shade(9, (64, 32))  # two tiles and a thumbnail
    for prompt in ("A<image>B<image>", "<image><image>A"):
        made = vision_prompt(model, encode, prompt, images=[shade(80), wide])
        want = prompt.replace("<image>", "<img>####</img>", 1)
        want = want.replace("<image>", "<img>############</img>")
        assert decode(made.tokens) == want
        pixels = [tile_pixels(model.config, image) for image in (shade(80), wide)]
        want = [model.image_features(p).flatten(0, 1) for p in pixels]
        assert torch.equal(made.image_features, torch.cat(want))
    made = vision_prompt(model, encode, "A", images=[shade(80)], videos=[Clip([shade(1)])])
    assert decode(made.tokens) == "<img>####</img>Frame 1: <img>####</img>A"
    assert decode(vision_prompt(model, encode, "A", images=[wide], max_tiles=1).tokens) == (
        "<img>####</img>A"
    )
    assert vision_prompt(model, encode, "A") == (encode("A"), None)


def test_prompt_of_a_clip_by_hand(model):
    clip = Clip([shade(5), shade(5), shade(250), shade(250)], [0.0, 0.5, 1.0, 1.505])
    made = vision_prompt(model, encode, "see <video>!", videos=[clip])
    one = "sampled at {} seconds: <img>####</img>"
    times = ("0.00", "0.50", "1.00", "1.50")
    lines = [f"Frame {i + 1} {one.format(time)}" for i, time in enumerate(times)]
    assert decode(made.tokens) == "see " + "\n".join(lines) + "!"
    # Half of the tokens: the first frame's, and the four that changed.
    made = vision_prompt(model, encode, "<video>", videos=[clip], pruning_rate=0.5)
    counts = [line.count("#") for line in decode(made.tokens).split("\n")]
    assert counts == [4, 0, 4, 0]
    seen = model.image_features(frame_pixels(model.config, clip.frames))
    assert torch.equal(made.image_features, seen[retained(seen, 0.5)])
    pruning = dataclasses.replace(model.config, video_pruning_rate=0.5)
    model.config, kept = pruning, model.config
    try:
        assert vision_prompt(model, encode, "<video>", videos=[clip]).tokens == made.tokens
        whole = vision_prompt(model, encode, "<video>", videos=[clip], pruning_rate=0.0)
        assert whole.tokens.count(vl.IMAGE) == 4 * N
    finally:
        model.config = kept


def test_prompt_of_everything_in_turn(model):
    made = vision_prompt(
        model, encode, "<video>x<image>y<video>",
        images=[shade(3)], videos=[Clip([shade(1)]), Clip([shade(2)])],
    )  # fmt: skip
    unit = "<img>####</img>"
    assert decode(made.tokens) == f"Frame 1: {unit}x{unit}yFrame 1: {unit}"
    clips = [frame_pixels(model.config, [shade(value)]) for value in (1, 2)]
    parts = [clips[0], tile_pixels(model.config, shade(3)), clips[1]]
    want = torch.cat([model.image_features(p) for p in parts]).flatten(0, 1)
    assert torch.equal(made.image_features, want)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("<image>", {}, "has 1 <image> for 0"),
        ("<image>", {"images": [shade(1)] * 2}, "has 1 <image> for 2"),
        ("<image>", {"images": [shade(1)], "videos": [Clip([shade(1)])]}, "has 0 <video> for 1"),
        ("<video>", {"images": [shade(1)]}, "has 0 <image> for 1"),
        ("x", {"images": [shade(1)], "max_tiles": 13}, "max_tiles"),
        ("x", {"videos": [Clip([])]}, "frames"),
        ("x", {"videos": [Clip([shade(1)])], "pruning_rate": 1.0}, "rate"),
        ("x", {"images": [Image.new("RGBA", (4, 4))]}, "RGB"),
    ],
)
def test_bad_prompts(model, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        vision_prompt(model, encode, prompt, **options)


def test_training_halves_the_loss_on_pictures_and_text(tmp_path):
    model = vl.model(dtype=torch.float32)
    model.kept = {"vision_model.radio_model.summary_idxs": torch.tensor([0, 2])}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = tiny.settings(steps=50, windows=1, lr=1e-2, min_lr=1e-3, warmup=2, decay=10)
    trainer = Trainer(model, vl.Captions(), settings, tmp_path)
    reports = []
    trainer.run(save_every=50, on_step=reports.append)
    assert reports[-1].losses[0] < reports[0].losses[0] / 2
    same = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert not same
    trainer.export(tmp_path / "model")
    again = from_pretrained(tmp_path / "model")
    assert again.kept["vision_model.radio_model.summary_idxs"].tolist() == [0, 2]
    assert torch.equal(again.mlp1[3].weight, model.mlp1[3].weight)


def test_loss_is_that_of_words_alone():
    """Image tokens are no labels, and their count is left out of the mean."""
    model, batch = vl.model(dtype=torch.float64), vl.Captions().at(0, 0, 1)
    objective = Objective(model, mtp_depths=0, mtp_weight=0.0)
    total = objective.label_counts(batch)
    seen = model.image_features(batch.pixels)
    logits = model(batch.tokens, cu_seqlens=batch.cu_seqlens, image_features=seen)[0]
    labels = batch.tokens[0, 1:].tolist()
    first = batch.cu_seqlens[1:].tolist()  # the beginning of a sequence is not predicted
    losses = [
        -logits[i].log_softmax(-1)[label]
        for i, label in enumerate(labels)
        if label != vl.IMAGE and i + 1 not in first
    ]
    assert total.item() == len(losses) == 6
    loss, _ = objective(batch, total)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-9, atol=0)


def test_vectors_of_another_width_are_refused(model):
    """As many numbers as there should be, in the wrong shape."""
    with pytest.raises(ValueError, match="`image_features`"):
        model(vl.tokens(2), image_features=torch.zeros(2 * N, 96))


def test_initial_values_are_finite_everywhere():
    fresh = build(vl.config(), dtype=torch.float32)
    assert all(value.isfinite().all() for value in fresh.state_dict().values())
    assert (fresh.mlp1[0].weight == 1).all() and 0.01 < fresh.mlp1[1].weight.std() < 0.03
    assert fresh(vl.tokens(1), image_features=features(fresh, 1)).isfinite().all()


def test_state_options_reach_the_language_model(model):
    state = model.new_state(2, 9, draft_tokens=3, dtype=torch.bfloat16)
    assert (state.slots, state.max_length, state.draft_tokens) == (2, 9, 3)
    assert next(iter(state.keys.values())).dtype == torch.bfloat16


def test_fsdp_units_are_every_layer_once(model):
    units = model.fsdp_units()
    assert len(units) == 3 + 2 == len({id(unit) for unit in units})


def test_released_model_on_meta():
    """13B: the language model exactly, the encoder and the projector by their published sizes."""
    name, llm = "NVIDIA-Nemotron-Nano-12B-v2-VL-BF16", find_variant("Nemotron-Nano-12B-v2")
    with pytest.raises(ValueError, match="needs num_prefix_tokens, which are not public"):
        build(name, device="meta")
    model = build(name, device="meta", dtype=torch.bfloat16, num_prefix_tokens=10)
    assert model.config.llm_config == llm.config
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(model.language_model) == llm.parameters == 12_310_001_152
    assert count(model.mlp1) == 5120 + 2 * 5120 * 20480
    block = 4 * 1280 * 1280 + 4 * 1280 + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280
    want = 32 * block + 1280 * 768 + 128 * 128 * 1280 + 10 * 1280
    assert count(model.vision_model) == want
    assert round(count(model) / 1e9) == 13
    need, llm = (
        memory(config, precision_of(None, "fp8"), context=100, batch=2)
        for config in (model.config, llm.config)
    )
    assert need[1:] == llm[1:] and need.weights["FP8"] == llm.weights["FP8"]
    seeing = count(model.vision_model) + count(model.mlp1)
    assert need.weights["BF16"] == llm.weights["BF16"] + 2 * seeing
    with torch.device("meta"):
        assert model.image_features(torch.empty(13, 3, 512, 512)).shape == (13, 256, 5120)
