"""Decoders against transformers, through a checkpoint that transformers wrote."""

import decoders
import hybrids
import pytest
import torch
import transformers

from nemokernels.models import from_pretrained, save_pretrained

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "nemotron": (transformers.NemotronConfig, transformers.NemotronForCausalLM),
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
}


def write_peer(folder, family, changes):
    """transformers' model with every parameter redrawn, and its checkpoint on disk."""
    kind, architecture = CLASSES[family]
    fields = {**decoders.FIELDS[family], **changes}
    fields = {k: v for k, v in fields.items() if v is not ... and k != "model_type"}
    torch.manual_seed(0)
    peer = architecture(kind(**fields)).eval()
    decoders.redraw(sorted(peer.named_parameters()))
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
    model = decoders.model(family, dtype=torch.float32, **changes)
    save_pretrained(model, tmp_path / "model")
    peer = CLASSES[family][1].from_pretrained(tmp_path / "model").eval()
    assert hybrids.forward_difference(peer, model, hybrids.tokens(2, 80)) <= 1e-4


MISTAKES = {
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
}


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peer")
    return write_peer(folder, "nemotron", {}), folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, nemotron):
    """The comparison would notice: each part of the model, put wrong, breaks it."""
    peer, folder = nemotron
    model = from_pretrained(folder)
    assert hybrids.forward_difference(peer, model, hybrids.tokens(3, 21)) <= 1e-4
    with torch.no_grad():
        MISTAKES[name](model.state_dict()[name])
    assert hybrids.forward_difference(peer, model, hybrids.tokens(3, 21)) > 1e-3
