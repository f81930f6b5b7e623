"""Dolma 3 Mix (6T): what OLMo 3 was pretrained on. Web pages, science PDFs, code, mathematics, arXiv, Wikipedia.

Size:      5.93 trillion tokens in 3.87 billion documents in the authors' count; JSON lines in .zst, one directory
           for each source and topic.
License:   ODC-By 1.0; code has its own licenses, kept with each document.
Citation:  Olmo Team 2025, Olmo 3 (arXiv:2512.13961).
Where:     huggingface.co/datasets/allenai/dolma3_mix-6T, open to all. Needs pip install 'opendeep-jax[remote]'.
Command:   opendeep data prepare --config=corpora/dolma3_mix
           One of its directories, English Wikipedia:
           --data.sources.0.path='hf://datasets/allenai/dolma3_mix-6T/data/dolma1_7-wiki-en/*.jsonl.zst'

The mix repeats documents on purpose: those of high quality stand several times in a file, under the same id. Exact
deduplication (--data.curation.exact_deduplication=True) would undo that. Do not take dolma3_mix-6T-1025-7B instead
unless to reproduce OLMo 3 7B: some of its texts have since been replaced by [REMOVED]. The model here is the smallest
that runs: take DOLMA3_MIX into your own recipe.
"""

from opendeep_jax.config.schema import DataConfig, RunConfig, SourceConfig

DOLMA3_MIX = SourceConfig(
    name="dolma3_mix",
    path="hf://datasets/allenai/dolma3_mix-6T/data/*/*.jsonl.zst",
    license="ODC-By-1.0",
    citation="Olmo Team 2025, Olmo 3, arXiv:2512.13961",
    text_field="text",
    id_field="id",
    url_field="metadata.warc_url",  # web pages only
    license_field="metadata.detected_licenses",  # code only
)


def get_config() -> RunConfig:
    """Dolma 3 Mix alone."""
    return RunConfig(name="dolma3_mix", data=DataConfig(sources=(DOLMA3_MIX,), held_out_fraction=0.001))
