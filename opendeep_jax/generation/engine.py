"""Continuous batching: requests come and go while a batch of slots runs, each request with its own pages of the cache.

A step takes in a piece of waiting prompts and then one token of every running request. All shapes are fixed: decoding
always computes all slots, so that a request's numbers do not depend on how many others there are, and a prompt is cut
by its own length alone. Pages for a request's longest output are set aside when it starts: none is ever thrown out.
"""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation import sampling, scoring, speculation
from opendeep_jax.generation.adjusting import adjustments
from opendeep_jax.generation.cache import TPU_LANES, Pages, bytes_per_token
from opendeep_jax.generation.forward import Rows
from opendeep_jax.generation.params import MOST_LOGPROBS, Completion, SamplingParams, TokenLogprob
from opendeep_jax.generation.programs import (
    Chosen,
    advance,
    make_cache,
    on_mesh,
    pick,
    platform_of,
    score,
    with_logprobs,
)
from opendeep_jax.generation.requests import (
    EngineConfig,
    EngineStats,
    Progress,
    Request,
    bucket,
    check_settings,
    chunk_size,
    cut_out,
    longest,
)
from opendeep_jax.generation.weights import take_apart
from opendeep_jax.models.decoder import Decoder
from opendeep_jax.parallel.axes import row_shards

LEAST_PAGES = 2
"""Pages of the narrowest table: few widths are few programs to compile."""


class Programs(NamedTuple):
    """What an engine runs, compiled for each number of new tokens and pages that occurs."""

    advance: dict[bool, Callable]
    """`programs.advance`, by whether every row begins."""
    take_in_both: dict[bool, Callable]
    """`speculation.take_in`, likewise."""
    verify: Callable
    pick: dict[bool, Callable]
    """`programs.pick`, by whether log-probabilities are wanted."""
    with_logprobs: Callable
    score: dict[bool, Callable]
    """`programs.score`, by whether the most likely tokens are wanted."""


