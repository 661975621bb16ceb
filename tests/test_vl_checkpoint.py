"""Vision-language checkpoints: layout, round trip, what files must say; the command line."""

import json
import shutil

import pytest
import tiny
import torch
import vl
from PIL import Image
from safetensors.torch import save_file
from test_checkpoint import stored_bytes
from tokenizers.processors import TemplateProcessing

from nemokernels.models import (
    CheckpointError,
    ConfigError,
    NemotronVLConfig,
    build,
    checkpoint_spec,
    from_pretrained,
    names,
    read_config,
    save_pretrained,
)
from nemokernels.train import cli, commands

RADIO = "vision_model.radio_model."
GENERATOR = RADIO + "model.patch_generator."
PREFIX, GRID = GENERATOR + "cls_token.token", GENERATOR + "pos_embed"


def vision(**changes):
    return {"vision_config": {**vl.CONFIG["vision_config"], **changes}}


def fields(**changes):
    """As a repository has them: the tensors alone say how many prefix tokens and positions."""
    sizes = {k: v for k, v in vl.CONFIG["vision_config"].items() if "prefix" not in k}
    del sizes["grid_size"]
    data = {**vl.CONFIG, "vision_config": sizes, "unknown_field": [1], **changes}
    return {key: value for key, value in data.items() if value is not None}


