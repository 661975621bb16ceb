"""``nemokernels train`` and ``nemokernels generate``."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import tyro
from rich.console import Console
from rich.markup import escape

from nemokernels._backends import default_device
from nemokernels.models import (
    CausalLM,
    Generation,
    NemotronVL,
    VisionPrompt,
    build,
    deferred,
    fp8_report,
    from_pretrained,
    load_clip,
    load_image,
    read_config,
    vision_prompt,
)
from nemokernels.models import generate as generate_tokens
from nemokernels.train.data import Batches, Corpus, DataError, read_texts, text_files, tokenizers
from nemokernels.train.log import Log, plot
from nemokernels.train.parallel import leave
from nemokernels.train.trainer import Settings, Trainer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Unprefixed = tyro.conf.OmitArgPrefixes


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        DataError: it is missing or not a tokenizer, or tokenizers is not installed.
    """
    package = tokenizers().Tokenizer
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer file")
    try:
        return package.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for whatever it cannot parse
        raise DataError(f"{path}: not a tokenizer.json ({error})") from None


def load_model(source: str, *, seed: int) -> tuple[CausalLM, Callable[[CausalLM], None]]:
    """The model of a checkpoint folder, or a new one from a config.json or a variant's name.

    The model is on meta; call the returned function to fill it once it is sharded. Weights are
    float32, as the optimizer updates them.
    """
    path = Path(source)
    if path.is_dir():
        return deferred(path)
    config = read_config(path) if path.suffix == ".json" else source

    def fill(model: CausalLM) -> None:
        torch.manual_seed(seed)
        model.reset_parameters()

    return build(config, device="meta", dtype=torch.float32), fill


def fit(
    model: CausalLM,
    tokenizer: Tokenizer,
    corpus: Corpus,
    settings: Settings,
    out: Path,
    *,
    save_every: int,
    fresh: bool,
    fill: Callable[[CausalLM], None] | None = None,
) -> list:
    """Train or continue, then write the model, its tokenizer and the loss curve to ``out``."""
    largest = int(corpus.tokens.max())
    if largest >= model.config.vocab_size:
        raise DataError(
            f"the tokenizer makes token id {largest}, the model's vocab_size is "
            f"{model.config.vocab_size}"
        )
    batches = Batches(
        corpus, seq_len=settings.seq_len, windows=settings.windows, seed=settings.seed
    )
    if fresh:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model, batches, settings, out, fill=fill)
    step, first = trainer.resume(), trainer.rank == 0
    if step and first:
        Console().print(f"continues after step {step} of {settings.steps}", highlight=False)
    with Log(out / "log.jsonl", step=step, steps=settings.steps, show=first) as log:
        trainer.run(save_every=save_every, on_step=log)
    trainer.export(out / "model")
    if first:
        tokenizer.save(str(out / "model" / "tokenizer.json"))
        if importlib.util.find_spec("matplotlib") is None:
            Console().print("no loss curve: matplotlib is not installed", highlight=False)
        else:
            plot(log.reports, out / "loss.png")
    return log.reports


def train(
    model: str,
    data: tuple[Path, ...],
    out: Path,
    settings: Unprefixed[Settings],
    tokenizer: Path | None = None,
    save_every: int = 100,
    fresh: bool = False,
) -> int:
    """Train on text files. Under torchrun the model is sharded over several processes.

    Args:
        model: a config.json, a checkpoint folder to start from, or a variant's name.
        data: text files (UTF-8), or folders of them.
        out: folder for checkpoints, log, loss curve and, at the end, the model.
        settings: what the run computes.
        tokenizer: a tokenizer.json; by default the one beside the model.
        save_every: steps between checkpoints.
        fresh: start over instead of continuing from the newest checkpoint in --out.
    """
    settings.check()
    if save_every < 1:
        raise DataError(f"save_every must be at least 1, got {save_every}")
    network, fill = load_model(model, seed=settings.seed)
    path = Path(model)
    if tokenizer is None and not path.exists():
        raise DataError(f"{model} is a model's name, beside which lies no tokenizer.json; give one "
                        "with --tokenizer")  # fmt: skip
    beside = path if path.is_dir() else path.parent
    encoder = load_tokenizer(tokenizer or beside / "tokenizer.json")
    corpus = Corpus.from_texts(encoder, read_texts(text_files(data)))
    reports = fit(
        network, encoder, corpus, settings, out, save_every=save_every, fresh=fresh, fill=fill
    )
    if os.environ.get("RANK", "0") == "0":
        change = f"loss {reports[0].losses[0]:.3f} -> {reports[-1].losses[0]:.3f}"
        Console().print(f"{change}, model in {out / 'model'}", highlight=False)
        if report := fp8_report(network):
            ran = sum(layer.promised for layer in report)
            by_norm = sum(layer.quantised_by == "norm" for layer in report)
            text = f"FP8: {ran} of {len(report)} linear layers, {by_norm} of them fed by their norm"
            Console().print(text, highlight=False)
    leave()
    return 0