class Engine:
    """Generates from a model. Belongs to one thread.

    Args:
        model: its arrays are divided over `mesh`, or stay where they are without one.
        mesh: rows are divided over its data, fsdp and expert axes, heads over tensor.
        consume: give the model's arrays up as the engine's are made of them; it cannot be used afterwards.
    Raises:
        ConfigError: for settings that cannot work.
    """

    def __init__(self, model: Decoder, config: EngineConfig = EngineConfig(), mesh=None, consume: bool = False):  # noqa: B008
        check_settings(config, model.config, {} if mesh is None else mesh.shape)
        self.config, self.model, self.mesh = config, model.config, mesh
        self.page_size = config.page_size or (TPU_LANES if platform_of(mesh) == "tpu" else 64)
        self.slots, self.max_length = config.slots, longest(config, model.config)
        self.shards = 1 if mesh is None else row_shards(mesh)
        self.slots_per_shard = config.slots // self.shards
        self.left_to_decode = int(config.speculate > 0)
        """Tokens of a prompt that are not taken in but decoded: a speculating step wants the last one itself."""
        self.vocab_size = config.vocab_size or model.config.vocab_size
        self.bones, self.weights = take_apart(model, mesh, consume)
        self.table_width = -(-self.max_length // self.page_size)
        pages = self.slots_per_shard * self.table_width
        if config.cache_tokens:
            pages = -(-config.cache_tokens // (self.page_size * self.shards))
        self.pools = [Pages(pages + 1) for _ in range(self.shards)]
        self.cache = make_cache(
            self.bones, pages + 1, self.page_size, self.slots_per_shard, mesh, mtp=config.speculate > 0
        )
        self.cache_bytes_per_token = bytes_per_token(model.config, mtp=config.speculate > 0)
        self.running: list[Request | None] = [None] * config.slots
        self.waiting: deque[Request] = deque()
        self._doomed: list[Request] = []
        self._counts = dict.fromkeys(
            ("prompt_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens", "steps"), 0
        )
        compiled = partial(on_mesh, bones=self.bones, mesh=mesh, mtp=config.speculate > 0)
        both = (False, True)
        self.programs = Programs(
            advance={first: compiled(partial(advance, self.bones, first), extra=1) for first in both},
            take_in_both={first: compiled(partial(speculation.take_in, self.bones, first), extra=2) for first in both},
            verify=compiled(partial(speculation.verify, self.bones, self.vocab_size, config.speculate), extra=4),
            pick={top: jax.jit(partial(pick, self.vocab_size, top)) for top in both},
            # A function of its own: what is compiled for it goes with the engine.
            with_logprobs=jax.jit(partial(with_logprobs)),
            score={top: compiled(partial(score, self.bones, top=MOST_LOGPROBS * top), extra=2) for top in both},
        )

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self._doomed) or any(self.running)

    @property
    def capacity(self) -> int:
        """Tokens that a single request may have: what its length and the pages of one group allow."""
        return min(self.max_length, self.pools[0].count * self.page_size)

    @property
    def stats(self) -> EngineStats:
        """Counts of now and since the beginning."""
        free = sum(pool.free for pool in self.pools)
        total = sum(pool.count for pool in self.pools)
        running = sum(request is not None for request in self.running)
        return EngineStats(running, len(self.waiting), free, total, **self._counts)

    def submit(self, prompt: Sequence[int], params: SamplingParams = SamplingParams()) -> Request:  # noqa: B008
        """Queues a prompt. Raises ConfigError for one that is empty, too long, or has tokens that the model lacks."""
        prompt = [int(token) for token in prompt]
        if not prompt:
            raise ConfigError("The prompt is empty: it needs at least one token, such as the one that begins a text.")
        if len(prompt) >= self.max_length:
            raise ConfigError(
                f"The prompt has {len(prompt)} tokens, and prompt and output together may have {self.max_length}. "
                "Shorten it, or start with a greater max_length."
            )
        odd = [token for token in prompt if not 0 <= token < self.bones.config.vocab_size]
        if odd:
            raise ConfigError(
                f"The prompt holds the token {odd[0]}; the model's are 0 to {self.bones.config.vocab_size - 1}."
            )
        if params.adjusts and self.config.speculate:
            raise ConfigError(
                "Penalties, logit_bias and min_tokens change what follows each single token, and this engine guesses "
                "several ahead. Leave them out, or start it with speculate = 0."
            )
        request = Request(prompt, params)
        needed = self._pages_of(request)
        if needed > self.pools[0].count:
            raise ConfigError(
                f"The prompt's {len(prompt)} tokens and max_tokens = {params.max_tokens} take {needed} pages, and the "
                f"cache has {self.pools[0].count}. Lower max_tokens, or start with greater cache_tokens."
            )
        self.waiting.append(request)
        return request

    def abort(self, request: Request) -> None:
        """Ends a request; the next step frees its pages and reports it."""
        if request.finish is None and request not in self._doomed:
            self._doomed.append(request)

    def step(self) -> list[Progress]:
        """Takes in a piece of the waiting prompts and one token of every running request; what came of it."""
        progress = [self._end(request, "aborted") for request in self._doomed if request.finish is None]
        self._doomed = []
        self._admit()
        self._take_in(progress)
        ready = [request if request and not self._left(request) else None for request in self.running]
        if any(ready):
            (self._speculate if self.config.speculate else self._decode)(ready, progress)
        self._counts["steps"] += 1
        return progress

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Runs prompts to their ends and returns their outputs in order; others that are running go on as well."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = [self.submit(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
        while any(request.finish is None for request in requests):
            self.step()
        return [Completion(request.tokens, request.logprobs, request.finish) for request in requests]

    def score(self, texts: Sequence[Sequence[int]], first: Sequence[int], top: int = 0) -> list[scoring.Scored]:
        """Log-probabilities of the texts' tokens from some place on: see `scoring.score`."""
        return scoring.score(self, texts, first, top)

    def scored(
        self, requests: list[Request | None], tokens, starts, counts, targets, top: bool = False
    ) -> tuple[np.ndarray, ...]:
        """`programs.score` of some tokens of requests that hold pages, one or None of each group of devices."""
        rows = self._rows(requests, tokens, starts, counts)
        out, self.cache = self.programs.score[top](self.weights, self.cache, rows, targets)
        return jax.device_get(out)

    def _pages_of(self, request: Request) -> int:
        return -(-self._limit(request) // self.page_size)

    def _admit(self) -> None:
        """Gives waiting requests slots and pages, first come first served."""
        while self.waiting:
            request = self.waiting[0]
            needed = self._pages_of(request)
            idle = (slot for slot, held in enumerate(self.running) if held is None)
            free = [slot for slot in idle if self._pool(slot).free >= needed]
            if not free:
                return
            self.waiting.popleft()
            # The group with most pages left: they fill up evenly.
            request.slot = max(free, key=lambda slot: self._pool(slot).free)
            request.pages = self._pool(request.slot).take(needed)
            self.running[request.slot] = request

    def _pool(self, slot: int) -> Pages:
        """The pages of a slot's group of devices."""
        return self.pools[slot // self.slots_per_shard]

    def _take_in(self, progress: list[Progress]) -> None:
        """Takes prompts into the cache, a chunk after another, until the step's share is used up."""
        budget = most = self.config.prefill_tokens
        while budget > 0:
            chosen = [None] * self.shards
            for slot, request in enumerate(self.running):
                # A prompt that is begun comes before the others of its group.
                shard = slot // self.slots_per_shard
                if request and self._left(request) and (not chosen[shard] or request.taken_in):
                    chosen[shard] = request
            if not any(chosen):
                return
            starts = [request.taken_in if request else 0 for request in chosen]
            chunks = [chunk_size(self._left(request), most) if request else 0 for request in chosen]
            tokens, following = cut_out([request.prompt if request else () for request in chosen], starts, chunks)
            rows = self._rows(chosen, tokens, starts, chunks)
            # A prompt's beginning sees itself alone; where groups are at different places, the cache is read by all.
            first = not any(starts)
            if self.config.speculate:
                _, self.cache = self.programs.take_in_both[first](self.weights, self.cache, rows, following)
            else:
                logits, self.cache = self.programs.advance[first](self.weights, self.cache, rows)
            for request, count in zip(chosen, chunks, strict=True):
                if request:
                    request.taken_in += count
                    self._counts["prompt_tokens"] += count
            done = [request if request and not self._left(request) else None for request in chosen]
            if any(done) and not self.config.speculate:
                self._accept_all(done, logits, progress)
            budget -= tokens.shape[1]

    def _left(self, request: Request) -> int:
        """Tokens of the prompt to be taken in before decoding."""
        return len(request.prompt) - self.left_to_decode - request.taken_in

    def _decode(self, ready: list[Request | None], progress: list[Progress]) -> None:
        """One token of each request whose prompt is in the cache, given in their slots."""
        tokens = np.array([[request.tokens[-1] if request else 0] for request in ready], np.int32)
        rows = self._rows(ready, tokens, [request.length - 1 if request else 0 for request in ready], [1] * self.slots)
        logits, self.cache = self.programs.advance[False](self.weights, self.cache, rows)
        self._accept_all(ready, logits, progress)

    def _speculate(self, ready: list[Request | None], progress: list[Progress]) -> None:
        """One token of each request whose prompt is in the cache, and as many more as drafts stand."""
        tokens = np.zeros((self.slots, 1 + self.config.speculate), np.int32)
        limits, starts, counts = np.zeros((3, self.slots), np.int32)
        for row, request in enumerate(ready):
            if request:
                limits[row], starts[row] = self._limit(request), request.length - 1
                last = (request.tokens or request.prompt)[-1]
                new = [last, *request.drafts][: limits[row] - starts[row]]
                tokens[row, : len(new)], counts[row] = new, len(new)
        rows = self._rows(ready, tokens, starts, counts, ahead=self.config.speculate)
        settings, index, top = self._settings(ready)
        out, self.cache = self.programs.verify(self.weights, self.cache, rows, limits, settings, index)
        chosen, accepted, drafts = jax.device_get((out.tokens, out.accepted, out.drafts))
        given = jax.device_get(self.programs.with_logprobs(out.tokens, out.logits)) if top else None
        for row, request in enumerate(ready):
            if request:
                request.drafts = drafts[row].tolist()
                self._counts["drafted_tokens"] += int(counts[row]) - 1
                self._counts["accepted_tokens"] += int(accepted[row])
                count = int(accepted[row]) + 1
                of_row = given and Chosen(*(array[row] for array in given))
                progress.append(self._accept(request, chosen[row, :count], of_row))

    def _accept_all(self, requests: list[Request | None], logits: jax.Array, progress: list[Progress]) -> None:
        """Chooses after the rows of some requests, None for those that idle."""
        settings, index, top = self._settings(requests)
        out = jax.device_get(self.programs.pick[top](logits, settings, index, adjustments(requests)))
        for row, request in enumerate(requests):
            if request:
                one = Chosen(*(None if array is None else array[row : row + 1] for array in out))
                progress.append(self._accept(request, one.tokens, one if top else None))

    def _settings(self, requests: list[Request | None]) -> tuple[sampling.RowSampling, np.ndarray, bool]:
        """The rows' sampling settings, their places in their outputs, and whether one wants log-probabilities."""
        settings, index, top = sampling.idle(len(requests)), np.zeros(len(requests), np.int32), False
        for row, request in enumerate(requests):
            if request:
                params = request.params
                own = params.temperature, params.top_k, params.top_p, params.min_p, params.seed
                for array, value in zip(settings, own, strict=True):
                    array[row] = value
                index[row], top = len(request.tokens), top or params.logprobs >= 0
        return settings, index, top

    def _rows(self, requests, tokens, starts, counts, ahead: int = 0) -> Rows:
        """The step's rows, with page tables as wide as the longest needs, and for `ahead` more positions."""
        present = [count if request else 0 for request, count in zip(requests, counts, strict=True)]
        furthest = int(max(start + count for start, count in zip(starts, present, strict=True))) + ahead
        pages = np.zeros((len(requests), self.pages_seen(furthest)), np.int32)
        for row, request in zip(pages, requests, strict=True):
            if request:
                held = request.pages[: len(row)]
                row[: len(held)] = held
        # What has no slot, an idle row or a text that is scored, takes the place behind all of them.
        last = self.slots_per_shard
        slots = [request.slot % last if request and request.slot >= 0 else last for request in requests]
        return Rows(tokens, np.array(starts, np.int32), np.array(present, np.int32), pages, np.array(slots, np.int32))

    def pages_seen(self, positions: int) -> int:
        """Pages in the tables of a step that reaches so many positions."""
        return min(bucket(-(-positions // self.page_size), LEAST_PAGES), self.table_width)

    def _accept(self, request: Request, tokens: np.ndarray, given: Chosen | None) -> Progress:
        """Gives a request the tokens that were chosen for it, up to its end.

        Args:
            given: log-probabilities of the tokens, where any request of the step wants them.
        """
        new, logprobs, finish = [], [], None
        for place, token in enumerate(map(int, tokens)):
            if token in request.params.end_ids:
                finish = "stop"
                break
            new.append(token)
            if given and (count := request.params.logprobs) >= 0:
                top = zip(given.top_tokens[place].tolist(), given.top_logprobs[place].tolist(), strict=True)
                logprobs.append(TokenLogprob(token, float(given.logprobs[place]), tuple(itertools.islice(top, count))))
            if request.length + len(new) >= self._limit(request):
                finish = "length"
                break
        request.tokens += new
        request.logprobs += logprobs
        self._counts["generated_tokens"] += len(new)
        if finish:
            self._end(request, finish)
        return Progress(request, new, logprobs, finish)

    def _limit(self, request: Request) -> int:
        """Tokens that a request may have, its prompt's included."""
        return min(len(request.prompt) + request.params.max_tokens, self.max_length)

    def _end(self, request: Request, why: str) -> Progress:
        """Frees what a request holds."""
        request.finish = why
        if request.slot >= 0:
            self._pool(request.slot).give_back(request.pages)
            self.running[request.slot] = None
            request.pages = []
        elif request in self.waiting:
            self.waiting.remove(request)
        return Progress(request, [], [], why)
