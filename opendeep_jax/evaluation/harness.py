"""lm-evaluation-harness with our engine as its model.

The harness makes a task's prompts and metrics; here prompts become token ids, and what the engine says becomes answers.
"""

import contextlib
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.load import did_you_mean
from opendeep_jax.display.progress import progress_bar
from opendeep_jax.evaluation.windows import windows
from opendeep_jax.generation.answers import Answer, answer_all
from opendeep_jax.generation.engine import Engine
from opendeep_jax.generation.requests import SamplingParams
from opendeep_jax.generation.scoring import Scored, score
from opendeep_jax.text.tokenizer import Tokenizer

try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
except ImportError as missing:
    raise ConfigError(
        f"--tasks needs lm-evaluation-harness, and {missing.name} is not installed. Install it: "
        "pip install 'opendeep-jax[eval]'."
    ) from missing

DEFAULT_TOKENS = 256
"""Longest answer where the task names none, as the harness' own models have it."""
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "num_return_sequences": 1}
"""Settings of other generators at the values that change nothing."""
BOOTSTRAP_DRAWS = 1000


class HarnessModel(LM):
    """A model for the harness.

    Args:
        engine: With no request running.
        tokenizer: The model's.
        name: The model's, in results.
        chat: Prompts come out of the chat template, so that the names of special tokens in them are those tokens.
        seed: Of sampled answers; each has one of its own that depends on its prompt alone.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str, chat: bool = False, seed: int = 0):
        super().__init__()
        self.engine, self._tokenizer, self.name, self.chat, self.seed = engine, tokenizer, name, chat, seed
        self.cut_prompts = 0
        """Prompts that were longer than the model's length and lost their beginning."""

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the greedy one) of each request's continuation after its context."""
        pairs = [self._pair(*request.args) for request in requests]
        longest = max((len(after) for _, after in pairs), default=0)
        if longest >= self.engine.max_length:
            raise ConfigError(
                f"A text of {longest} tokens is to be scored as one, and the model reads {self.engine.max_length}. "
                "Give a greater --max_length, if the model has it, or another task."
            )
        self.cut_prompts += sum(len(before) + len(after) > self.engine.max_length for before, after in pairs)
        texts = [((*before, *after)[-self.engine.max_length :], len(after)) for before, after in pairs]
        scored = self._score([(text, len(text) - count) for text, count in texts], "log-likelihoods")
        return [(sum(one.logprobs), all(one.greedy)) for one in scored]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each request's whole text, read in windows that do not overlap."""
        length, pieces, owner = self.engine.max_length, [], []
        for index, request in enumerate(requests):
            tokens = [self._prefix(), *self._encode(request.args[0])]
            for window in windows(tokens, length, length - 1):
                pieces.append((tuple(window.tokens), window.first))
                owner.append(index)
        totals = [0.0] * len(requests)
        for index, one in zip(owner, self._score(pieces, "texts"), strict=True):
            totals[index] += sum(one.logprobs)
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Generate each request's continuation, up to one of its stop strings; of a chat the answer alone,
        without the thinking before it."""
        asked = [request.args for request in requests]
        settings = [_settings(arguments, self.engine.max_length) for _, arguments in asked]
        running, answers = [], []
        seen: Counter[str] = Counter()
        for (context, _), (stop, params) in zip(asked, settings, strict=True):
            tokens = self._prompt(context) or [self._prefix()]
            room = self.engine.max_length - params["max_tokens"]
            self.cut_prompts += len(tokens) > room
            seed = _seed(self.seed, context, seen[context])
            seen[context] += 1
            sampling = SamplingParams(**params, seed=seed, end_ids=self._tokenizer.end_ids)
            told = {"conversation": context} if self.chat else {"before": tokens}
            answers.append(Answer(self._tokenizer, stop, **told))
            running.append(self.engine.submit(tokens[-room:], sampling))
        texts = [""] * len(requests)
        with progress_bar("answers", len(requests), unit="pieces", transient=True) as advance:
            for place, piece in answer_all(self.engine, running, answers):
                # Of a tool call its arguments.
                texts[place] += piece.text + "".join(call["function"]["arguments"] for call in piece.calls)
                advance(bool(piece.finish))
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without a generation prompt it ends where its last message does."""
        text = self._tokenizer.apply_chat(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()  # templates strip too
        return text[: text.rindex(last) + len(last)]

    @property
    def tokenizer_name(self) -> str:
        """Key of cached prompts."""
        return self.name

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The model's template; empty where it has none or none is asked for."""
        return (self._tokenizer.chat_template or "") if chat_template else ""

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, special=self.chat)

    def _prompt(self, text: str) -> list[int]:
        """Ids of a context; the template writes a begin token itself."""
        return self._encode(text) if self.chat else self._tokenizer.encode_prompt(text)

    def _prefix(self) -> int:
        """Return the prefix of a text without a context."""
        known = (self._tokenizer.begin_id, *self._tokenizer.end_ids)
        found = next((token for token in known if token is not None), None)
        if found is None:
            raise ConfigError(
                "The task scores texts from their first token on, and the tokenizer has no token that begins or ends "
                "texts. Put its name into tokenizer_config.json, as bos_token or eos_token."
            )
        return found

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of what follows it, cut apart where the context's own ids end."""
        spaces = len(context) - len(context.rstrip())
        if spaces:  # a space belongs to the word behind it
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not context:
            return [self._prefix()], self._encode(continuation)
        before, whole = self._prompt(context), self._prompt(context + continuation)
        after = whole[len(before) :] or self._encode(continuation)  # where the two melt into fewer ids
        return before, after

    def _score(self, texts: list[tuple[tuple[int, ...], int]], what: str) -> list[Scored]:
        """`scoring.score`, each different text once, those of one length together."""
        distinct = sorted(set(texts), key=lambda one: (-len(one[0]), one))
        known: dict[tuple[tuple[int, ...], int], Scored] = {}
        with progress_bar(what, len(distinct), unit="pieces", transient=True) as advance:
            for begin in range(0, len(distinct), self.engine.shards):
                batch = distinct[begin : begin + self.engine.shards]
                scorable = [one for one in batch if one[1] < len(one[0])]  # an empty continuation is certain
                found = score(self.engine, [text for text, _ in scorable], [first for _, first in scorable])
                known |= dict.fromkeys(batch, Scored([], [])) | dict(zip(scorable, found, strict=True))
                advance(len(batch))
        return [known[one] for one in texts]


