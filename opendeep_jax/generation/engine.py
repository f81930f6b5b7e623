"""Continuous batching: requests come and go while a batch of slots runs, each request with its own pages of the cache.

A step prefills a piece of waiting prompts and then decodes one token of every running request. All shapes are fixed:
decoding always computes all slots, so that a request's numbers do not depend on how many others there are, and a prompt
is cut by its own length alone. Pages for a request's longest output are set aside when it starts: none is ever thrown
out. In a job of several processes each has an engine of its own, on its own devices.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation import scoring
from opendeep_jax.generation.cache import TPU_LANES, Pages, make_cache, platform_of
from opendeep_jax.generation.forward import Rows
from opendeep_jax.generation.programs import programs_of
from opendeep_jax.generation.requests import (
    Completion,
    EngineConfig,
    EngineStats,
    Group,
    Request,
    RequestProgress,
    Samples,
    SamplingParams,
    bucket,
    check_request,
    check_settings,
    chunk_size,
    columns,
    cut_out,
    longest,
)
from opendeep_jax.generation.sampling import Sampled, adjustments, kept_tokens, settings_of, token_logprobs
from opendeep_jax.generation.weights import check_names, convert, one_device_mesh
from opendeep_jax.models.decoder import Decoder
from opendeep_jax.models.parameters import Arrays, split
from opendeep_jax.parallel.axes import row_shards

DEFAULT = SamplingParams()
LEAST_PAGES = 2
"""Pages of the narrowest table: few widths are few programs to compile."""


class Engine:
    """Batched generator of a model. Belongs to one thread.

    Args:
        model: its arrays are copied, divided over `mesh`.
        mesh: devices of this process; rows are divided over its data, fsdp and expert axes, heads over tensor. None
            takes the first device.
        consume: give the model's arrays up as the engine's are made of them; it cannot be used afterwards.
    Raises:
        ConfigError: for settings that cannot work.
    """

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig = EngineConfig(),  # noqa: B008
        mesh: Mesh | None = None,
        consume: bool = False,
    ):
        check_settings(config, model.config, {} if mesh is None else mesh.shape)
        self.config, self.model, self.mesh = config, model.config, mesh or one_device_mesh()
        if any(device.process_index != jax.process_index() for device in self.mesh.devices.flat):
            raise ConfigError(
                "The engine's mesh has devices of other processes: each process has an engine of its own. Make the "
                "mesh of jax.local_devices()."
            )
        self.page_size = config.page_size or (TPU_LANES if platform_of(self.mesh) == "tpu" else 64)
        self.slots, self.max_length = config.slots, longest(config, model.config)
        self.shards = row_shards(self.mesh)
        self.slots_per_shard = config.slots // self.shards
        self.left_to_decode = int(config.speculate > 0)
        """Tokens of a prompt that are decoded, not prefilled: a speculating step wants the last one itself."""
        self.vocab_size = config.vocab_size or model.config.vocab_size
        self.programs = programs_of(model.config, self.mesh, self.vocab_size, config.speculate, config.expert_choices)
        _, params, router_bias = split(model)
        self.weights = convert(self.programs.layout, params | router_bias, consume)
        self.table_width = -(-self.max_length // self.page_size)
        pages = self.slots_per_shard * self.table_width
        if config.cache_tokens:
            pages = -(-config.cache_tokens // (self.page_size * self.shards))
        self.pools = [Pages(pages + 1) for _ in range(self.shards)]
        self.cache = make_cache(
            self.programs.layout, pages + 1, self.page_size, self.slots_per_shard, mtp=config.speculate > 0
        )
        self.running: list[Request | None] = [None] * config.slots
        self.waiting: deque[Request] = deque()
        self._aborted: list[Request] = []
        self._counts = dict.fromkeys(
            ("prompt_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens", "steps"), 0
        )

    def load(self, params: Arrays, router_bias: Arrays) -> None:
        """Replace the weights, compiling nothing new; what the cache held of the old ones is void.

        Args:
            params, router_bias: by name, as training has them (`TrainState`), copied: a later step may donate them.
                Where they are divided over several processes, all call this together.
        Raises:
            ConfigError: while requests are running, whose cache would be of the old weights; for another model's.
        """
        if self.busy:
            raise ConfigError("Requests are running, whose cache is of the old weights. Let them end, or abort them.")
        old, arrays = self.weights, {**params, **router_bias}
        check_names(self.programs.layout, arrays)
        self.weights = None
        for array in jax.tree.leaves(old):
            array.delete()  # never both at a time
        self.weights = convert(self.programs.layout, arrays)

    @property
    def busy(self) -> bool:
        """True while requests wait or run."""
        return bool(self.waiting or self._aborted) or any(self.running)

    @property
    def capacity(self) -> int:
        """Maximum number of tokens of a request, by its length and the pages of one group."""
        return min(self.max_length, self.pools[0].count * self.page_size)

    @property
    def stats(self) -> EngineStats:
        """Return the engine's counters."""
        free = sum(pool.free for pool in self.pools)
        total = sum(pool.count for pool in self.pools)
        running = sum(request is not None for request in self.running)
        return EngineStats(running, len(self.waiting), free, total, **self._counts)

    def submit(self, prompt: Sequence[int], params: SamplingParams = DEFAULT, samples: int = 1) -> Request:
        """Queue a prompt, and return its request.

        Args:
            samples: outputs to sample, by seeds that count up from the given one. The prompt is prefilled once, and all
                are in `Request.samples`; each gets the tokens that it would get if submitted by itself.
        Raises:
            ConfigError: for a prompt that is empty, too long, or has tokens that the model lacks.
        """
        prompt = [int(token) for token in prompt]
        check_request(prompt, params, self.max_length, self.model.vocab_size, self.config)
        request = Request(prompt, params)
        if (needed := self._pages_of(request)) > self.pools[0].count:
            raise ConfigError(
                f"The prompt's {len(prompt)} tokens and max_tokens = {params.max_tokens} take {needed} pages, and the "
                f"cache has {self.pools[0].count}. Lower max_tokens, or start with greater cache_tokens."
            )
        seeds = [(params.seed + i) % 2**32 for i in range(1, samples)]
        request.samples = [request, *(Request(prompt, replace(params, seed=seed)) for seed in seeds)]
        # Pages belong to a group of devices: more samples than such a group has slots for are several groups.
        most = samples if self.shards == 1 else self.slots_per_shard
        for begin in range(0, samples if samples > 1 and self._prefix(request) else 0, most):
            group = Group(request.samples[begin : begin + most])
            for member in group.members:
                member.group = group
        for member in request.samples:
            member.samples = request.samples
        self.waiting += request.samples
        return request

    def abort(self, request: Request) -> None:
        """End a request; the next step frees its pages and reports it."""
        if request.finish is None and request not in self._aborted:
            self._aborted.append(request)

    def step(self) -> list[RequestProgress]:
        """Prefill a piece of the waiting prompts, decode one token of every running request; return what came of it."""
        with jax.set_mesh(self.mesh):
            progress = [self._end(request, "aborted") for request in self._aborted if request.finish is None]
            self._aborted = []
            self._admit()
            self._prefill(progress)
            ready = [request if request and not self._tokens_left(request) else None for request in self.running]
            if any(ready):
                (self._speculate if self.config.speculate else self._decode)(ready, progress)
            self._counts["steps"] += 1
        return progress

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Run prompts to their ends and return their outputs in order; others that are running go on as well."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = [self.submit(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
        self._finish(requests)
        return [Completion(request.tokens, request.logprobs, request.finish) for request in requests]

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], samples: int = 1
    ) -> Samples:
        """Run groups of samples of prompts to their ends and return them in columns, a prompt's side by side.

        Args:
            params: each prompt's, or one for all, by seeds that count up from prompt to prompt. Ends are kept, and
                log-probabilities are given, whatever it says.
        """
        if isinstance(params, SamplingParams):
            params = [replace(params, seed=(params.seed + i * samples) % 2**32) for i in range(len(prompts))]
        given = [replace(one, keep_end=True, drawn_logprobs=True, logprobs=max(one.logprobs, 0)) for one in params]
        first = [self.submit(prompt, one, samples) for prompt, one in zip(prompts, given, strict=True)]
        requests = [request for one in first for request in one.samples]
        self._finish(requests)
        return columns(requests, [place for place in range(len(prompts)) for _ in range(samples)])

    def _finish(self, requests: Sequence[Request]) -> None:
        while any(request.finish is None for request in requests):
            self.step()

    def score(self, texts: Sequence[Sequence[int]], first: Sequence[int], top: int = 0) -> list[scoring.Scored]:
        """Return log-probabilities of the texts' tokens from some place on: see `scoring.score`."""
        return scoring.score(self, texts, first, top)

    def _pages_of(self, request: Request) -> int:
        return -(-self._limit(request) // self.page_size)

    def _admit(self) -> None:
        """Assign slots and pages to waiting requests, first come first served; a group's others beside its leader."""
        while self.waiting:
            request, idle = self.waiting[0], [slot for slot, held in enumerate(self.running) if held is None]
            needed, group, shared = self._pages_of(request), request.group, []
            if group and group.leader:
                shared = group.pages[: self._prefix(request) // self.page_size]
                idle = [slot for slot in idle if self._pool(slot) is self._pool(group.leader.slot)]
            free = [slot for slot in idle if self._pool(slot).free >= needed - len(shared)]
            if not free:
                return
            self.waiting.popleft()
            # The group of devices with most pages left: they fill up evenly.
            request.slot = max(free, key=lambda slot: self._pool(slot).free)
            pool = self._pool(request.slot)
            request.pages = pool.share(shared) + pool.take(needed - len(shared))
            self.running[request.slot] = request
            if group and not group.leader:
                group.leader = request
                group.pages = pool.share(request.pages[: -(-self._prefix(request) // self.page_size)])

    def _pool(self, slot: int) -> Pages:
        """The pages of a slot's group of devices."""
        return self.pools[slot // self.slots_per_shard]

    def _prefill(self, progress: list[RequestProgress]) -> None:
        """Prefill prompts, a chunk after another, until the step's share is used up."""
        budget = most = self.config.prefill_tokens
        while budget > 0:
            chosen = [None] * self.shards
            for slot, request in enumerate(self.running):
                # A prompt that is begun comes before the others of its group of devices.
                shard = slot // self.slots_per_shard
                leads = request and (not request.group or request.group.leader is request)
                if leads and self._tokens_left(request) and (not chosen[shard] or request.prefilled):
                    chosen[shard] = request
            if not any(chosen):
                break
            starts = [request.prefilled if request else 0 for request in chosen]
            chunks = [chunk_size(self._tokens_left(request), most) if request else 0 for request in chosen]
            tokens, following = cut_out([request.prompt if request else () for request in chosen], starts, chunks)
            rows = self.rows(chosen, tokens, starts, chunks)
            # A prompt's beginning sees itself alone; where groups are at different places, the cache is read by all.
            first = not any(starts)
            if self.config.speculate:
                out, self.cache = self.programs.prefill_drafting[first](self.weights, self.cache, rows, following)
            else:
                out, self.cache = self.programs.next_logits[first](self.weights, self.cache, rows)
            self._keep_experts(chosen, out[1], chunks)
            for row, (request, count) in enumerate(zip(chosen, chunks, strict=True)):
                if request:
                    request.prefilled += count
                    self._counts["prompt_tokens"] += count
                    if request.group and not self._tokens_left(request):
                        group = request.group
                        group.ready, group.logits, group.experts = True, (out[0], row), list(request.experts)
            done = [request if request and not self._tokens_left(request) else None for request in chosen]
            if any(done) and not self.config.speculate:
                self._accept_all(done, out[0], progress)
            budget -= tokens.shape[1]
        self._start_samples(progress)

    def _start_samples(self, progress: list[RequestProgress]) -> None:
        """Start samples that have slots from their group's prompt, once that is in the cache."""
        begun = [request if self._awaits_leader(request) and request.group.ready else None for request in self.running]
        if not any(begun):
            return
        source, target = np.zeros((2, self.slots), np.int32)
        from_slot, to_slot = np.full((2, self.slots), self.slots_per_shard, np.int32)
        for row, request in enumerate(begun):
            if request:
                whole, partial = divmod(self._prefix(request), self.page_size)
                if partial:
                    source[row], target[row] = request.group.pages[whole], request.pages[whole]
                from_slot[row] = request.group.leader.slot % self.slots_per_shard
                to_slot[row] = request.slot % self.slots_per_shard
                request.prefilled, request.experts = self._prefix(request), list(request.group.experts)
        self.cache = self.programs.copy_pages(self.cache, (source, target), (from_slot, to_slot))
        for group in dict.fromkeys(request.group for request in begun if request):
            if not self.config.speculate:
                logits = self.programs.repeat(*group.logits, self.slots)
                own = [request if request and request.group is group else None for request in begun]
                self._accept_all(own, logits, progress)
            self._release(group)

    def _awaits_leader(self, request: Request | None) -> bool:
        """Return whether a request waits for its group's leader to prefill the prompt."""
        return bool(request and request.group and request.group.leader is not request and self._tokens_left(request))

    def _release(self, group: Group) -> None:
        """Give a group's pages back once all its samples have begun. A hybrid's states go on with their request, so
        samples that are still waiting then prefill the prompt anew."""
        pending = any(member.finish is None and self._tokens_left(member) for member in group.members)
        if group.leader and not (pending and "M" not in self.model.layer_pattern):
            self._pool(group.leader.slot).give_back(group.pages)
            group.leader, group.pages, group.ready, group.logits = None, [], False, None

    def _prefix(self, request: Request) -> int:
        """Tokens of the prompt that are prefilled before decoding."""
        return len(request.prompt) - self.left_to_decode

    def _tokens_left(self, request: Request) -> int:
        """Tokens of the prompt that are still to be prefilled."""
        return self._prefix(request) - request.prefilled

    def _decode(self, ready: list[Request | None], progress: list[RequestProgress]) -> None:
        """Decode one token of each request whose prompt is in the cache, given in their slots."""
        tokens = np.array([[request.tokens[-1] if request else 0] for request in ready], np.int32)
        rows = self.rows(ready, tokens, [request.length - 1 if request else 0 for request in ready], [1] * self.slots)
        (logits, experts), self.cache = self.programs.next_logits[False](self.weights, self.cache, rows)
        self._keep_experts(ready, experts, [1] * self.slots)
        self._accept_all(ready, logits, progress)

    def _speculate(self, ready: list[Request | None], progress: list[RequestProgress]) -> None:
        """Decode one token of each request whose prompt is in the cache, and as many more as drafts stand."""
        tokens = np.zeros((self.slots, 1 + self.config.speculate), np.int32)
        limits, starts, counts = np.zeros((3, self.slots), np.int32)
        for row, request in enumerate(ready):
            if request:
                limits[row], starts[row] = self._limit(request), request.length - 1
                last = (request.tokens or request.prompt)[-1]
                new = [last, *request.drafts][: limits[row] - starts[row]]
                tokens[row, : len(new)], counts[row] = new, len(new)
        rows = self.rows(ready, tokens, starts, counts, ahead=self.config.speculate)
        settings, index, wanted = settings_of(ready, self.config.kept_tokens)
        out, self.cache = self.programs.verify(self.weights, self.cache, rows, limits, settings, index)
        details = (
            jax.device_get(self.programs.describe(wanted, out.tokens, out.logits, settings)) if any(wanted) else None
        )
        sampled, accepted, drafts = jax.device_get((out.tokens, out.accepted, out.drafts))
        self._keep_experts(ready, out.experts, accepted + 1)
        for row, request in enumerate(ready):
            if request:
                request.drafts = drafts[row].tolist()
                self._counts["drafted_tokens"] += int(counts[row]) - 1
                self._counts["accepted_tokens"] += int(accepted[row])
                own = details or Sampled(sampled)
                own = Sampled(*(None if array is None else array[row, : accepted[row] + 1] for array in own))
                progress.append(self._accept(request, own))

    def _accept_all(self, requests: list[Request | None], logits: jax.Array, progress: list[RequestProgress]) -> None:
        """Sample after the rows of some requests, None for those that idle."""
        settings, index, wanted = settings_of(requests, self.config.kept_tokens)
        out = jax.device_get(self.programs.sample(wanted, logits, settings, index, adjustments(requests)))
        for row, request in enumerate(requests):
            if request:
                own = Sampled(*(None if array is None else array[row : row + 1] for array in out))
                progress.append(self._accept(request, own))

    def _keep_experts(self, requests: list[Request | None], experts: jax.Array | None, counts: Sequence[int]) -> None:
        """Append the routers' choices of new tokens to requests, if the engine returns them."""
        if experts is not None:
            experts = jax.device_get(experts)
            for row, request in enumerate(requests):
                if request:
                    request.experts.append(experts[row, : counts[row]].copy())

    def rows(self, requests, tokens, starts, counts, ahead: int = 0) -> Rows:
        """Return a step's rows, with page tables as wide as the longest needs, and for `ahead` more positions."""
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
        """Return the pages in the tables of a step that reaches so many positions."""
        return min(bucket(-(-positions // self.page_size), LEAST_PAGES), self.table_width)

    def _accept(self, request: Request, sampled: Sampled) -> RequestProgress:
        """Append the sampled tokens [T] to a request, up to its end."""
        params, finish, count = request.params, None, 0
        for token in sampled.tokens.tolist():
            if token in params.end_ids:
                finish, count = "stop", count + params.keep_end
                break
            count += 1
            if request.length + count >= self._limit(request):
                finish = "length"
                break
        new = sampled.tokens[:count].tolist()
        logprobs = token_logprobs(sampled, count, params.logprobs)
        if params.drawn_logprobs:
            request.drawn_logprobs += sampled.drawn[:count].tolist()
        if self.config.kept_tokens:
            request.kept += [kept_tokens(bits, self.vocab_size) for bits in sampled.kept[:count]]
        request.tokens += new
        request.logprobs += logprobs
        self._counts["generated_tokens"] += len(new)
        if finish:
            self._end(request, finish)
        return RequestProgress(request, new, logprobs, finish)

    def _limit(self, request: Request) -> int:
        """Tokens that a request may have, its prompt's included."""
        return min(len(request.prompt) + request.params.max_tokens, self.max_length)

    def _end(self, request: Request, why: str) -> RequestProgress:
        """Finish a request and free what it holds."""
        request.finish = why
        if request.slot >= 0:
            self._release_slot(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        group = request.group
        if group and group.leader is request and not group.ready:  # those beside it wait again, for another to lead
            beside = [member for member in group.members if member.slot >= 0 and member.finish is None]
            for member in beside:
                self._release_slot(member)
                member.slot = -1
            self.waiting.extendleft(reversed(beside))
            self._pool(request.slot).give_back(group.pages)
            group.leader, group.pages = None, []
        elif group:
            self._release(group)
        return RequestProgress(request, [], [], why)

    def _release_slot(self, request: Request) -> None:
        """Release a request's slot and pages."""
        self._pool(request.slot).give_back(request.pages)
        self.running[request.slot], request.pages = None, []
