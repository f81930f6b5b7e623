"""A tiny model that reads bytes, as a directory and as an engine, and tasks in files."""

import dataclasses
import json
from pathlib import Path

import pytest

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EXAMPLES = [
    {"question": "The sky is", "choices": ["blue", "made of cheese"], "answer": 0},
    {"question": "Grass is", "choices": ["on fire", "green"], "answer": 1},
    {"question": "Snow is", "choices": ["white", "a loud song"], "answer": 0},
]
CHOOSE = """\
task: colors
dataset_path: json
dataset_kwargs:
  data_files: {{test: {examples}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
WRITE = """\
task: colors_written
dataset_path: json
dataset_kwargs:
  data_files: {{test: {examples}}}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 5, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""


@pytest.fixture(scope="session")
def tiny():
    """A random model of 64 positions, and the tokenizer of bytes."""
    from small_models import DENSE, random_model

    from opendeep_jax.config.schema import RopeConfig
    from opendeep_jax.text.files import byte_tokenizer

    attention = dataclasses.replace(DENSE.attention, rope=RopeConfig(interleaved=False))
    config = dataclasses.replace(DENSE, vocab_size=272, context_length=64, norm_epsilon=1e-5, attention=attention)
    model = random_model(config)
    return model, dataclasses.replace(byte_tokenizer(), chat_template=CHAT)


@pytest.fixture(scope="session")
def engine(tiny):
    from opendeep_jax.generation.engine import Engine, EngineConfig

    model, tokenizer = tiny
    return Engine(model, EngineConfig(slots=2, page_size=16, prefill_tokens=32, vocab_size=tokenizer.vocab_size))


@pytest.fixture(scope="session")
def tiny_directory(tiny, tmp_path_factory) -> Path:
    """`tiny` as a Hugging Face directory."""
    from opendeep_jax.interop import save_hf
    from opendeep_jax.text.files import save_tokenizer

    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_hf(tiny[0], directory)
    save_tokenizer(tiny[1], directory)
    return directory


@pytest.fixture
def task_directory(tmp_path) -> Path:
    """Two tasks on three examples: `colors` and `colors_written`."""
    directory = tmp_path / "tasks"
    directory.mkdir()
    examples = directory / "examples.jsonl"
    examples.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES), "utf-8")
    for name, text in {"choose": CHOOSE, "write": WRITE}.items():
        yaml = text.format(examples=examples, cache=tmp_path / "cache")
        (directory / f"{name}.yaml").write_text(yaml, "utf-8")
    return directory
