"""Every family transformers has a class for, through a checkpoint that transformers wrote."""

import copy
import re

import families
import hybrids
import pytest
import torch
import transformers

from nemokernels.models import from_pretrained, gpt, save_pretrained
from nemokernels.models.gpt import alibi_slopes

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "nemotron": (transformers.NemotronConfig, transformers.NemotronForCausalLM),
    "bloom": (transformers.BloomConfig, transformers.BloomForCausalLM),
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
    "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
}
VARIANTS = {
    "llama": ("llama", {}),
    "llama without scaling": ("llama", dict(rope_scaling=...)),
    "llama tied": ("llama", dict(tie_word_embeddings=True)),
    "mistral": ("mistral", {}),
    "mistral one kv head": ("mistral", dict(num_key_value_heads=1)),
    "nemotron": ("nemotron", {}),
    "nemotron all rotated": ("nemotron", dict(partial_rotary_factor=1.0)),
    "nemotron quarter rotated": ("nemotron", dict(partial_rotary_factor=0.25)),
    "bloom": ("bloom", {}),
    "bloom eight heads": ("bloom", dict(n_head=8)),
    "bloom one head": ("bloom", dict(n_head=1, n_layer=1)),
    "mamba": ("mamba", {}),
    "mamba with biases, tied": (
        "mamba",
        dict(use_bias=True, use_conv_bias=False, tie_word_embeddings=True, conv_kernel=3),
    ),
    "mamba odd sizes": ("mamba", dict(expand=3, time_step_rank="auto", state_size=5)),
    "mamba2": ("mamba2", {}),
    "mamba2 with biases, tied": (
        "mamba2",
        dict(use_bias=True, use_conv_bias=False, tie_word_embeddings=True),
    ),
    "mamba2 one group": ("mamba2", dict(n_groups=1, expand=1, num_heads=2)),
}


def write_peer(folder, family, changes):
    """transformers' model with every parameter redrawn, and its checkpoint on disk."""
    kind, architecture = CLASSES[family]
    fields = {**families.FIELDS[family], **changes}
    fields = {k: v for k, v in fields.items() if v is not ... and k != "model_type"}
    torch.manual_seed(0)
    peer = architecture(kind(**copy.deepcopy(fields))).eval()  # it writes into rope_scaling
    families.redraw(family, peer.named_parameters())
    peer.save_pretrained(folder)
    return peer


@pytest.fixture(params=VARIANTS)
def pair(request, tmp_path):
    peer = write_peer(tmp_path, *VARIANTS[request.param])
    return peer, from_pretrained(tmp_path)


def test_forward(pair):
    assert hybrids.forward_difference(*pair, hybrids.tokens(2, 150)) <= 1e-4


def test_prefill_and_cached_decode(pair):
    assert hybrids.cached_difference(*pair, hybrids.tokens(2, 18), prefill=11) <= 1e-4


def test_bounded_steps(tmp_path):
    """In whole rows alone: transformers does not bound the step of a single token."""
    peer = write_peer(tmp_path, "mamba2", dict(time_step_limit=(0.1, 0.8)))
    model = from_pretrained(tmp_path)
    assert hybrids.forward_difference(peer, model, hybrids.tokens(2, 50)) <= 1e-4
    write_peer(tmp_path, "mamba2", {})
    assert hybrids.forward_difference(peer, from_pretrained(tmp_path), hybrids.tokens(2, 50)) > 1e-2


@pytest.mark.parametrize("family", CLASSES)
def test_bfloat16_is_no_worse_than_theirs(family, tmp_path):
    """Errors of both against the same weights in float64."""
    write_peer(tmp_path, family, {})
    peer = CLASSES[family][1].from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    model, tokens = from_pretrained(tmp_path, dtype=torch.bfloat16), hybrids.tokens(4, 60)
    with torch.no_grad():
        ours, theirs = model(tokens).double(), peer(tokens).logits.double()
        true = model.double()(tokens)
    assert (ours - true).norm() <= 2 * (theirs - true).norm()


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_reads_what_is_saved(name, tmp_path):
    family, changes = VARIANTS[name]
    model = families.model(family, dtype=torch.float32, **changes)
    save_pretrained(model, tmp_path / "model")
    peer = CLASSES[family][1].from_pretrained(tmp_path / "model").eval()
    assert hybrids.forward_difference(peer, model, hybrids.tokens(2, 80)) <= 1e-4


