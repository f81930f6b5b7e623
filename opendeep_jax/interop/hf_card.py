"""The model card: the README.md of a Hugging Face directory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opendeep_jax.config.schema import ModelConfig
from opendeep_jax.interop.hf_front import HUB_NAME, front_matter, license_fields
from opendeep_jax.models.accounting import ParameterCount

CARD = """{front}
# {title}

A language model in the `{architecture}` format, written by OpenDeep.

| | |
| --- | --- |
{rows}
{sections}
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


@dataclass(frozen=True)
class Provenance:
    """Provenance of a model, as far as it is known, for its card."""

    name: str = "Model"
    """Title of the card."""
    license: str = ""
    """License by the Hub's name, `apache-2.0`, or otherwise; empty if unknown."""
    base_model: str = ""
    """The model that its training began with; ORGANIZATION/NAME where it is the Hub's."""
    lineage: tuple[str, ...] = ()
    """Steps that made the model, one per line, the oldest first."""
    sources: tuple[dict[str, str], ...] = ()
    """The text it was trained on: `name`, `share`, `license`, and `dataset` where the Hub has it."""
    languages: tuple[str, ...] = ()
    """ISO codes."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Facts of the training by name."""

    def front(self) -> str:
        """Return the card's front matter."""
        datasets = dict.fromkeys(source["dataset"] for source in self.sources if source.get("dataset"))
        return front_matter(
            {
                "library_name": "transformers",
                "pipeline_tag": "text-generation",
                **license_fields(self.license),
                "base_model": self.base_model if HUB_NAME.fullmatch(self.base_model) else "",
                "datasets": list(datasets),
                "language": self.languages,
                "tags": ["opendeep"],
            }
        )

    def sections(self) -> str:
        """Return what the card says of license, lineage, text and training, in Markdown."""
        stated = self.license or "Not stated: ask whoever has published the model before you use or pass it on."
        parts = [f"\n## License\n\n{cell(stated)}\n"]
        if self.base_model or self.lineage:
            lines = self.lineage or (f"Trained from {self.base_model}.",)
            parts.append("\n## Lineage\n\n" + "".join(f"- {cell(line)}\n" for line in lines))
        if self.sources:
            rows = [f"| {' | '.join(cell(s.get(k, '')) for k in ('name', 'share', 'license'))} |" for s in self.sources]
            table = "\n".join(["| source | share | license |", "| --- | --- | --- |", *rows])
            parts.append(f"\n## Training data\n\n{table}\n")
        if self.training:
            parts.append("\n## Training\n\n| | |\n| --- | --- |\n" + _rows(self.training) + "\n")
        return "".join(parts)


def model_card(
    config: ModelConfig,
    architecture: str,
    parameters: ParameterCount,
    provenance: Provenance | None = None,
) -> str:
    """Return a model card in Markdown: what the model is, how it was trained, how to load it.

    Args:
        architecture: The class of transformers that it loads into, such as "LlamaForCausalLM".
        parameters: How many parameters it has.
        provenance: Where it comes from; None leaves license, lineage, data and training out.
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
    sections = provenance.sections() if provenance else ""
    provenance = provenance or Provenance()
    title = cell(provenance.name)
    front = provenance.front()
    return CARD.format(front=front, title=title, architecture=architecture, rows=_rows(facts), sections=sections)


def cell(value: Any) -> str:
    """Return a value as one line of Markdown that stays in its cell: line breaks and bars would end it."""
    return " ".join(str(value).replace("|", "\\|").split())


def _rows(facts: Mapping[str, Any]) -> str:
    """Rows of a table."""
    return "\n".join(f"| {cell(name)} | {cell(value)} |" for name, value in facts.items())
