import collections
import inspect
import subprocess
import sys

import pytest
import torch

from nemokernels import patch, patch_transformers

transformers = pytest.importorskip("transformers")
from transformers.models.bamba import modeling_bamba  # noqa: E402
from transformers.models.mamba2 import modeling_mamba2  # noqa: E402
from transformers.models.nemotron_h import modeling_nemotron_h  # noqa: E402

MODULES = {"nemotron_h": modeling_nemotron_h, "mamba2": modeling_mamba2, "bamba": modeling_bamba}
SCAN = {"causal_conv1d", "ssd_chunk_scan", "gated_rms_norm"}
STEP = {"causal_conv1d_update", "selective_state_update", "gated_rms_norm"}
LAYER_NORM = {"nemotron_h": {"rms_norm"}, "mamba2": set(), "bamba": set()}


def config(name):
    if name == "nemotron_h":
        return transformers.NemotronHConfig(
            vocab_size=67, hidden_size=32, layers_block_type=["mamba", "moe", "attention", "mamba"],
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, mamba_num_heads=8,
            mamba_head_dim=8, n_groups=2, ssm_state_size=16, conv_kernel=4, chunk_size=4,
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            moe_shared_expert_intermediate_size=16, intermediate_size=24, n_group=1, topk_group=1,
        )  # fmt: skip
    if name == "mamba2":
        return transformers.Mamba2Config(
            vocab_size=67, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, expand=2,
            n_groups=2, state_size=16, conv_kernel=4, chunk_size=4,
        )  # fmt: skip
    return transformers.BambaConfig(
        vocab_size=67, hidden_size=32, num_hidden_layers=3, attn_layer_indices=[1],
        intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, mamba_n_heads=8,
        mamba_d_head=8, mamba_expand=2, mamba_n_groups=2, mamba_d_state=16, mamba_d_conv=4,
        mamba_chunk_size=4,
    )  # fmt: skip


@pytest.fixture(params=list(MODULES), scope="module")
def built(request):
    """A tiny model, every parameter redrawn: no bias, D, norm weight or A is at its default."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(request.param)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith(("A_log", "dt_bias")):
                parameter.copy_(0.5 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                parameter.copy_(0.25 * noise)
    return request.param, model


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operators of this package by name."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nemokernels":
            self.names[func._opname] += 1
        return func(*args, **(kwargs or {}))


def close(got, want):
    """Relative to the largest value: both sides are float32 in another order of operations."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def tokens(rows, length):
    return torch.randint(1, 67, (rows, length))


def both(run):
    """Results without and with the patch, and the operators the second one called."""
    with Calls() as before:
        want = run()
    assert not before.names
    with patch_transformers(), Calls() as calls:
        got = run()
    return got, want, calls.names


@pytest.mark.parametrize("length", [1, 3, 11])
def test_full_forward(built, length):
    name, model = built
    ids = tokens(2, length)
    with torch.no_grad():
        got, want, calls = both(lambda: model(ids, use_cache=False).logits)
    close(got, want)
    assert set(calls) == SCAN | LAYER_NORM[name]
    assert calls["ssd_chunk_scan"] == 2 == calls["causal_conv1d"] == calls["gated_rms_norm"]


@pytest.mark.parametrize("prompt", [1, 2, 9])
def test_prefill_then_cached_steps(built, prompt):
    name, model = built
    ids = tokens(2, prompt + 5)

    def run():
        out = model(ids[:, :prompt], use_cache=True)
        logits = [out.logits]
        for i in range(prompt, ids.shape[1]):
            # Bamba rotates its keys and takes position 0 unless told otherwise.
            where = {"position_ids": torch.tensor([[i]])} if name == "bamba" else {}
            cache = {key: out[key] for key in ("past_key_values", "cache_params") if key in out}
            out = model(ids[:, i : i + 1], use_cache=True, **cache, **where)
            logits.append(out.logits)
        return torch.cat(logits, 1)

    with torch.no_grad():
        got, want, calls = both(run)
        whole = model(ids, use_cache=False).logits
    close(got, want)
    close(got, whole)
    assert set(calls) == SCAN | STEP | LAYER_NORM[name]
    assert calls["causal_conv1d_update"] == calls["selective_state_update"] == 2 * 5


def test_generate(built):
    _, model = built
    ids = tokens(2, 6)
    run = lambda: model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)  # noqa: E731
    got, want, calls = both(run)
    assert torch.equal(got, want) and set(calls) >= SCAN | STEP