def tensors(dtype=torch.bfloat16):
    """Every tensor of the model, and those that are carried along."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    values = {name: draw(*shape).to(dtype) for name, shape in names.tensor_shapes(vl.config())}
    values[RADIO + "input_conditioner.norm_mean"] = draw(3, 1, 1)
    values[RADIO + "input_conditioner.norm_std"] = draw(3, 1, 1).to(dtype)
    values[RADIO + "summary_idxs"] = torch.tensor([0, 2])
    return values


def write(folder, values, data=None, **other):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data or fields()))
    for name, content in other.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    save_file(values, folder / "model.safetensors")
    return folder


def test_names_and_shapes_are_the_published_ones():
    """Of the released sizes, one of each, from the table of tensor names."""
    data = {**vl.CONFIG, "force_image_size": 512, "patch_size": 16, "vit_hidden_size": 1280,
            "projector_hidden_size": 20480,
            "vision_config": {"args": {"model": "vit_huge_patch16_224"}, "grid_size": 128,
                              "num_prefix_tokens": 10}}  # fmt: skip
    data["llm_config"] = {**data["llm_config"], "hidden_size": 5120}
    spec = {n: tuple(t.shape) for n, t in checkpoint_spec(NemotronVLConfig.from_dict(data)).items()}
    blocks = RADIO + "model.blocks.31."
    want = {
        "language_model.backbone.embeddings.weight": (330, 5120),
        "language_model.lm_head.weight": (330, 5120),
        GENERATOR + "embedder.weight": (1280, 768),
        GRID: (1, 16384, 1280),
        PREFIX: (10, 1280),
        **{blocks + f"norm{i}.{leaf}": (1280,) for i in (1, 2) for leaf in ("weight", "bias")},
        blocks + "attn.qkv.weight": (3840, 1280), blocks + "attn.qkv.bias": (3840,),
        blocks + "attn.proj.weight": (1280, 1280), blocks + "attn.proj.bias": (1280,),
        blocks + "mlp.fc1.weight": (5120, 1280), blocks + "mlp.fc1.bias": (5120,),
        blocks + "mlp.fc2.weight": (1280, 5120), blocks + "mlp.fc2.bias": (1280,),
        "mlp1.0.weight": (5120,), "mlp1.1.weight": (20480, 5120), "mlp1.3.weight": (5120, 20480),
    }  # fmt: skip
    assert {name: spec.get(name) for name in want} == want
    assert sum(name.startswith(RADIO) for name in spec) == 3 + 32 * 12


@pytest.mark.parametrize(
    ("dtype", "trunk"), [(None, "backbone."), (torch.float32, "backbone."), (None, "model.")]
)
def test_load_then_save_reproduces_every_byte(tmp_path, dtype, trunk):
    values, published = tensors(), "language_model.backbone."
    stored = {n.replace(published, f"language_model.{trunk}"): v for n, v in values.items()}
    source = write(tmp_path / "a", stored)
    model = from_pretrained(source, dtype=dtype)
    held = model.state_dict()
    for name, value in values.items():
        if "input_conditioner" in name or "summary_idxs" in name:
            assert torch.equal(model.kept[name], value)
        else:
            assert torch.equal(held[name], value.to(held[name].dtype)), name
    vision = model.config.vision_config
    assert (vision.num_prefix_tokens, vision.grid_size) == (5, 16)
    save_pretrained(model, tmp_path / "b", max_shard_bytes=20_000)
    again = from_pretrained(tmp_path / "b")
    assert again.config.extra["unknown_field"] == [1]
    assert again.config.vision_config.extra["version"] == "radio_v2.5-h"
    save_pretrained(again, tmp_path / "c")
    assert stored_bytes(tmp_path / "b") == stored_bytes(tmp_path / "c") == stored_bytes(source)
    ids = torch.tensor([[20, *[vl.IMAGE] * 4, 21]])
    seen = {"image_features": model.image_features(vl.pixels(1, 3, 32, 32))}
    with torch.no_grad():
        assert model(ids, **seen).isfinite().all()


def test_constants_may_come_from_the_preprocessors_file(tmp_path):
    silent = fields(norm_mean=None, norm_std=None)
    constants = {"image_mean": [0.1, 0.2, 0.3], "norm_std": [1, 2, 3]}
    folder = write(tmp_path / "a", tensors(), silent, preprocessor_config=constants)
    model = from_pretrained(folder)
    assert model.config.norm_mean == (0.1, 0.2, 0.3) and model.config.norm_std == (1, 2, 3)
    save_pretrained(model, tmp_path / "b")  # which writes no such file
    assert from_pretrained(tmp_path / "b").config.norm_mean == (0.1, 0.2, 0.3)
    folder = write(tmp_path / "c", tensors(), silent)
    assert from_pretrained(folder).config.norm_mean is None
    both = write(tmp_path / "d", tensors(), preprocessor_config={"norm_mean": [0.48, 0.46, 0.41]})
    assert from_pretrained(both).config.norm_mean == (0.48, 0.46, 0.41)
    unlike = write(tmp_path / "e", tensors(), preprocessor_config={"norm_mean": [0.5, 0.5, 0.5]})
    with pytest.raises(CheckpointError, match=r"`norm_mean` is .* in preprocessor_config.json"):
        from_pretrained(unlike)


def without(name):
    return lambda values: values.pop(name)


def changed(name, *shape, dtype=torch.bfloat16):
    return lambda values: values.update({name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(PREFIX), "cls_token.token: missing"),
        (without(GRID), "pos_embed: missing"),
        (changed(GRID, 1, 200, 24), "200 positions are not a square grid"),
        (changed(GRID, 24), r"pos_embed: has shape \(24,\)"),
        (changed(PREFIX, 5, 25), r"cls_token.token: .* stores shape \(5, 25\)"),
        (without("mlp1.1.weight"), "mlp1.1.weight: missing"),
        (changed("mlp1.1.bias", 40), "mlp1.1.bias: unexpected"),
        (changed(RADIO + "model.norm.weight", 24), "model.norm.weight: unexpected"),
        (changed(RADIO + "model.blocks.0.ls1.gamma", 24), "ls1.gamma: unexpected"),
        (changed(RADIO + "summary_idxs2", 2), "summary_idxs2: unexpected"),
        (changed(RADIO + "model.blocks.2.norm1.weight", 24), "blocks.2.norm1.weight: unexpected"),
        (changed("sound_encoder.x", 2), "sound_encoder.x: unexpected"),
        (changed("backbone.norm_f.weight", 48), "backbone.norm_f.weight: unexpected"),
        (changed(GENERATOR + "embedder.weight", 24, 192, dtype=torch.float16), "expected torch.bf"),
    ],
)
def test_bad_tensors(tmp_path, change, message):
    values = tensors()
    change(values)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(write(tmp_path / "a", values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llm_config": None}, "`llm_config` is missing"),
        ({"llm_config": 3}, "`llm_config`: config must be a JSON object"),
        ({"llm_config": {"vocab_size": 3, "hidden_size": 8}}, "`llm_config`: "),
        ({"vision_config": None}, "`vision_config` is missing"),
        ({"vision_config": []}, "`vision_config` must be a JSON object"),
        ({"vision_config": {"args": {"model": "vit_giant"}}}, "args.model` is 'vit_giant'"),
        ({"vision_config": {"args": 3}}, "`vision_config.args` must be"),
        ({"vision_config": {"hidden_size": 24}}, "`vision_config.num_hidden_layers` is missing"),
        (vision(num_attention_heads=5), "not a multiple of `num_attention_heads` 5"),
        (vision(patch_size=16), "`patch_size` is 8 but"),
        (vision(grid_size=17), "grid_size` is 17, but .*pos_embed has the shape of 16"),
        (vision(num_prefix_tokens=1), "num_prefix_tokens` is 1, but .*token has the shape of 5"),
        (vision(args={"min_num_patches": 1}), "images of any resolution"),
        (vision(video_temporal_patch_size=2), "`video_temporal_patch_size` is 2"),
        ({"vit_hidden_size": 25}, "`vit_hidden_size` is 25"),
        ({"projector_hidden_size": None}, "`projector_hidden_size` is missing"),
        ({"projector_hidden_size": "many"}, "`projector_hidden_size` must be of type int"),
        ({"downsample_ratio": 0.25}, "`downsample_ratio` is 0.25"),
        ({"ps_version": "v1"}, "`ps_version` is 'v1'"),
        ({"force_image_size": 40}, "`force_image_size` is 40, not a multiple of 2 patches"),
        ({"norm_mean": [1, 2]}, "`norm_mean` must be three numbers"),
        ({"norm_mean": [1, 2, float("nan")]}, "`norm_mean` must be three numbers"),
        ({"norm_std": [1, 0, 1]}, "`norm_std` must be positive"),
        ({"norm_std": None}, "must be given together"),
        ({"img_context_token_id": 330}, "`img_context_token_id` must be a token below 330"),
        ({"img_context_token_id": True}, "`img_context_token_id` must be a token below 330"),
        ({"img_context_token": ""}, "must differ and not be empty"),
        ({"video_context_token": "<image>"}, "must differ and not be empty"),
        ({"video_pruning_rate": 1}, "`video_pruning_rate` must be in"),
        ({"use_thumbnail": 3}, "`use_thumbnail` must be of type bool"),
        ({"sound_config": {}}, "`sound_config`: not supported: sound encoder"),
        ({"llm_config": {**vl.CONFIG["llm_config"], "num_nextn_predict_layers": 1,
                         "mtp_hybrid_override_pattern": "*"}}, "multi-token prediction"),
    ],
)  # fmt: skip
def test_bad_configurations(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        from_pretrained(write(tmp_path / "a", tensors(), fields(**changes)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["NemotronH_Nano_Omni_Reasoning_V3", "nemotron_h_omni"])
@pytest.mark.parametrize("name", ["sound_config", "audio_config"])
def test_a_model_that_hears_is_refused(tmp_path, model_type, name):
    data = fields(model_type=model_type, **{name: {"hidden_size": 1024}})
    with pytest.raises(CheckpointError, match=f"`{name}`: not supported: sound encoder"):
        from_pretrained(write(tmp_path / "a", tensors(), data))


def test_a_configuration_that_hears_is_refused():
    with pytest.raises(ConfigError, match="`sound_config`: not supported: sound encoder"):
        vl.config(sound_config={"hidden_size": 1024})


def test_what_only_a_checkpoint_knows_is_asked_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields()))
    config = read_config(tmp_path / "config.json")
    for use in (checkpoint_spec, build):
        with pytest.raises(ConfigError, match="`vision_config.num_prefix_tokens` is not known"):
            use(config)


def test_sizes_may_stand_beside_the_encoders():
    """C-RADIO's own file leaves the patch to the wrapper."""
    sizes = {**vl.CONFIG["vision_config"], "patch_size": None, "num_prefix_tokens": None}
    config = vl.config(vision_config=sizes, num_prefix_tokens=7)
    assert (config.vision_config.patch_size, config.vision_config.num_prefix_tokens) == (8, 7)
    data = config.to_dict()
    assert data["patch_size"] == data["vision_config"]["patch_size"] == 8


