"""The Stack v2: source code of Software Heritage in over 600 languages, near-deduplicated; here, permissive licenses.

Size:      32.1 TB with every license type in the card's count, before `keep`; Parquet, one directory a language.
License:   each file's own, as detected and kept with each document; records of type `no_license` are left out.
Citation:  Lozhkov et al. 2024, StarCoder 2 and The Stack v2 (arXiv:2402.19173).
Where:     huggingface.co/datasets/bigcode/the-stack-v2-dedup: accept its terms there, then `hf auth login`. In bulk
           it needs an agreement with Software Heritage and Inria (datasets@softwareheritage.org), who ask for
           keeping to their principles for language models. Needs pip install 'opendeep-jax[remote]'.
Command:   FSSPEC_S3='{"anon": true}' opendeep data prepare --config=corpora/the_stack_v2
           One language of it:
           --data.sources.0.path='hf://datasets/bigcode/the-stack-v2-dedup/data/Python/*.parquet'

The records hold no text: it is fetched, file by file, from Software Heritage's bucket at S3, some tens at one time, so
run this near us-east-1. What cannot be decoded is left out and counted. The model here is the smallest that runs: take
THE_STACK_V2 into your own recipe, with data.fim_rate above zero.
"""

from opendeep_jax.config.schema import DataConfig, RunConfig, SourceConfig

THE_STACK_V2 = SourceConfig(
    name="the_stack_v2",
    path="hf://datasets/bigcode/the-stack-v2-dedup/data/*/*.parquet",
    license="permissive",
    citation="Lozhkov et al. 2024, StarCoder 2 and The Stack v2: The Next Generation, arXiv:2402.19173",
    id_field="blob_id",
    url_field="repo_name",
    license_field="detected_licenses",
    text_url="s3://softwareheritage/content/{blob_id}",
    keep=("license_type=permissive",),
    bad_documents="leave_out",
)


def get_config() -> RunConfig:
    """The permissive part of The Stack v2 alone, a tenth of its files in fill-in-the-middle order."""
    data = DataConfig(sources=(THE_STACK_V2,), held_out_fraction=0.001, fim_rate=0.1)
    return RunConfig(name="the_stack_v2", data=data)