@pytest.mark.parametrize("padded", [False, True])
def test_training_forward_and_gradients(built, padded):
    """With a padded batch the fused path, which cannot mask inside, is not taken."""
    name, model = built
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[0, :4] = 0

    def run():
        model.train()
        try:
            out = model(ids, attention_mask=mask, use_cache=False).logits
            loss = (out * mask[..., None]).square().mean()
            wanted = [p for p in model.parameters() if p.requires_grad]
            return out[mask.bool()].detach(), torch.autograd.grad(loss, wanted, allow_unused=True)
        finally:
            model.eval()

    got, want, calls = both(run)
    close(got[0], want[0])
    for a, b in zip(got[1], want[1]):
        assert (a is None) == (b is None)
        if b is not None:
            close(a, b)
    # The fused path has one backward, which fills the gradient of zxbcdt.
    scan = "ssd_chunk_scan_backward" if padded else "mamba_mixer_backward"
    assert {n for n in calls if not n.endswith("_backward")} - {scan} == SCAN | LAYER_NORM[name]
    assert calls[scan] == 2


def test_the_fused_path_is_taken_in_training_unless_padded(built, monkeypatch):
    name, model = built
    fused = []
    original = sys.modules["nemokernels.patch"].mamba_split_conv1d_scan_combined
    spy = lambda *a, **k: fused.append(1) or original(*a, **k)  # noqa: E731
    spy.__signature__ = inspect.signature(original)
    monkeypatch.setattr("nemokernels.patch.mamba_split_conv1d_scan_combined", spy)
    mask = torch.ones(2, 5, dtype=torch.long)
    with patch_transformers():
        model.train()
        model(tokens(2, 5), attention_mask=mask, use_cache=False)
        assert len(fused) == 2
        mask[0, 0] = 0
        model(tokens(2, 5), attention_mask=mask, use_cache=False)
        model.eval()
        model(tokens(2, 5), use_cache=False)
    assert len(fused) == 2


def test_left_padding_changes_nothing(built):
    _, model = built
    ids = tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    with torch.no_grad(), patch_transformers():
        alone = model(ids, use_cache=False).logits
        shifted = model(padded, attention_mask=mask, use_cache=False).logits[:, 3:]
    close(shifted, alone)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("built", ["mamba2"], indirect=True)
def test_seq_idx_keeps_packed_sequences_apart(built, train):
    """transformers' torch code refuses it; its Mamba2ForCausalLM drops it, the backbone does not.

    Mamba-2 alone: in the other two attention needs its own bounds.
    """
    backbone = built[1].backbone
    ids = tokens(1, 11)
    seq_idx = torch.tensor([[0] * 5 + [1] * 6], dtype=torch.int32)
    backbone.train(train)
    with torch.no_grad(), patch_transformers():
        packed = backbone(ids, seq_idx=seq_idx, use_cache=False)[0]
        parts = [backbone(part, use_cache=False)[0] for part in (ids[:, :5], ids[:, 5:])]
    backbone.eval()
    close(packed, torch.cat(parts, 1))


def replaced(module):
    """Everything of a modeling module and of its classes that a patch could have touched."""
    names = dict(vars(module))
    for name, value in vars(module).items():
        if isinstance(value, type) and value.__module__ == module.__name__:
            names |= {f"{name}.{k}": v for k, v in vars(value).items() if callable(v)}
    return names


@pytest.mark.parametrize("module", MODULES.values(), ids=list(MODULES))
def test_undo_restores_every_name(module):
    before = replaced(module)
    with patch_transformers():
        assert replaced(module) != before
    assert replaced(module) == before
    patch = patch_transformers()
    second = patch_transformers()
    second.close()
    assert replaced(module) != before
    patch.close()
    assert replaced(module) == before


def test_a_failed_patch_leaves_nothing_behind(monkeypatch):
    monkeypatch.delattr(modeling_bamba, "mamba2_chunk_scan")
    before = [replaced(module) for module in MODULES.values()]
    with pytest.raises(ImportError, match="modeling_bamba of transformers .* has no mamba2_chunk"):
        patch_transformers()
    assert [replaced(module) for module in MODULES.values()] == before


def test_without_transformers(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="patch_transformers: .* install transformers >= 5.23"):
        patch_transformers()


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, nemokernels; assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_cached_step_refuses_to_record_a_gradient(built):
    _, model = built
    with patch_transformers():
        out = model(tokens(1, 3), use_cache=True)
        cache = {key: out[key] for key in ("past_key_values", "cache_params") if key in out}
        with pytest.raises(RuntimeError, match="no_grad"):
            model(tokens(1, 1), use_cache=True, **cache)


def test_padding_is_seen_whatever_the_cache_is_called():
    """cache_params in transformers 5.23, cache in 5.24."""

    def forward(self, hidden_states, cache=None, attention_mask=None, **kwargs):
        return cache, kwargs["padded"]

    call = patch._telling_of_padding(forward)
    assert call(None, 1, cache=2, attention_mask=3) == (2, True)
    assert call(None, 1, 2, 3) == (2, True) and call(None, 1, 2) == (2, False)
