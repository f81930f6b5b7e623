"""Proof-Pile-2: mathematics in papers, web pages and code. What Llemma was trained on.

Size:      55 billion tokens in the card's count (29B arXiv, 15B OpenWebMath, 11B AlgebraicStack); JSON lines in .zst.
License:   the card states none for the whole. arXiv's papers have each their own, OpenWebMath is ODC-By 1.0, and
           AlgebraicStack is code from The Stack (permissive licenses) and from proof assistants' libraries.
Citation:  Azerbayev et al. 2023, Llemma (arXiv:2310.10631).
Where:     huggingface.co/datasets/EleutherAI/proof-pile-2, open to all. Needs pip install 'opendeep-jax[remote]'.
Command:   opendeep data prepare --config=corpora/proof_pile_2

Its files have splits for validation and test: only those for training are read. It contains OpenWebMath: do not mix
it with corpora/open_web_math. Weights are the subsets' tokens. The model here is the smallest that runs: take
PROOF_PILE_2 into your own recipe.
"""

from opendeep_jax.config.schema import DataConfig, RunConfig, SourceConfig

CITATION = "Azerbayev et al. 2023, Llemma: An Open Language Model For Mathematics, arXiv:2310.10631"

PROOF_PILE_2_ARXIV = SourceConfig(
    name="proof_pile_2_arxiv",
    path="hf://datasets/EleutherAI/proof-pile-2/arxiv/train/*.jsonl.zst",
    weight=29.0,
    license="each paper's own",
    citation=CITATION,
    text_field="text",
    url_field="meta.url",
)

PROOF_PILE_2_WEB = SourceConfig(
    name="proof_pile_2_web",
    path="hf://datasets/EleutherAI/proof-pile-2/open-web-math/train/*.jsonl.zst",
    weight=15.0,
    license="ODC-By-1.0",
    citation=CITATION,
    text_field="text",
    url_field="meta.url",
)

PROOF_PILE_2_CODE = SourceConfig(
    name="proof_pile_2_code",
    path="hf://datasets/EleutherAI/proof-pile-2/algebraic-stack/train/*.jsonl.zst",
    weight=11.0,
    license="each file's own",
    citation=CITATION,
    text_field="text",
)

PROOF_PILE_2 = (PROOF_PILE_2_ARXIV, PROOF_PILE_2_WEB, PROOF_PILE_2_CODE)


def get_config() -> RunConfig:
    """The three subsets of Proof-Pile-2, each in proportion to its tokens."""
    return RunConfig(name="proof_pile_2", data=DataConfig(sources=PROOF_PILE_2, held_out_fraction=0.005))
