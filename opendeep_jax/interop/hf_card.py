"""The model card: the README.md of a Hugging Face directory."""

from collections.abc import Mapping
from typing import Any

from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.models.accounting import ParameterCount

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- opendeep
---

# {title}

A language model in the `{architecture}` format, written by OpenDeep.

| | |
| --- | --- |
{rows}
{training}
## Use

With transformers, from this directory:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
print(tokenizer.decode(model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=50)[0]))
```

With vLLM: `vllm serve .`

With llama.cpp: `python convert_hf_to_gguf.py . --outfile model.gguf`, then `llama-cli -m model.gguf`

With OpenDeep: `opendeep_jax.interop.load_hf(".")`
"""


def model_card(
    config: ModelConfig,
    architecture: str,
    parameters: ParameterCount,
    training: Mapping[str, Any] | None = None,
    title: str = "Model",
) -> str:
    """A model card in Markdown: what the model is, how it was trained, how to load it.

    Args:
        architecture: The class of transformers that it loads into, such as "LlamaForCausalLM".
        parameters: How many parameters it has.
        training: Settings of the training run by name; None leaves the section out.
        title: The heading.
    """
    attention, moe = config.attention, config.moe
    facts: dict[str, Any] = {"parameters": f"{parameters.total:,}"}
    if moe.num_experts:
        facts |= {
            "parameters active for a token": f"{parameters.active:,}",
            "experts": f"{moe.num_experts} in each of {config.num_moe_layers} layers, "
            f"{moe.experts_per_token} for a token, {moe.num_shared_experts} shared",
        }
    if attention.kind == "mla":
        heads = f"multi-head latent, {attention.num_heads} heads, a latent of {attention.kv_lora_rank}"
    else:
        heads = f"grouped-query, {attention.num_heads} heads, {attention.num_kv_heads} for keys and values"
    facts |= {"layers": config.num_layers, "width": config.hidden_size, "attention": heads}
    if attention.sliding_layers:
        facts["sliding window"] = f"{attention.window} tokens in {len(attention.sliding_layers)} layers"
    facts |= {"vocabulary": config.vocab_size, "context": f"{config.max_length} tokens"}
    section = ""
    if training:
        section = "\n## Training\n\n| | |\n| --- | --- |\n" + _rows(training) + "\n"
    return CARD.format(title=title, architecture=architecture, rows=_rows(facts), training=section)


def _rows(facts: Mapping[str, Any]) -> str:
    """Rows of a table; a value's line breaks and bars would end its cell."""

    def cell(value: Any) -> str:
        return " ".join(str(value).replace("|", "\\|").split())

    return "\n".join(f"| {cell(name)} | {cell(value)} |" for name, value in facts.items())
