"""BLOOM and MT-NLG: an independent formula, positions, names, configurations and bad input."""

import math

import families
import hybrids
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import stored_bytes

from nemokernels.models import (
    CheckpointError,
    ConfigError,
    build,
    from_pretrained,
    generate,
    names,
    save_pretrained,
)
from nemokernels.models.gpt import alibi_slopes

BOTH = ["bloom", "mt-nlg"]


def slope(heads, head):
    """As the ALiBi paper's code has it: of a power of two directly, of others in two parts."""
    if math.log2(heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return start * start**head
    below = 2 ** math.floor(math.log2(heads))
    return slope(below, head) if head < below else slope(2 * below, 2 * (head - below))


def test_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    for heads in (1, 2, 3, 6, 12, 16, 32, 112, 127):
        want = torch.tensor([slope(heads, head) for head in range(heads)], dtype=torch.float64)
        got = alibi_slopes(heads)
        assert got.dtype == torch.float32 and got.shape == (heads,)
        torch.testing.assert_close(got.double(), want, rtol=2.0**-23, atol=0)


def plain(config, weights, tokens, tanh):
    """Logits (T, V) of one sequence, written from the published description of the nets."""
    w = {name.removeprefix("transformer."): t.double() for name, t in weights.items()}
    T, heads, size = len(tokens), config.n_head, config.hidden_size // config.n_head

    def norm(name, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        y = (x - mean) / (var + config.layer_norm_epsilon).sqrt()
        return y * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def attention(name, x):
        fused = linear(f"{name}.query_key_value", x)
        out = []
        for head in range(heads):
            q, k, v = (
                fused[:, (3 * head + part) * size : (3 * head + part + 1) * size]
                for part in range(3)
            )
            scores = q @ k.T / math.sqrt(size)
            for i in range(T):
                for j in range(T):
                    fall = slope(heads, head) * (i - j) if config.model_type == "bloom" else 0.0
                    scores[i, j] = scores[i, j] - fall if j <= i else -math.inf
            out.append(scores.softmax(-1) @ v)
        return linear(f"{name}.dense", torch.cat(out, -1))

    def gelu(x):
        if tanh:
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    x = w["word_embeddings.weight"][tokens]
    if config.model_type == "bloom":
        x = norm("word_embeddings_layernorm", x)
    else:
        x = x + w["position_embeddings.weight"][:T]
    for index in range(config.n_layer):
        x = x + attention(f"h.{index}.self_attention", norm(f"h.{index}.input_layernorm", x))
        inner = gelu(linear(f"h.{index}.mlp.dense_h_to_4h",
                            norm(f"h.{index}.post_attention_layernorm", x)))  # fmt: skip
        x = x + linear(f"h.{index}.mlp.dense_4h_to_h", inner)
    return norm("ln_f", x) @ w["word_embeddings.weight"].T


@pytest.mark.parametrize(
    ("family", "changes", "tanh"),
    [("bloom", {}, True), ("mt-nlg", {}, False), ("bloom", dict(n_head=8), True),
     ("mt-nlg", dict(hidden_act="gelu_pytorch_tanh"), True)],
)  # fmt: skip
def test_forward_is_the_plain_formula(family, changes, tanh):
    model = families.model(family, dtype=torch.float64, **changes)
    tokens = hybrids.tokens(2, 25)
    with torch.no_grad():
        ours = model(tokens)
        theirs = [plain(model.config, model.state_dict(), row, tanh) for row in tokens]
    assert (ours - torch.stack(theirs)).abs().max() <= 1e-12 * ours.abs().max()


@pytest.mark.parametrize("family", BOTH)
def test_initial_values(family):
    torch.manual_seed(0)
    model = build(families.config(family, initializer_range=0.05), dtype=torch.float32)
    for name, value in model.state_dict().items():
        if name.endswith("bias"):
            assert bool((value == 0).all()), name
        elif "norm" in name or "ln_f" in name:
            assert bool((value == 1).all()), name
        else:
            out = name.endswith(("dense.weight", "4h_to_h.weight"))
            std = 0.05 / math.sqrt(6) if out else 0.05
            assert value.std().item() == pytest.approx(std, rel=0.1), name
    assert not list(model.buffers())
    assert len(model.fsdp_units()) == 3


def test_positions_end_where_the_learned_ones_do():
    model = families.model("mt-nlg")
    assert model(hybrids.tokens(1, 64)).shape == (1, 64, 96)
    with pytest.raises(ValueError, match="`tokens` has sequences of 65 tokens, but 64 positions"):
        model(hybrids.tokens(1, 65))
    bounds = torch.tensor([0, 3, 70], dtype=torch.int32)
    with pytest.raises(ValueError, match="`cu_seqlens` has sequences of 67 tokens, but 64 posit"):
        model(hybrids.tokens(1, 70), cu_seqlens=bounds)
    bounds = torch.tensor([0, 6, 70], dtype=torch.int32)
    assert model(hybrids.tokens(1, 70), cu_seqlens=bounds).shape == (1, 70, 96)
    with pytest.raises(ValueError, match="`max_length` has sequences of 66 tokens, but 64"):
        generate(model, [[1] * 60], max_new_tokens=6)
    assert len(generate(model, [[1] * 60], max_new_tokens=4).tokens[0]) == 4
    none = torch.zeros(1, dtype=torch.int32)
    assert model(hybrids.tokens(1, 0), cu_seqlens=none).shape == (1, 0, 96)
    assert families.model("bloom")(hybrids.tokens(1, 65)).isfinite().all()


def rewritten(folder, rename, target):
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    values = load_file(folder / "model.safetensors")
    save_file({rename(n): v for n, v in values.items()}, target / "model.safetensors")
    return target


def bare(name):
    return name.removeprefix("transformer.")


def test_names_without_their_prefix_stay_without(tmp_path):
    model = families.model("bloom", dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "full")
    raw = rewritten(tmp_path / "full", bare, tmp_path / "raw")
    loaded = from_pretrained(raw)
    assert all(torch.equal(v, loaded.state_dict()[n]) for n, v in model.state_dict().items())
    save_pretrained(loaded, tmp_path / "again")
    assert stored_bytes(tmp_path / "again") == stored_bytes(raw)
    assert "h.0.mlp.dense_h_to_4h.bias" in stored_bytes(raw)
    save_pretrained(from_pretrained(tmp_path / "full"), tmp_path / "same")
    assert stored_bytes(tmp_path / "same") == stored_bytes(tmp_path / "full")


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda n: bare(n) if "ln_f" in n else n, "\n  ln_f.weight: unexpected"),
        (lambda n: n if "ln_f" in n else bare(n), "\n  transformer.ln_f.weight: unexpected"),
        (lambda n: n.replace("h.1.mlp", "h.1.mpl"), "h.1.mpl.dense_4h_to_h.bias: unexpected"),
        (lambda n: bare(n).replace("h.1.mlp", "h.9.mlp"), "h.9.mlp.dense_4h_to_h.bias: unexpec"),
        (lambda n: n.replace("word_embeddings.", "wte."), "word_embeddings.weight: missing"),
    ],
)
def test_a_name_that_does_not_fit_is_told(rename, message, tmp_path):
    save_pretrained(families.model("bloom"), tmp_path / "full")
    with pytest.raises(CheckpointError) as error:
        from_pretrained(rewritten(tmp_path / "full", rename, tmp_path / "raw"))
    assert message.strip() in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(n_layer=4), "h.3.input_layernorm.weight: missing"),
        (dict(n_layer=2), "h.2.input_layernorm.weight: unexpected"),
        (dict(hidden_size=96), r"stores shape \(96, 48\), expected \(96, 96\)"),
        (dict(vocab_size=97), r"word_embeddings.weight: .* \(96, 48\), expected \(97, 48\)"),
        (dict(n_head=7), "`hidden_size` is 48, not a multiple of `n_head` 7"),
        (dict(model_type="mt-nlg"), "`max_position_embeddings` is missing"),
        (dict(model_type="mt-nlg", max_position_embeddings=8), "position_embeddings.weight: miss"),
    ],
)
def test_a_configuration_that_disagrees_with_its_tensors(change, message, tmp_path):
    families.save_with_other_fields("bloom", tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("bloom", dict(vocab_size=...), "`vocab_size` is missing"),
        ("bloom", dict(n_layer=None), "`n_layer` is missing"),
        ("bloom", dict(layer_norm_epsilon=...), "`layer_norm_epsilon` is missing"),
        ("bloom", dict(n_head=5), "`hidden_size` is 48, not a multiple of `n_head` 5"),
        ("bloom", dict(n_head="6"), "`n_head` must be of type int"),
        ("bloom", dict(n_layer=5000), "`n_layer` is 5000, at most 4096"),
        ("bloom", dict(n_embed=64), "`n_embed` is 64 but `hidden_size` is 48"),
        ("bloom", dict(num_attention_heads=3), "`num_attention_heads` is 3 but `n_head` is 6"),
        ("bloom", dict(hidden_act="gelu"), "`hidden_act` is 'gelu'; only 'gelu_pytorch_tanh'"),
        ("bloom", dict(tie_word_embeddings=False), "`tie_word_embeddings` is False; only True"),
        ("bloom", dict(apply_residual_connection_post_layernorm=True), "only False is supported"),
        ("bloom", dict(hidden_dropout=0.1), "`hidden_dropout` is 0.1; only 0 is supported"),
        ("mt-nlg", dict(hidden_act=...), "`hidden_act` is missing"),
        ("mt-nlg", dict(hidden_act=None), "`hidden_act` is missing"),
        ("mt-nlg", dict(hidden_act="swish"), "`hidden_act` is 'swish', expected one of relu2, ge"),
        ("mt-nlg", dict(hidden_act=["gelu"]), "`hidden_act` must be of type str"),
        ("mt-nlg", dict(max_position_embeddings=...), "`max_position_embeddings` is missing"),
        ("mt-nlg", dict(max_position_embeddings=0), "`max_position_embeddings` must be from 1"),
    ],
)
def test_bad_field(family, change, message):
    with pytest.raises(ConfigError, match=message):
        families.config(family, **change)