def look(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: tuple[str, ...],
    image: tuple[Path, ...],
    video: tuple[Path, ...],
    image_token_id: int | None,
    **options,
) -> VisionPrompt:
    """Build the prompt for a vision-language model from one text, pictures and videos."""
    if not isinstance(model, NemotronVL):
        raise DataError(f"--image and --video need a model that sees, this is a {model.name}")
    if len(prompt) != 1:
        raise DataError(f"--image and --video take one prompt, got {len(prompt)}")
    marker = model.config.img_context_token
    found = (image_token_id, model.image_token_id, tokenizer.token_to_id(marker))
    model.image_token_id = next((token for token in found if token is not None), None)
    if model.image_token_id is None:
        raise DataError(f"neither config.json nor the tokenizer names the token of {marker}; "
                        "give --image-token-id")  # fmt: skip
    return vision_prompt(
        model,
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        prompt[0],
        images=[load_image(path) for path in image],
        videos=[load_clip(path, fps=options["video_fps"]) for path in video],
        pruning_rate=options["video_pruning_rate"],
    )


def _marked(model: CausalLM, prompt: tuple[str, ...]) -> bool:
    """Whether a prompt has a place for a picture or video."""
    if not isinstance(model, NemotronVL):
        return False
    markers = (model.config.img_context_token, model.config.video_context_token)
    return any(marker in text for marker in markers for text in prompt)


def generate(
    folder: Annotated[Path, tyro.conf.Positional],
    prompt: tuple[str, ...],
    image: tuple[Path, ...] = (),
    video: tuple[Path, ...] = (),
    video_fps: float | None = None,
    video_pruning_rate: float | None = None,
    image_token_id: int | None = None,
    max_new_tokens: int = 128,
    speculate: int = 0,
    exact: bool = False,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Continue prompts with a saved model; with an MTP block, several tokens per step.

    Args:
        folder: model folder: config.json, safetensors, tokenizer.json.
        prompt: one or more texts to continue.
        image: pictures for a vision-language model; <image> in the prompt marks their places,
            otherwise they come first.
        video: folders of frames, GIFs or APNGs; <video> marks their places.
        video_fps: frames per second of the source; by default what a GIF or APNG says.
        video_pruning_rate: share of a video's tokens to drop; by default the model's.
        image_token_id: needed if neither config.json nor the tokenizer names it.
        max_new_tokens: longest continuation, in tokens.
        speculate: tokens the MTP block drafts per step; 0 turns it off.
        exact: compute every token on its own, so that the result depends neither on the batch nor
            on speculation; slower.
        temperature: 0 decodes greedily.
        top_k: sample among this many most likely tokens.
        top_p: sample among the smallest set of tokens with this probability.
        seed: seed of the random numbers.
        as_json: print JSON.
    """
    if not prompt:
        raise DataError("--prompt names no text; give at least one")
    if not all(map(_is_unicode, prompt)):
        raise DataError("--prompt: not UTF-8 text")
    for option, given in (("--video-fps", video_fps), ("--video-pruning-rate", video_pruning_rate)):
        if given is not None and not video:
            raise DataError(f"{option} is about a --video, and there is none")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    model = from_pretrained(folder, device=default_device())
    configs = (model.config, getattr(model.config, "llm_config", model.config))
    features = None
    if image or video or _marked(model, prompt):
        options = {"video_fps": video_fps, "video_pruning_rate": video_pruning_rate}
        seen = look(model, tokenizer, prompt, image, video, image_token_id, **options)
        ids, features = [seen.tokens], seen.image_features
    else:
        ids = [tokenizer.encode(text).ids for text in prompt]
    started = time.perf_counter()
    result = generate_tokens(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        speculate=speculate,
        exact=exact,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos=next((c.extra["eos_token_id"] for c in configs if "eos_token_id" in c.extra), None),
        image_features=features,
    )
    _print_generation(tokenizer, prompt, result, time.perf_counter() - started, as_json=as_json)
    return 0


def _is_unicode(text: str) -> bool:
    """False of an argument whose bytes Python could not decode and keeps as surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _print_generation(
    tokenizer: Tokenizer,
    prompts: tuple[str, ...],
    result: Generation,
    seconds: float,
    *,
    as_json: bool,
) -> None:
    texts = [tokenizer.decode(row) for row in result.tokens]
    produced = sum(map(len, result.tokens))
    summary = {
        "tokens": result.tokens,
        "texts": texts,
        "steps": result.steps,
        "drafted": result.drafted,
        "accepted": result.accepted,
        "mean_accepted_length": result.tokens_per_step,
        "tokens_per_second": produced / seconds,
    }
    if as_json:
        print(json.dumps(summary))
        return
    console = Console(highlight=False)
    for before, after in zip(prompts, texts):
        console.print(f"[bold]{escape(before)}[/bold]{escape(after)}\n")
    console.print(
        f"{produced} tokens, {summary['tokens_per_second']:.1f} per second, "
        f"{summary['mean_accepted_length']:.2f} per step"
    )
