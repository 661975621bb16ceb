"""A model small enough to train in a test, with every kind of layer."""

from nemokernels.models import NemotronHConfig, build
from nemokernels.train import data
from nemokernels.train.data import Batches, Corpus
from nemokernels.train.trainer import Settings

CONFIG = {
    "model_type": "nemotron_h",
    "vocab_size": 320,
    "hidden_size": 48,
    "hybrid_override_pattern": "ME*-",
    "mtp_hybrid_override_pattern": "*E",
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "moe_latent_size": 24,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TEXTS = [f"item {i}: " + "the quick brown fox jumps over the lazy dog. " * 3 for i in range(60)]


def config(**changes):
    return NemotronHConfig.from_dict({**CONFIG, **changes})


def model(seed=0, **kwargs):
    import torch

    torch.manual_seed(seed)
    return build(config(), **kwargs)


def settings(**changes):
    base = dict(steps=12, seq_len=32, windows=4, lr=3e-3, min_lr=3e-5, warmup=2, decay=4)
    return Settings(**{**base, **changes})


def tokenizer():
    return data.train_tokenizer(TEXTS, CONFIG["vocab_size"])


def batches(settings):
    corpus = Corpus.from_texts(tokenizer(), TEXTS)
    return Batches(corpus, seq_len=settings.seq_len, windows=settings.windows, seed=settings.seed)
