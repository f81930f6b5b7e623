"""Wikipedia: the articles of one language's Wikipedia, without markup, tables and references.

Size:      not counted here; Parquet, one directory for each language.
License:   CC-BY-SA-3.0 and GFDL.
Citation:  Wikimedia Foundation, Wikimedia Downloads (https://dumps.wikimedia.org).
Where:     huggingface.co/datasets/wikimedia/wikipedia, open to all. Needs pip install 'opendeep-jax[remote]'.
Command:   opendeep data prepare --config=corpora/wikipedia
           Another language: --data.sources.0.path='hf://datasets/wikimedia/wikipedia/20231101.fr/*.parquet'

The dump is that of 1 November 2023. The model here is the smallest that runs: take WIKIPEDIA into your own recipe.
"""

from opendeep_jax.config.schema import DataConfig, RunConfig, SourceConfig

WIKIPEDIA = SourceConfig(
    name="wikipedia",
    path="hf://datasets/wikimedia/wikipedia/20231101.en/*.parquet",
    license="CC-BY-SA-3.0 AND GFDL-1.3-or-later",
    citation="Wikimedia Foundation, Wikimedia Downloads, https://dumps.wikimedia.org",
    text_field="text",
    id_field="id",
    url_field="url",
)


def get_config() -> RunConfig:
    """English Wikipedia alone."""
    return RunConfig(name="wikipedia", data=DataConfig(sources=(WIKIPEDIA,), held_out_fraction=0.005))
