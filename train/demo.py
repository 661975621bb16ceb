"""The whole workflow in small: train on text, save, load in a new process, generate with MTP."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from nemokernels._backends import backends
from nemokernels.models import NemotronHConfig, build
from nemokernels.train import data
from nemokernels.train.commands import fit, load_tokenizer
from nemokernels.train.trainer import Report, Settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 2048
PROMPT_TOKENS, NEW_TOKENS, DRAFTS = 24, 64, 3

# The shape of Nemotron 3 Super, scaled down: Mamba-2, attention, LatentMoE with a shared expert,
# one MTP block applied twice in training.
CONFIG: dict[str, Any] = {
    "model_type": "nemotron_h",
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "hybrid_override_pattern": "MEM*EMEME",
    "mtp_hybrid_override_pattern": "*E",
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 12,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 4,
    "conv_kernel": 4,
    "chunk_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 256,
    "moe_latent_size": 64,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "bos_token_id": data.BOS,
    "eos_token_id": data.EOS,
    "pad_token_id": data.PAD,
}
SETTINGS = Settings(
    steps=80,
    seq_len=256,
    windows=8,
    lr=3e-3,
    min_lr=3e-5,
    warmup=10,
    decay=26,
    balance_rate=1e-2,
)


def demo(
    data_paths: Annotated[tuple[Path, ...], tyro.conf.arg(name="data")] = (),
    out: Path = Path("demo-run"),
    steps: int = SETTINGS.steps,
    fresh: bool = False,
) -> int:
    """Train a small Nemotron-3-Super-shaped model on text, then generate with it.

    Prints losses, tokens per second, the mean length that MTP speculation accepts, whether greedy
    output is the same with and without it, and every op's backend. Fails if the loss fell by less
    than 30 %, nothing was drafted, the mean accepted length is 1.3 or less, or the outputs differ.

    Args:
        data_paths: text files or folders; default: the Python standard library's own sources.
        out: where everything is written; a rerun continues from the newest checkpoint there.
        steps: optimizer steps.
        fresh: start over.
    """
    settings = dataclasses.replace(
        SETTINGS, steps=steps, warmup=min(SETTINGS.warmup, steps // 4), decay=steps // 3
    )
    settings.check()
    console = Console()
    # No operation of so small a model is worth sharing: two threads would mostly wait for each
    # other and, on a busy machine, for the scheduler.
    torch.set_num_threads(1)
    files = data.text_files(data_paths) if data_paths else data.standard_library()
    texts = data.read_texts(files)
    console.print(f"tokenising {len(texts)} files, {sum(map(len, texts)):,} characters")
    tokenizer = _tokenizer(out, texts, fresh=fresh)
    corpus = data.Corpus.from_texts(tokenizer, texts)
    torch.manual_seed(0)
    model = build(NemotronHConfig.from_dict(CONFIG), dtype=torch.float32)
    count = sum(p.numel() for p in model.parameters())
    console.print(f"{len(corpus.tokens):,} tokens; model {CONFIG['hybrid_override_pattern']} with "
                  f"{count:,} parameters")  # fmt: skip
    reports = fit(model, tokenizer, corpus, settings, out, save_every=40, fresh=fresh)
    prompts = beginnings(tokenizer, corpus)
    plain = _generate(out / "model", prompts, drafts=0)
    drafted = _generate(out / "model", prompts, drafts=DRAFTS)
    return _report(console, out, reports, plain, drafted)


def beginnings(tokenizer: Tokenizer, corpus: data.Corpus) -> list[str]:
    """The first tokens of the first four texts, decoded; fewer where there are fewer texts."""
    starts = [0, *corpus.ends[:-1].tolist()]
    ranges = [slice(start, start + PROMPT_TOKENS) for start in starts[:4]]
    return [tokenizer.decode(corpus.tokens[part].tolist()) for part in ranges]


def _tokenizer(out: Path, texts: list[str], *, fresh: bool):
    path = out / "tokenizer.json"
    if fresh or not path.exists():
        trained = data.train_tokenizer(texts[::4], VOCABULARY)
        out.mkdir(parents=True, exist_ok=True)
        trained.save(str(path))
    return load_tokenizer(path)


def _generate(folder: Path, prompts: list[str], *, drafts: int) -> dict[str, Any]:
    """Run ``nemokernels generate`` in a new process, which has only what was saved."""
    command = [sys.executable, "-m", "nemokernels.train.cli", "generate", str(folder)]
    command += ["--exact", "--json", "--max-new-tokens", str(NEW_TOKENS)]
    command += ["--speculate", str(drafts), "--prompt", *prompts]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as for training, see above
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"generation failed:\n{done.stderr}")
    return json.loads(done.stdout)


def verdicts(
    reports: list[Report], plain: dict[str, Any], drafted: dict[str, Any]
) -> dict[str, bool]:
    """The demo's claims, each true or false. As steps differ in how easy their text is, the last
    loss is the mean over a tenth of the run."""
    tail = reports[-max(1, len(reports) // 10) :]
    first, last = reports[0].losses[0], sum(r.losses[0] for r in tail) / len(tail)
    return {
        f"loss fell by 30 % or more ({first:.3f} -> {last:.3f})": last <= 0.7 * first,
        f"drafts were made ({drafted['drafted']})": drafted["drafted"] > 0,
        f"mean accepted length above 1.3 ({drafted['mean_accepted_length']:.2f})": (
            drafted["mean_accepted_length"] > 1.3
        ),
        "greedy output identical with and without speculation": (
            plain["tokens"] == drafted["tokens"]
        ),
    }


def _report(console: Console, out: Path, reports, plain, drafted) -> int:
    steady = reports[len(reports) // 2 :]
    speed = sum(r.tokens for r in steady) / sum(r.seconds for r in steady)
    table = Table("", "", show_header=False)
    table.add_row("training", f"{len(reports)} steps, {speed:,.0f} tokens/s")
    for name, run in (("generation, one token a step", plain), ("with MTP drafts", drafted)):
        table.add_row(name, f"{run['tokens_per_second']:.1f} tokens/s in {run['steps']} steps")
    for op, entry in sorted(backends().items()):
        why = "; ".join(f"{name}: {reason}" for name, reason in entry["rejected"].items())
        table.add_row(f"op {op}", entry["chosen"] + (f" ({why})" if why else ""))
    console.print(table)
    console.print(f"sample: {drafted['texts'][0]!r}", markup=False)
    results = verdicts(reports, plain, drafted)
    for claim, holds in results.items():
        console.print(("[green]yes[/green]  " if holds else "[red]NO[/red]   ") + claim)
    console.print(f"model, log and loss curve are in {out}/", highlight=False)
    return 0 if all(results.values()) else 1
