"""OpenWebMath: mathematical web pages of Common Crawl, with their LaTeX kept.

Size:      14.7 billion tokens in 6.3 million documents in the card's count; Parquet.
License:   ODC-By 1.0, and Common Crawl's terms of use.
Citation:  Paster et al. 2023, OpenWebMath (arXiv:2310.06786).
Where:     huggingface.co/datasets/open-web-math/open-web-math, open to all. Needs pip install 'opendeep-jax[remote]'.
Command:   opendeep data prepare --config=corpora/open_web_math

A document's id is its address. The model here is the smallest that runs: take OPEN_WEB_MATH into your own recipe.
"""

from opendeep_jax.config.schema import DataConfig, RunConfig, SourceConfig

OPEN_WEB_MATH = SourceConfig(
    name="open_web_math",
    path="hf://datasets/open-web-math/open-web-math/data/*.parquet",
    license="ODC-By-1.0",
    citation="Paster et al. 2023, OpenWebMath: An Open Dataset of High-Quality Mathematical Web Text, arXiv:2310.06786",
    text_field="text",
    id_field="url",
    url_field="url",
)


def get_config() -> RunConfig:
    """OpenWebMath alone."""
    return RunConfig(name="open_web_math", data=DataConfig(sources=(OPEN_WEB_MATH,), held_out_fraction=0.005))