def _settings(given: dict[str, Any], max_length: int) -> tuple[list[str], dict[str, Any]]:
    """Stop strings, and the fields of SamplingParams, that a task's generation settings mean."""
    rest = dict(given)
    stop = rest.pop("until", None) or []
    lengths = [rest.pop(name, None) for name in LENGTH_NAMES]
    tokens = int(next((length for length in lengths if length is not None), DEFAULT_TOKENS))
    temperature = float(rest.pop("temperature", None) or 0.0)
    if not rest.pop("do_sample", temperature > 0):
        temperature = 0.0
    params = {name: rest.pop(name) for name in ("top_k", "top_p", "min_p") if name in rest}
    unsupported = sorted(name for name, value in rest.items() if value is not None and NEUTRAL.get(name) != value)
    if unsupported:
        raise ConfigError(
            f"The task generates with {', '.join(f'{name}={rest[name]!r}' for name in unsupported)}, which the engine "
            "does not know. Make a copy of the task without, and give its directory with --include_path."
        )
    if not 1 <= tokens < max_length:
        raise ConfigError(
            f"The task's answers may have {tokens} tokens, and prompt and answer together {max_length}. Give a smaller "
            "--max_tokens, or a greater --max_length."
        )
    return [stop] if isinstance(stop, str) else list(stop), params | {"temperature": temperature, "max_tokens": tokens}


def _seed(seed: int, context: str, repeat: int) -> int:
    """Return a request's seed, independent of the other requests."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{repeat}:{context}".encode()).digest()[:4], "big")


class Tasks(TaskManager):
    """The harness' tasks, with failures that a user can mend as ConfigErrors."""

    def load(self, task_list: list[str]) -> Any:
        """Load tasks. Raises ConfigError for a task without its data, or one that runs what a model writes."""
        try:
            loaded = super().load(task_list)
        except Exception as error:  # datasets, YAML and the network fail in a hundred ways
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"--tasks={','.join(task_list)}: cannot be loaded ({type(error).__name__}: {reason}). Check the task's "
                "YAML, and the network or the files that it names."
            ) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                why = "runs what the model writes" if getattr(task, "UNSAFE_CODE", False) else "shows the model images"
                raise ConfigError(f"--tasks={name}: {why}, which is not done here. Leave it out.")
        return loaded


def find_tasks(names: Sequence[str], include_path: str = "") -> tuple[Tasks, list[str]]:
    """Find the tasks of names, groups, tags and patterns such as `mmlu_*`, those under include_path first.

    Raises ConfigError for a name that is none.
    """
    if include_path and not Path(include_path).is_dir():
        raise ConfigError(f"--include_path={include_path}: is no directory. Give one with a task's .yaml in it.")
    if include_path:  # reading the harness' thousands of tasks takes seconds
        own = Tasks(include_path=include_path, include_defaults=False)
        if all(own.match_tasks([name]) for name in names):
            return own, own.match_tasks(list(names))
    tasks = Tasks(include_path=include_path or None)
    for name in names:
        if not tasks.match_tasks([name]):
            hint = did_you_mean(name, tasks.all_tasks)
            raise ConfigError(
                f"--tasks={name}: there is no such task.{hint} `lm-eval ls tasks` lists the harness' own; others are "
                "found in --include_path=DIRECTORY."
            )
    return tasks, tasks.match_tasks(list(names))


def run_tasks(
    model: HarnessModel,
    tasks: Tasks,
    names: Sequence[str],
    limit: int = 0,
    num_fewshot: int = -1,
    max_tokens: int = 0,
) -> dict[str, Any]:
    """Run tasks in the harness and return its results (`results`, `samples`, `n-samples`, `configs`, ...).

    Args:
        tasks: Those there are, and
        names: which of them to run, as `find_tasks` gives both.
        limit: Examples of each task; 0 takes all.
        num_fewshot: Solved examples in each prompt; -1 as the task says.
        max_tokens: Longest answer; 0 as the task says.

    Raises:
        ConfigError: A task whose data cannot be had, or that asks for what the engine cannot do.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap forks, which JAX's threads do not survive
    with contextlib.redirect_stdout(sys.stderr):  # it tells what it is doing; results alone go to standard output
        return lm_eval.simple_evaluate(
            model,
            tasks=list(names),
            task_manager=tasks,
            limit=limit or None,
            num_fewshot=None if num_fewshot < 0 else num_fewshot,
            gen_kwargs={"max_gen_toks": max_tokens} if max_tokens else None,
            apply_chat_template=model.chat,
            random_seed=model.seed,
            numpy_random_seed=model.seed,
            torch_random_seed=model.seed,
            fewshot_random_seed=model.seed,
            bootstrap_iters=BOOTSTRAP_DRAWS,
        )
