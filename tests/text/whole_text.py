"""A whole text's thinking and answer, as the streams tell them."""

from opendeep_jax.text.harmony import HarmonyStream
from opendeep_jax.text.stream import HARMONY, THINK, ThinkingMarks, ThinkingStream


def split_thinking(text: str, opened: bool = False, marks: ThinkingMarks = THINK) -> tuple[str, str]:
    """Thinking and answer; tool calls are given as their arguments, in the answer."""
    if marks is HARMONY:
        stream = HarmonyStream("<|start|>assistant" + HARMONY.opening if opened else "")
    else:
        stream = ThinkingStream(opened, marks)
    parts = stream.push(text), stream.finish()
    answers = (part.answer + "".join(call.arguments for call in part.calls) for part in parts)
    return "".join(part.thinking for part in parts), "".join(answers)
