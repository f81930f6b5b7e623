"""DCLM-baseline: Common Crawl through RefinedWeb's heuristics, Bloom-filter deduplication and a fastText classifier.

Size:      4 trillion tokens in 3 billion documents in the authors' count; JSON lines in .zst, 10 x 10 directories.
License:   CC-BY-4.0, and Common Crawl's terms of use.
Citation:  Li et al. 2024, DataComp-LM (arXiv:2406.11794).
Where:     huggingface.co/datasets/mlfoundations/dclm-baseline-1.0, open to all. Needs
           pip install 'opendeep-jax[remote]'.
Command:   opendeep data prepare --config=corpora/dclm_baseline
           A hundredth of it, which is itself a random sample:
           --data.sources.0.path='hf://datasets/mlfoundations/dclm-baseline-1.0/global-shard_01_of_10/local-shard_0_of_10'

A document's id is the WARC record that the page was taken from, so it can be found again in Common Crawl. The model
here is the smallest that runs: take DCLM_BASELINE into your own recipe.
"""

from opendeep_jax.config.schema import DataConfig, RunConfig, SourceConfig

DCLM_BASELINE = SourceConfig(
    name="dclm_baseline",
    path="hf://datasets/mlfoundations/dclm-baseline-1.0/global-shard_*_of_10/local-shard_*_of_10/*.jsonl.zst",
    license="CC-BY-4.0",
    citation="Li et al. 2024, DataComp-LM: In search of the next generation of training sets for language models, "
    "arXiv:2406.11794",
    text_field="text",
    id_field="metadata.WARC-Record-ID",
    url_field="url",
)


def get_config() -> RunConfig:
    """DCLM-baseline alone."""
    return RunConfig(name="dclm_baseline", data=DataConfig(sources=(DCLM_BASELINE,), held_out_fraction=0.001))
