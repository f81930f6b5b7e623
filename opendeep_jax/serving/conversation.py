"""A conversation with an engine in this very thread."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.answers import Answer, Piece, answer_all
from opendeep_jax.generation.requests import SamplingParams
from opendeep_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from opendeep_jax.generation.engine import Engine


@dataclasses.dataclass
class Conversation:
    """Messages so far, and the settings of the next answer."""

    engine: "Engine"
    tokenizer: Tokenizer
    params: SamplingParams
    """Sampling parameters; the other fields are set for each answer."""
    max_tokens: int = 0
    """Longest answer; 0 takes all that the context leaves."""
    system: str = ""
    """The instruction that every conversation begins with; none if empty."""
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def ask(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[Piece]:
        """Ask, and yield the answer piece by piece; then add both to the conversation.

        Each answer has the seed after that of the one before it.

        Args:
            text: The question.
            stopped: Asked between steps; once true the answer ends where it is, and stays in the conversation.

        Raises:
            ConfigError: the conversation is too long for the model, or its template refuses it; the question is then
                not part of it.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        rendered = self.tokenizer.apply_chat([*system, *asked])
        prompt = self.tokenizer.encode(rendered, special=True)
        room = self.engine.max_length - len(prompt)
        if room < 1:
            raise ConfigError(
                f"the conversation has {len(prompt):,} tokens, and the model's context is {self.engine.max_length:,}. "
                "Begin a new one, or raise --max_length if the model allows it."
            )
        most = min(self.max_tokens or room, room)
        self.params = dataclasses.replace(self.params, seed=(self.params.seed + 1) % 2**32)
        settings = dataclasses.replace(self.params, max_tokens=most, end_ids=self.tokenizer.end_ids)
        answer = Answer(self.tokenizer, [], rendered)
        request = self.engine.submit(prompt, settings)
        try:
            for _, piece in answer_all(self.engine, [request], [answer], stopped):
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": answer.whole.text}]
