"""Small models of the family, with every tensor drawn at random."""

import torch

from nemokernels.models import NemotronHConfig, build

FIELDS = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 56,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
}


def config(pattern="M*-EME", mtp="", **changes):
    mtp = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": mtp} if mtp else {}
    return NemotronHConfig.from_dict(
        {**FIELDS, "hybrid_override_pattern": pattern, **mtp, **changes}
    )


def redraw(named):
    """New random values for every tensor: nothing stays at a one or a zero that hides a mistake."""
    with torch.no_grad():
        for name, tensor in named:
            leaf = name.removesuffix(".weight").rpartition(".")[2]
            noise = torch.randn(tensor.shape, dtype=torch.float64)
            if leaf == "A_log":
                value = noise * 0.5 + 0.5
            elif leaf == "dt_bias":
                value = noise - 1
            elif "norm" in leaf or leaf in ("D", "ln_f"):
                value = noise * 0.3 + 1
            elif leaf == "e_score_correction_bias":
                value = noise * 0.1
            elif tensor.dim() > 1:
                value = noise * 1.2 / tensor.shape[-1] ** 0.5
            else:
                value = noise * 0.2
            tensor.copy_(value)


def model(pattern="M*-EME", mtp="", seed=0, dtype=None, **changes):
    torch.manual_seed(seed)
    made = build(config(pattern, mtp, **changes), dtype=dtype)
    redraw(sorted(made.state_dict().items()))
    return made.eval()


def tokens(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, FIELDS["vocab_size"], shape, generator=generator)


def difference(ours, theirs):
    """max|ours - theirs| / max|theirs|."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def forward_difference(peer, model, tokens):
    """Between the logits of transformers' model and ours."""
    with torch.no_grad():
        return difference(model(tokens), peer(tokens).logits)


def cached_difference(peer, model, tokens, prefill):
    """The same, with ``prefill`` tokens at once and the others one by one through the caches."""
    state = model.new_state(len(tokens), tokens.shape[1] + 6)
    with torch.no_grad():
        out = peer(tokens[:, :prefill], use_cache=True)
        theirs, ours = [out.logits], [model(tokens[:, :prefill], state=state)]
        cache = "past_key_values" if "past_key_values" in out else "cache_params"
        for step in tokens[:, prefill:].split(1, 1):
            out = peer(step, use_cache=True, **{cache: out[cache]})
            theirs.append(out.logits)
            ours.append(model(step, state=state, decode=True))
            state.accept()
    return difference(torch.cat(ours, 1), torch.cat(theirs, 1))
