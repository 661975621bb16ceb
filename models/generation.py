"""Generation: batched prefill and decoding, with drafts from the model's own MTP block."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from nemokernels import mtp_verify
from nemokernels._checks import check
from nemokernels.models.causal_lm import CausalLM
from nemokernels.models.linear import exact as exact_products
from nemokernels.models.reward import RewardModel
from nemokernels.models.state import State

__all__ = ["Generation", "generate"]


@dataclass
class Generation:
    """What :func:`generate` returns.

    Attributes:
        tokens: per request, the new tokens, an end token included.
        logprobs: per new token, its log-probability under the model before temperature and cuts.
        steps: verification steps, summed over requests; the prefill is not one.
        drafted: drafts verified.
        accepted: drafts accepted. A step yields one token more than it accepts drafts.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens a verification step yields, 1 without drafts."""
        return 1 + self.accepted / self.steps if self.steps else 1.0


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    speculate: int = 0,
    exact: bool = False,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    request_ids: Sequence[int] | None = None,
    eos: int | Sequence[int] | None = None,
    image_features: torch.Tensor | None = None,
) -> Generation:
    """Continue every prompt, greedily or by sampling.

    With ``speculate`` the MTP block drafts a chain of tokens (always its most likely ones) and the
    model verifies all of them in one call. This changes the speed, not the distribution. Greedy
    tokens are those of plain decoding up to rounding, and exactly those with ``exact``; sampled
    tokens have the same distribution, but are other samples.

    Random numbers depend only on the seed, the request's id and the position. Outputs depend on the
    other requests of the call only through rounding, and with ``exact`` not at all.

    Args:
        model: the model; it runs on its parameters' device and keeps its training mode.
        prompts: token ids, at least one per prompt, of any lengths.
        max_new_tokens: largest number of tokens to generate per request, at least 1.
        speculate: drafts per step; needs a model with an MTP block.
        exact: compute every token on its own (:func:`nemokernels.models.exact`); slow on batches.
        temperature: 0 is greedy; finite.
        top_k, top_p: cut the distribution; None: no cut. See :func:`nemokernels.mtp_verify`.
        seed: of the random numbers.
        request_ids: an integer per prompt from which its random numbers derive; None: 0, 1, ...
        eos: a request ends with the first of these tokens it emits.
        image_features: for a vision-language model, (m, H) vectors for the m image tokens of the
            prompts, in order (:func:`nemokernels.models.vision_prompt` makes both).

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
        FloatingPointError: the model's logits for a request are not a distribution (NaN or Inf).

    Source: Leviathan et al., "Fast inference from transformers via speculative decoding", 2023;
    the drafting chain is that of DeepSeek-AI, "DeepSeek-V3 technical report", 2024.
    """
    ends = _ends(eos)
    _check(model, prompts, max_new_tokens, speculate, request_ids)
    _check_images(model, prompts, image_features)
    _check_sampling(temperature, top_k, top_p, seed)
    requests = [
        _Request(slot, list(prompt), len(prompt) + max_new_tokens, request_id, ends)
        for slot, (prompt, request_id) in enumerate(
            zip(prompts, request_ids or range(len(prompts)))
        )
    ]
    result = Generation([], [])
    if requests:
        choose = partial(mtp_verify, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        mode = exact_products() if exact else contextlib.nullcontext()
        with torch.no_grad(), _evaluating(model), mode:
            state = model.new_state(
                len(requests),
                max(request.limit for request in requests) + speculate,
                draft_tokens=speculate,
            )
            seen = {} if image_features is None else {"image_features": image_features}
            _Decoder(model, state, choose, speculate, result, seen).run(requests)
    result.tokens = [request.tokens[request.prompt_length :] for request in requests]
    result.logprobs = [request.logprobs for request in requests]
    return result


@dataclass
class _Request:
    slot: int
    tokens: list[int]  # prompt and emitted tokens; the model has seen all but the last
    limit: int  # number of tokens, the prompt's included
    id: int
    ends: frozenset[int]
    logprobs: list[float] = field(default_factory=list)
    prompt_length: int = field(init=False)
    done: bool = False

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def room(self) -> int:
        """Drafts that could still be used: the token after them is certain to be emitted."""
        return self.limit - len(self.tokens) - 1

    def emit(self, tokens: list[int], logprobs: list[float]) -> None:
        for token, logprob in zip(tokens, logprobs):
            if token < 0:
                raise FloatingPointError(
                    f"generate: the logits of request {self.slot} at position {len(self.tokens)} "
                    "are not a distribution (NaN or Inf)"
                )
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.done = token in self.ends or len(self.tokens) == self.limit
            if self.done:
                return


class _Decoder:
    """One call of :func:`generate`: B active requests, T tokens per step, H hidden size."""

    def __init__(
        self,
        model: CausalLM,
        state: State,
        choose: Callable,
        speculate: int,
        result: Generation,
        seen: dict[str, torch.Tensor],
    ):
        self.model, self.state, self.choose = model, state, choose
        self.speculate, self.result, self.seen = speculate, result, seen
        self.device = model.lm_head.weight.device

    def run(self, requests: list[_Request]) -> None:
        drafts = self.prefill(requests)
        requests, drafts = _alive(requests, drafts)
        while requests:
            drafts = self.step(requests, drafts)
            requests, drafts = _alive(requests, drafts)

    def prefill(self, requests: list[_Request]) -> torch.Tensor:
        """Read the prompts, packed into one row, and emit one token each; return (B, K) drafts."""
        prompts = [list(request.tokens) for request in requests]
        bounds = torch.tensor([0, *map(len, prompts)]).cumsum(0)
        packed = {
            "cu_seqlens": bounds.to(self.device, torch.int32),
            "state": self.state,
            "slots": self.slots(requests),
        }
        last = bounds[1:].to(self.device) - 1
        hidden = self.model.hidden(self.tensor([sum(prompts, [])]), **packed, **self.seen)
        none = self.tensor([[]] * len(requests))
        self.verify(requests, hidden[0, last, None], none, [0] * len(requests))
        width = self.width(requests)
        if width == 0:
            return none
        following = sum((request.tokens[1:] for request in requests), [])
        hidden = self.model.mtp_hidden(hidden, self.tensor([following]), **packed)
        return self.draft(requests, hidden[0, last, None], width)

    def step(self, requests: list[_Request], drafts: torch.Tensor) -> torch.Tensor:
        """Verify the drafts (B, T - 1) and emit tokens; return drafts for the next step."""
        slots = self.slots(requests)
        tokens = torch.cat([self.tensor([[r.tokens[-1]] for r in requests]), drafts], 1)
        hidden = self.model.hidden(tokens, state=self.state, slots=slots, decode=True)
        lengths = [min(drafts.shape[1], request.room) for request in requests]
        kept, following = self.verify(requests, hidden, drafts, lengths)
        self.state.accept(kept)
        self.result.steps += len(requests)
        self.result.drafted += sum(lengths)
        self.result.accepted += int(kept.sum()) - len(requests)
        width = self.width(requests)
        if width == 0:
            return drafts[:, :0]
        # The block's cache advances over the verified tokens with the model's own hidden states,
        # which replaces what drafting had left there. Positions past `kept` are dropped.
        hidden = self.model.mtp_hidden(
            hidden, following, state=self.state, slots=slots, decode=True
        )
        self.state.advance_mtp(kept, slots)
        rows = torch.arange(len(requests), device=self.device)
        return self.draft(requests, hidden[rows, kept.long() - 1, None], width)

    def verify(
        self,
        requests: list[_Request],
        hidden: torch.Tensor,
        drafts: torch.Tensor,
        lengths: list[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Emit tokens for every request, of which the first ``lengths`` drafts (B, T - 1) count.

        Returns:
            ``(kept, following)``: how many of the T input tokens are kept, (B,) int32; and the
            token after each, (B, T).
        """
        verdict = self.choose(
            self.model.lm_head(hidden),
            drafts,
            draft_lengths=self.tensor(lengths),
            request_ids=self.tensor([request.id for request in requests]),
            positions=self.tensor([len(request.tokens) for request in requests]),
        )
        kept = verdict.accepted + 1
        following = torch.cat([drafts, verdict.next_token[:, None]], 1)
        following.scatter_(1, kept.long()[:, None] - 1, verdict.next_token[:, None])
        rows = zip(requests, kept.tolist(), following.tolist(), verdict.logprobs.tolist())
        for request, count, tokens, logprobs in rows:
            request.emit(tokens[:count], logprobs[:count])
        return kept, following

    def draft(self, requests: list[_Request], hidden: torch.Tensor, width: int) -> torch.Tensor:
        """Draft a chain of the ``width`` most likely tokens after hidden (B, 1, H)."""
        slots, chain = self.slots(requests), []
        for _ in range(width - 1):
            chain.append(self.model.lm_head(hidden).argmax(-1))
            hidden = self.model.mtp_hidden(
                hidden, chain[-1], state=self.state, slots=slots, decode=True
            )
            self.state.advance_mtp([1] * len(requests), slots)
        chain.append(self.model.lm_head(hidden).argmax(-1))
        self.state.advance_mtp([1 - width] * len(requests), slots)
        return torch.cat(chain, 1)

    def width(self, requests: list[_Request]) -> int:
        """Drafts worth making for the next step."""
        room = max((request.room for request in requests if not request.done), default=0)
        return min(self.speculate, room)

    def slots(self, requests: list[_Request]) -> torch.Tensor:
        return torch.tensor([request.slot for request in requests], dtype=torch.int32,
                            device=self.device)  # fmt: skip

    def tensor(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _alive(requests: list[_Request], drafts: torch.Tensor) -> tuple[list[_Request], torch.Tensor]:
    rows = [row for row, request in enumerate(requests) if not request.done]
    if len(rows) == len(requests):
        return requests, drafts
    return [requests[row] for row in rows], drafts[rows]


@contextlib.contextmanager
def _evaluating(model: CausalLM) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _ends(eos: int | Sequence[int] | None) -> frozenset[int]:
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    for token in ends:
        if not isinstance(token, int) or isinstance(token, bool):
            raise TypeError(f"generate: `eos` holds {token!r}, expected token ids")
    return frozenset(ends)


def _check(model, prompts, max_new_tokens, speculate, request_ids) -> None:
    if not isinstance(model, CausalLM):
        raise TypeError(f"generate: `model` must be a CausalLM, got {type(model).__name__}")
    for name, value, low in (("max_new_tokens", max_new_tokens, 1), ("speculate", speculate, 0)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"generate: `{name}` must be an int, got {type(value).__name__}")
        check("generate", value >= low, f"`{name}` must be at least {low}, got {value}")
    check("generate", not isinstance(model, RewardModel), "`model` gives rewards, not logits")
    check("generate", speculate == 0 or model.mtp is not None,
          f"`speculate` is {speculate}, but this model has no MTP block to draft with")  # fmt: skip
    check("generate", request_ids is None or len(request_ids) == len(prompts),
          "`request_ids` must have one id per prompt")  # fmt: skip
    vocab = model.config.vocab_size
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Sequence):
            raise TypeError(f"generate: `prompts[{index}]` must be a list of token ids, "
                            f"got {type(prompt).__name__}")  # fmt: skip
        check("generate", len(prompt) > 0, f"`prompts[{index}]` is empty; give it one token, such "
              "as the beginning-of-text token")  # fmt: skip
        for token in prompt:
            if not isinstance(token, int) or isinstance(token, bool):
                raise TypeError(f"generate: `prompts[{index}]` holds {token!r:.80}, expected ints")
            check("generate", 0 <= token < vocab,
                  f"`prompts[{index}]` holds {token}, expected a token below {vocab}")  # fmt: skip


def _check_sampling(temperature, top_k, top_p, seed) -> None:
    for name, value, kind, holds, wanted in (
        ("temperature", temperature, float, lambda t: 0 <= t < math.inf, "finite, not negative"),
        ("top_k", 0 if top_k is None else top_k, int, lambda k: k >= 0, "at least 0"),
        ("top_p", 1 if top_p is None else top_p, float, lambda p: 0 < p <= 1, "in (0, 1]"),
        ("seed", seed, int, lambda s: 0 <= s < 2**64, "in [0, 2**64)"),
    ):
        kinds = (int, float) if kind is float else int
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(
                f"generate: `{name}` must be {kind.__name__}, got {type(value).__name__}"
            )
        check("generate", holds(value), f"`{name}` must be {wanted}, got {value}")


def _check_images(model, prompts, image_features) -> None:
    token = model.image_token_id
    check("generate", image_features is None or token is not None,
          "`image_features` are given, but the model has no image token")  # fmt: skip
    places = 0 if token is None else sum(list(prompt).count(token) for prompt in prompts)
    vectors = 0 if image_features is None else len(image_features)
    check("generate", places == vectors,
          f"`prompts` hold {places} image tokens, `image_features` {vectors} vectors")  # fmt: skip