def test_spellings():
    old = families.config("bloom", hidden_size=..., n_embed=48, n_layer=..., num_hidden_layers=3)
    assert old == families.config("bloom")
    length = families.config("bloom", seq_length=2048, max_position_embeddings=2048)
    assert length.max_position_embeddings is None
    assert length.to_dict()["max_position_embeddings"] == length.extra["seq_length"] == 2048


def test_mt_nlg_is_built_with_what_is_not_public():
    with pytest.raises(ValueError, match="needs hidden_act, layer_norm_epsilon, which are not pub"):
        build("MT-NLG 530B", device="meta")
    model = build("MT-NLG 530B", device="meta", hidden_act="gelu", layer_norm_epsilon=1e-5)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert shapes == dict(names.tensor_shapes(model.config)) and len(shapes) == 1264
    assert sum(map(math.prod, shapes.values())) == 529_600_819_200
    assert shapes["transformer.position_embeddings.weight"] == (2048, 20480)


def test_names_of_the_published_bloom():
    shapes = dict(names.tensor_shapes(build("bigscience/bloom", device="meta").config))
    assert shapes["transformer.word_embeddings.weight"] == (250880, 14336)
    assert shapes["transformer.h.69.self_attention.query_key_value.weight"] == (43008, 14336)
    assert shapes["transformer.h.69.mlp.dense_h_to_4h.bias"] == (57344,)
    assert "lm_head.weight" not in shapes
