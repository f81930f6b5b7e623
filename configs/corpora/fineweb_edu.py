"""FineWeb-Edu: web pages in English that a classifier finds educational, from all crawls of Common Crawl since 2013.

Size:      1.3 trillion tokens in the card's count; Parquet, sorted by crawl.
License:   ODC-By 1.0, and Common Crawl's terms of use.
Citation:  Penedo et al. 2024, The FineWeb Datasets (arXiv:2406.17557; doi:10.57967/hf/2497).
Where:     huggingface.co/datasets/HuggingFaceFW/fineweb-edu, open to all. Needs pip install 'opendeep-jax[remote]'.
Command:   opendeep data prepare --config=corpora/fineweb_edu
           A sample of 10B tokens of it:
           --data.sources.0.path='hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet'

Documents are already filtered and deduplicated within each crawl, not between crawls. The model here is the smallest
that runs: take FINEWEB_EDU into your own recipe.
"""

from opendeep_jax.config.schema import DataConfig, RunConfig, SourceConfig

FINEWEB_EDU = SourceConfig(
    name="fineweb_edu",
    path="hf://datasets/HuggingFaceFW/fineweb-edu/data/*/*.parquet",
    license="ODC-By-1.0",
    citation="Penedo et al. 2024, The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale, "
    "arXiv:2406.17557",
    text_field="text",
    id_field="id",
    url_field="url",
)


def get_config() -> RunConfig:
    """FineWeb-Edu alone."""
    return RunConfig(name="fineweb_edu", data=DataConfig(sources=(FINEWEB_EDU,), held_out_fraction=0.001))