MISTAKES = {
    "nemotron": {
        "model.embed_tokens.weight": lambda t: t.mul_(1.05),
        "model.layers.0.input_layernorm.weight": lambda t: t.add_(0.1),
        "model.layers.0.input_layernorm.bias": lambda t: t.zero_(),
        "model.layers.1.post_attention_layernorm.weight": lambda t: t.sub_(1),
        "model.layers.1.post_attention_layernorm.bias": lambda t: t.neg_(),
        "model.layers.1.self_attn.q_proj.weight": lambda t: t.copy_(t.roll(8, 0)),
        "model.layers.1.self_attn.k_proj.weight": lambda t: t.copy_(t.roll(16, 0)),
        "model.layers.2.self_attn.v_proj.weight": lambda t: t.copy_(t.roll(16, 0)),
        "model.layers.2.self_attn.o_proj.weight": lambda t: t.mul_(1.05),
        "model.layers.2.mlp.up_proj.weight": lambda t: t.neg_(),
        "model.layers.0.mlp.down_proj.weight": lambda t: t.neg_(),
        "model.norm.weight": lambda t: t.sub_(1),
        "model.norm.bias": lambda t: t.zero_(),
        "lm_head.weight": lambda t: t.copy_(t.roll(1, 0)),
    },
    "bloom": {
        "transformer.word_embeddings.weight": lambda t: t.copy_(t.roll(1, 0)),
        "transformer.word_embeddings_layernorm.weight": lambda t: t.fill_(1),
        "transformer.word_embeddings_layernorm.bias": lambda t: t.zero_(),
        "transformer.h.0.input_layernorm.weight": lambda t: t.fill_(1),
        "transformer.h.0.input_layernorm.bias": lambda t: t.zero_(),
        # Rows as (q, k, v), head, channel: grouped by head they are the other way round.
        "transformer.h.1.self_attention.query_key_value.weight":
            lambda t: t.copy_(t.view(3, 6, 8, 48).transpose(0, 1).reshape(144, 48)),
        "transformer.h.1.self_attention.query_key_value.bias": lambda t: t.zero_(),
        "transformer.h.2.self_attention.dense.weight": lambda t: t.mul_(1.05),
        "transformer.h.2.self_attention.dense.bias": lambda t: t.zero_(),
        "transformer.h.1.post_attention_layernorm.weight": lambda t: t.fill_(1),
        "transformer.h.1.post_attention_layernorm.bias": lambda t: t.zero_(),
        "transformer.h.0.mlp.dense_h_to_4h.weight": lambda t: t.neg_(),
        "transformer.h.0.mlp.dense_h_to_4h.bias": lambda t: t.zero_(),
        "transformer.h.2.mlp.dense_4h_to_h.weight": lambda t: t.neg_(),
        "transformer.h.2.mlp.dense_4h_to_h.bias": lambda t: t.zero_(),
        "transformer.ln_f.weight": lambda t: t.fill_(1),
        "transformer.ln_f.bias": lambda t: t.zero_(),
    },
    "mamba": {
        "backbone.embeddings.weight": lambda t: t.mul_(1.05),
        "backbone.layers.0.norm.weight": lambda t: t.fill_(1),
        "backbone.layers.0.mixer.in_proj.weight": lambda t: t.copy_(t.roll(64, 0)),  # gate first
        "backbone.layers.1.mixer.conv1d.weight": lambda t: t.copy_(t.flip(-1)),
        "backbone.layers.1.mixer.conv1d.bias": lambda t: t.zero_(),
        "backbone.layers.1.mixer.x_proj.weight": lambda t: t.copy_(t.roll(4, 0)),
        "backbone.layers.1.mixer.dt_proj.weight": lambda t: t.copy_(t.roll(1, 1)),
        "backbone.layers.2.mixer.dt_proj.bias": lambda t: t.add_(1),
        "backbone.layers.1.mixer.A_log": lambda t: t.copy_(t.roll(1, 1)),
        "backbone.layers.1.mixer.D": lambda t: t.zero_(),
        "backbone.layers.2.mixer.out_proj.weight": lambda t: t.mul_(1.05),
        "backbone.norm_f.weight": lambda t: t.sub_(0.1),
        "lm_head.weight": lambda t: t.copy_(t.roll(1, 0)),
    },
    "mamba2": {
        "backbone.embeddings.weight": lambda t: t.mul_(1.05),
        "backbone.layers.0.norm.weight": lambda t: t.fill_(1),
        "backbone.layers.0.mixer.in_proj.weight": lambda t: t[128:160].zero_(),  # B
        "backbone.layers.1.mixer.conv1d.weight": lambda t: t.copy_(t.flip(-1)),
        "backbone.layers.1.mixer.conv1d.bias": lambda t: t.zero_(),
        "backbone.layers.1.mixer.A_log": lambda t: t.add_(0.5),
        "backbone.layers.1.mixer.D": lambda t: t.zero_(),
        "backbone.layers.2.mixer.dt_bias": lambda t: t.add_(1),
        "backbone.layers.2.mixer.norm.weight": lambda t: t.fill_(1),
        "backbone.layers.2.mixer.out_proj.weight": lambda t: t.mul_(1.05),
        "backbone.norm_f.weight": lambda t: t.sub_(0.1),
        "lm_head.weight": lambda t: t.copy_(t.roll(1, 0)),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """family -> transformers' model and its checkpoint."""
    folders = {family: tmp_path_factory.mktemp(family) for family in MISTAKES}
    return {f: (write_peer(folder, f, {}), folder) for f, folder in folders.items()}


@pytest.mark.parametrize("family", MISTAKES)
def test_every_part_has_its_mistake(family):
    leaves = {re.sub(r"[.][0-9][.]", ".", name) for name in MISTAKES[family]}
    assert {re.sub(r"[.][0-9][.]", ".", n) for n in families.model(family).state_dict()} == leaves


@pytest.mark.parametrize(("family", "name"), [(f, name) for f in MISTAKES for name in MISTAKES[f]])
def test_a_mistake_is_seen(family, name, written):
    """The comparison would notice: each part of the model, put wrong, breaks it."""
    peer, folder = written[family]
    model = from_pretrained(folder)
    assert hybrids.forward_difference(peer, model, hybrids.tokens(3, 21)) <= 1e-4
    with torch.no_grad():
        MISTAKES[family][name](model.state_dict()[name])
    assert hybrids.forward_difference(peer, model, hybrids.tokens(3, 21)) > 1e-3


def test_a_mistake_of_bloom_without_a_tensor_is_seen(written, monkeypatch):
    """Slopes of twice as many heads, positions forgotten, another GELU."""
    peer, folder = written["bloom"]
    wrong = {
        "alibi_slopes": lambda heads, device=None: alibi_slopes(2 * heads, device)[:heads],
        "Attention.forward": lambda self, x, slopes, run: forward(self, x, None, run),
    }
    forward = gpt.Attention.forward
    for name, mistake in wrong.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"nemokernels.models.gpt.{name}", mistake)
            model = from_pretrained(folder)
            assert hybrids.forward_difference(peer, model, hybrids.tokens(3, 21)) > 1e-3, name
    model = from_pretrained(folder)
    for layer in model.transformer.h:
        layer.mlp.act = torch.nn.functional.gelu
    assert hybrids.forward_difference(peer, model, hybrids.tokens(3, 21)) > 1e-4
