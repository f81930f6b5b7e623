"""An engine without a model: it answers with its prompt, over and over, so that what should come back is known."""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.requests import SamplingParams, TokenLogprob
from opendeep_jax.generation.scoring import Scored


@dataclasses.dataclass
class Stats:
    """As `EngineStats`."""

    running: int = 0
    waiting: int = 0
    free_pages: int = 64
    total_pages: int = 64
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0


@dataclasses.dataclass(eq=False)
class Request:
    """A request of the fake engine."""

    prompt: list[int]
    params: SamplingParams
    made: int = 0
    aborted: bool = False


class Progress(NamedTuple):
    """As the real engine's."""

    request: Request
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish: str | None


class EchoEngine:
    """Gives one token of the prompt to each of `slots` requests in every step.

    Args:
        step_seconds: What a step takes.
        fail: Called with the requests that a step works on; may raise.
        answer: What it says instead of the prompt.
    """

    def __init__(
        self,
        slots: int = 4,
        max_length: int = 512,
        step_seconds: float = 0.0,
        fail: Callable[[list[Request]], None] | None = None,
        answer: list[int] | None = None,
        vocab_size: int = 262,
    ):
        self.slots, self.max_length, self.vocab_size = slots, max_length, vocab_size
        self.stats = Stats()
        self.requests: list[Request] = []
        self._step_seconds, self._fail, self._answer = step_seconds, fail, answer

    @property
    def capacity(self) -> int:
        return self.max_length

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    def submit(self, prompt, params) -> Request:
        if len(prompt) + params.max_tokens > self.max_length:
            raise ConfigError("the prompt is too long for the engine")
        self.requests.append(Request(list(prompt), params))
        self.stats.prompt_tokens += len(prompt)
        return self.requests[-1]

    def abort(self, request: Request) -> None:
        request.aborted = True

    def step(self) -> list[Progress]:
        time.sleep(self._step_seconds)
        self.stats.steps += 1
        working = self.requests[: self.slots]
        if self._fail:
            self._fail(working)
        progress = [Progress(request, [], [], "aborted") for request in self.requests if request.aborted]
        for request in working:
            if request.aborted:
                continue
            text = self._answer or request.prompt
            token = text[request.made % len(text)]
            request.made += 1
            self.stats.generated_tokens += 1
            if token in request.params.end_ids:
                progress.append(Progress(request, [], [], "stop"))
                continue
            finish = "length" if request.made == request.params.max_tokens else None
            logprobs = [TokenLogprob(token, -0.5, tuple((token + i, -0.5 - i) for i in range(request.params.logprobs)))]
            progress.append(Progress(request, [token], logprobs if request.params.logprobs >= 0 else [], finish))
        done = {id(each.request) for each in progress if each.finish}
        self.requests = [request for request in self.requests if id(request) not in done]
        self.stats.running = min(len(self.requests), self.slots)
        self.stats.waiting = len(self.requests) - self.stats.running
        self.stats.free_pages = self.stats.total_pages - self.stats.running
        return progress

    def score(self, texts, first, top=0) -> list[Scored]:
        scored = [ids[place:] for ids, place in zip(texts, first, strict=True)]
        tops = [[tuple((token + i, -0.5 - i) for i in range(1, 1 + top)) for token in ids] for ids in scored]
        return [Scored([-1.0] * len(ids), [False] * len(ids), best) for ids, best in zip(scored, tops, strict=True)]