def test_configuration_survives_its_file():
    config = vl.config(use_thumbnail=False, video_pruning_rate=0.75, unknown=[1, {"a": None}])
    again = NemotronVLConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict() and again.extra["unknown"] == [1, {"a": None}]
    assert again.vision_config == config.vision_config


def test_quantised_layers_of_every_part(tmp_path):
    """FP8 layers are named as they are stored; the encoder and the projector have them too."""
    values, layers = tensors(), {}
    for module in ("language_model.backbone.layers.0.mixer.in_proj", "language_model.lm_head",
                   RADIO + "model.blocks.0.attn.qkv", "mlp1.3"):  # fmt: skip
        codes = values[f"{module}.weight"].to(torch.float8_e4m3fn)
        values |= {f"{module}.weight": codes, f"{module}.weight_scale": torch.tensor(0.5)}
        layers[module] = {"quant_algo": "FP8"}
    scheme = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    model = from_pretrained(write(tmp_path / "a", values, hf_quant_config=scheme))
    assert model.quantization.layers == dict.fromkeys(layers, "FP8")
    for module in layers:
        want = (values[f"{module}.weight"].float() * 0.5).bfloat16()
        assert torch.equal(model.get_submodule(module).weight, want)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vl")
    save_pretrained(vl.model(dtype=torch.float32), path / "model")
    tiny.tokenizer().save(str(path / "model" / "tokenizer.json"))
    picture = Image.new("RGB", (90, 30), (200, 30, 30))
    for x in range(0, 90, 7):
        picture.putpixel((x, x // 4), (0, 255, x))
    picture.save(path / "a.png")
    frames = [Image.new("RGB", (20, 30), (i * 40, 0, 90)) for i in range(4)]
    frames[0].save(path / "b.gif", save_all=True, append_images=frames[1:], duration=500)
    (path / "frames").mkdir()
    for index, frame in enumerate(frames):
        frame.save(path / "frames" / f"{index}.png")
    return path


def run(capsys, *args):
    code = cli.main([str(a) for a in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_about_pictures_and_videos(capsys, folder):
    ask = ["generate", folder / "model", "--max-new-tokens", 4, "--json", "--prompt"]
    answers = {}
    for name, seen in {
        "blind": [],
        "picture": ["--image", folder / "a.png"],
        "two": ["--image", folder / "a.png", folder / "frames/0.png"],
        "gif": ["--video", folder / "b.gif"],
        "folder": ["--video", folder / "frames", "--video-fps", 2],
        "pruned": ["--video", folder / "b.gif", "--video-pruning-rate", 0.5],
    }.items():
        code, out, err = run(capsys, *ask, "what is the quick brown fox?", *seen)
        assert code == 0, err
        answers[name] = json.loads(out)
        assert len(answers[name]["tokens"][0]) == 4
    assert answers["gif"]["tokens"] == answers["folder"]["tokens"]
    code, out, err = run(capsys, *ask, "fox <image> dog", "--image", folder / "a.png")
    assert code == 0, err


def test_pieces_of_text_get_no_tokens_of_their_own(folder):
    """A tokenizer that puts <s> before every text would put one after every picture."""
    tokenizer = tiny.tokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    made = commands.look(
        vl.model(dtype=torch.float32), tokenizer, ("fox <image> dog",), (folder / "a.png",), (),
        None, video_fps=None, video_pruning_rate=None,
    )  # fmt: skip
    assert tokenizer.encode("fox").ids[0] == 1 and 1 not in made.tokens


@pytest.mark.parametrize("where", ["top", "llm"])
def test_generation_ends_where_the_configuration_says(capsys, folder, tmp_path, where):
    ask = ["--max-new-tokens", 3, "--json", "--prompt", "fox", "--image", folder / "a.png"]
    first = json.loads(run(capsys, "generate", folder / "model", *ask)[1])["tokens"][0][0]
    data = json.loads((folder / "model/config.json").read_text())
    (data if where == "top" else data["llm_config"])["eos_token_id"] = first
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(data))
    ended = json.loads(run(capsys, "generate", tmp_path / "model", *ask)[1])
    assert ended["tokens"] == [[first]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["x", "--image", "{f}/absent.png"], "absent.png: cannot be read"),
        (["x", "y", "--image", "{f}/a.png"], "take one prompt, got 2"),
        (["<image>", "--video", "{f}/b.gif"], "has 1 <image> for 0"),
        (["<image> what?"], "has 1 <image> for 0"),
        (["<video> what?", "--image", "{f}/a.png"], "has 0 <image> for 1"),
        (["x", "--image", "{f}/a.png", "--video-fps", "3"], "--video-fps is about a --video"),
        (["x", "--video-pruning-rate", "0.5"], "--video-pruning-rate is about a --video"),
        (["x", "--video", "{f}/b.gif", "--video-fps", "0"], "`fps` must be positive"),
        (["x", "--video", "{f}/b.gif", "--video-pruning-rate", "1"], "`rate` must be in"),
        (["x", "--image", "{f}/model/config.json"], "config.json: not a usable picture"),
    ],
)
def test_mistakes_are_one_line(capsys, folder, args, message):
    args = [a.format(f=folder) for a in args]
    code, _, err = run(capsys, "generate", folder / "model", "--prompt", *args)
    assert code == 2 and err.count("\n") == 1 and message in err


def test_models_counts_what_only_the_tensors_say(capsys, tmp_path):
    folder, values = write(tmp_path / "a", tensors()), tensors()
    count = sum(v.numel() for n, v in values.items() if "conditioner" not in n and "idxs" not in n)
    code, out, _ = run(capsys, "models", folder)
    assert code == 0 and f"{count:,}" in out and "NemotronH_Nano_VL_V2" in out
    assert run(capsys, "models", folder, "--memory")[0] == 0
    code, _, err = run(capsys, "models", folder / "config.json")
    assert code == 2 and "`vision_config.num_prefix_tokens` is not known" in err


def test_the_image_token_comes_from_the_tokenizer_or_the_user(capsys, folder, tmp_path):
    model = vl.model(dtype=torch.float32, img_context_token_id=None)
    save_pretrained(model, tmp_path / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    ask = ["generate", tmp_path / "model", "--max-new-tokens", 2, "--prompt", "x", "--image",
           folder / "a.png"]  # fmt: skip
    code, _, err = run(capsys, *ask)
    assert code == 2 and "give --image-token-id" in err
    assert run(capsys, *ask, "--image-token-id", vl.IMAGE)[0] == 0
    assert "expected a token below 330" in run(capsys, *ask, "--image-token-id", 330)[2]
    known = json.loads(tokenizer.to_str())
    known["added_tokens"].append({**known["added_tokens"][0], "id": 320, "content": "<image>"})
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(known))
    assert run(capsys, *ask)[0] == 0


def test_a_text_model_takes_no_pictures(capsys, folder, tmp_path):
    save_pretrained(tiny.model(dtype=torch.float32), tmp_path / "model")
    tiny.tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    code, _, err = run(capsys, "generate", tmp_path / "model", "--prompt", "x", "--image",
                       folder / "a.png")  # fmt: skip
    assert code == 2 and "need a model that sees, this is a NemotronH" in err
