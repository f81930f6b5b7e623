"""The configuration of one run: a tree of frozen dataclasses that is complete, hashable and checked.

Nothing outside a `RunConfig` decides what a run computes. Every field can be set from the command line by its
dotted name (`--model.moe.experts_per_token=4`); its default and the text under it are what `--help` prints.
The rules that tie fields together live in `checks.py` and run whenever one of these objects is made.

This module imports nothing but the standard library, so a bad configuration is refused before JAX is even loaded.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from opendeep_jax.config import checks
from opendeep_jax.config.limits import AxisSize, Count, Fraction, FractionBelowOne, Natural, NonNegative, Positive, Seed
from opendeep_jax.config.model import (  # noqa: F401  # a recipe takes all from here
    AttentionConfig,
    DType,
    ExecutionConfig,
    MambaConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    RematConfig,
    RopeConfig,
)
from opendeep_jax.config.operations import CheckpointConfig, FaultsConfig, HardwareConfig, TrackingConfig


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents in the mixture."""

    name: str = "python_stdlib"
    """Name in logs and provenance. `python_stdlib` with an empty path is the embedded source."""
    path: str = ""
    """File, directory or glob of .parquet, .jsonl, .json, .csv, .tsv, .array_record, .txt, .md or .py files (those of
    text also .gz, .bz2, .xz, .zst), here or under gs://, s3://, hf:// and the like; `datasets:NAME?split=train` for a
    Hugging Face dataset; a directory that `opendeep data prepare` wrote; empty for the embedded source."""
    weight: NonNegative = 1.0
    """Share of training tokens drawn from this source, relative to the other weights."""
    license: str = ""
    """License of the documents, where they do not state their own; empty where it isn't known."""
    citation: str = ""
    """Paper or page to cite; kept in the manifest and the data card."""
    text_field: str = "text"
    """Field of a record that holds the text; dots reach into nested fields."""
    id_field: str = ""
    """Field that identifies a document; empty makes `file#number` its id."""
    url_field: str = ""
    """Field with the document's address; empty where there is none."""
    license_field: str = ""
    """Field with the document's own license; empty where `license` holds for all."""
    text_url: str = ""
    """URL of the text when records only point at it, as `s3://bucket/{blob_id}` with the record's fields."""
    keep: tuple[str, ...] = ()
    """Records to keep, as `field=value`, `!=`, or `score>=3` (also `<=`, `>`, `<`); all must hold. The others are
    counted as left out."""
    bad_documents: Literal["refuse", "leave_out"] = "refuse"
    """A record that is malformed, or whose text is null, empty or not UTF-8, stops everything with its place, or is
    left out and counted."""
    epochs: Positive = 1.0
    """Maximum number of passes over its text. A run that would need more is refused."""
    separator: str = ""
    """Separator of documents in a text file: `\\n` makes each line one, `\\n\\n` each paragraph; empty: each file."""
    encoding: str = ""
    """Encoding of files of text, lines and tables, such as `latin-1`; empty is UTF-8."""
    held_out_end: FractionBelowOne = 0.0
    """Share of each document, at its end, that is held out as a document of its own: for sources of few documents."""

    @property
    def known_license(self) -> str:
        """License for display: `by document` where a field has it, `unknown` where nobody states any."""
        return self.license or ("by document" if self.license_field else "unknown")


@dataclass(frozen=True)
class CurationConfig:
    """Processing of documents before tokenization. Removed documents are counted by source and reason."""

    quality: tuple[Literal["gopher_repetition", "gopher_quality", "c4", "fineweb"], ...] = ()
    """Heuristic filters, in this order, with their papers' thresholds."""
    languages: tuple[str, ...] = ()
    """Keep documents in these languages, such as `en`; empty keeps all."""
    language_model: str = ""
    """Language identifier: fastText's lid.176.bin (or another model with `__label__xx`)."""
    language_threshold: Fraction = 0.65
    """Least certainty of the language."""
    exact_deduplication: bool = False
    """Keep the first of documents with equal text, over all sources."""
    minhash_deduplication: bool = False
    """Keep the first of each cluster of near-duplicates, over all sources (MinHash with locality-sensitive hashing)."""
    minhash_ngram: Count = 5
    """Words in a shingle."""
    minhash_buckets: Count = 14
    """Bands of the signature; two documents that agree in one are near-duplicates."""
    minhash_hashes_per_bucket: Count = 8
    """Hashes in a band. 14 bands of 8 find half of the pairs with Jaccard similarity 0.70, and 0.92 of those at 0.8."""
    mask_personal_data: bool = False
    """Replace e-mail addresses and public IP addresses."""
    evaluation_sets: tuple[str, ...] = ()
    """Files (.jsonl, .parquet or .txt) of evaluation items; documents that share an n-gram with one are removed."""
    evaluation_ngram: Count = 13
    """Words in a run that a document must not share with an evaluation item."""

    @property
    def active(self) -> bool:
        """True if any curation is configured."""
        switches = self.exact_deduplication, self.minhash_deduplication, self.mask_personal_data
        return any((*switches, self.quality, self.languages, self.evaluation_sets))


@dataclass(frozen=True)
class DataPhase:
    """A stretch of training with its own mixture, row length, packing and batch."""

    name: str = "main"
    """Name in logs and provenance."""
    tokens: Natural = 0
    """Length in tokens, rounded up to whole steps; the last phase never ends."""
    weights: tuple[float, ...] = ()
    """Weight of each source of data.sources, 0 leaving it out; empty takes the sources' own."""
    sequence_length: Natural = 0
    """Tokens L in a row; 0 takes data.sequence_length."""
    packing: Literal["", "concatenate", "first_fit", "best_fit"] = ""
    """Empty takes data.packing."""
    batch_size: Natural = 0
    """Rows in a global batch; 0 takes train.batch_size."""


@dataclass(frozen=True)
class DataConfig:
    """Text to batches. A batch is a pure function of this configuration and the step."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(license="PSF-2.0"),)
    """Sources, mixed by weight."""
    tokenizer: str = "bpe:8192"
    """`bytes`, `bpe:SIZE` (byte-level BPE trained on the sources, cached by content hash), or a tokenizer.json path."""
    directory: str = "runs/data"
    """Directory of tokenizers, curated text, token stores and packing plans, shared by runs, named by hashes."""
    sequence_length: int = 512
    """Tokens L in a row."""
    packing: Literal["concatenate", "first_fit", "best_fit"] = "concatenate"
    """Documents laid end to end and cut into rows, or put whole into rows, the longest into the fullest (best_fit)."""
    phases: tuple[DataPhase, ...] = ()
    """Stretches of training that differ in mixture, length or batch; empty is one that never ends."""
    held_out_fraction: FractionBelowOne = 0.05
    """Share of documents kept from training, chosen by a hash of their id."""
    segment_mask: bool = True
    """Keep attention inside a document. The V3 report does not; we do by default."""
    fim_rate: Fraction = 0.0
    """Share of training documents put into fill-in-the-middle order: prefix, suffix, middle. V3: 0.1."""
    curation: CurationConfig = CurationConfig()
    """Processing of documents before tokenization."""
    workers: Natural = 0
    """Processes that curate and tokenize; 0 takes one for each core. Their number changes no output."""

    @property
    def longest_row(self) -> int:
        """Tokens in the longest row that is trained on."""
        rows = [phase.sequence_length or self.sequence_length for phase in self.phases]
        return max(rows, default=self.sequence_length)


@dataclass(frozen=True)
class Phase:
    """One stretch of a learning-rate schedule, as V3's report writes it. Ends `tokens` after the phase before."""

    shape: Literal["linear", "constant", "cosine"] = "constant"
    """Shape of the rate's curve from its previous value to `to`."""
    to: NonNegative = 1.0
    """Rate at the end, as a fraction of optimizer.learning_rate (a constant phase has it from its start)."""
    tokens: Natural = 0
    """Length of the phase in tokens; the last phase never ends."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    """AdamW for all weights, or Muon (Jordan et al. 2024) for hidden matrices and AdamW for the rest."""
    learning_rate: Positive = 3e-4
    """Peak learning rate; Muon's updates are scaled to AdamW's size and share it."""
    schedule: Literal["constant", "cosine", "wsd", "phases"] = "cosine"
    """After warm-up: constant, cosine to final_fraction, warmup-stable-decay, or the phases below."""
    warmup_steps: Natural = 100
    """Linear warm-up in equal stairs: the first step has 1 / warmup_steps of the peak."""
    decay_fraction: Fraction = 0.2
    """wsd: the last share of the run over which the rate falls linearly."""
    final_fraction: Fraction = 0.1
    """cosine and wsd: rate at the end, as a fraction of the peak."""
    phases: tuple[Phase, ...] = ()
    """phases: the stretches after warm-up."""
    beta1: FractionBelowOne = 0.9
    """Decay of Adam's first moment."""
    beta2: FractionBelowOne = 0.95
    """Decay of Adam's second moment."""
    epsilon: Positive = 1e-8
    """Adam's denominator offset."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay on matrices; norms and biases are never decayed."""
    decay_embeddings: bool = True
    """Decay the embedding and the head too."""
    clip_norm: NonNegative = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    first_moment_dtype: DType = "float32"
    """Storage of Adam's (and Muon's) first moment; bfloat16 is rounded to stochastically. V3: bfloat16."""
    second_moment_dtype: DType = "float32"
    """Storage of Adam's second moment; bfloat16 is rounded to stochastically. V3: bfloat16."""
    muon_momentum: FractionBelowOne = 0.95
    """muon: momentum."""
    muon_steps: Count = 5
    """muon: Newton-Schulz iterations."""


@dataclass(frozen=True)
class ParallelConfig:
    """Size of each mesh axis; -1, on one axis at most, takes the remaining devices."""

    data: AxisSize = 1
    """Replicas with a copy of the weights each (over slices or nodes)."""
    stage: AxisSize = 1
    """Pipeline stages that the layers are divided over; micro-batches are those of train.accumulation_steps."""
    stage_chunks: Count = 1
    """Stretches of layers that each stage has (interleaved 1F1B): more of them shorten the pipeline's idle time."""
    fsdp: AxisSize = -1
    """Devices that share one copy of weights and optimizer state, each with its own rows of the batch."""
    expert: AxisSize = 1
    """Devices that the experts are divided over, each with its own rows of the batch."""
    context: AxisSize = 1
    """Devices that a sequence is divided over."""
    tensor: AxisSize = 1
    """Devices that heads and widths are divided over, and a sequence between the blocks."""
    shard_optimizer_over_replicas: bool = False
    """Divide a weight's moments over the devices that hold copies of it (ZeRO-1): each updates its part, and the parts
    are gathered again."""


@dataclass(frozen=True)
class RampStage:
    """One stage of the batch-size ramp."""

    batch_size: Count = 1
    """Rows in a global batch during this stage."""
    tokens: Count = 0
    """Length of the stage in tokens, rounded up to whole steps."""
    accumulation_steps: Natural = 0
    """Micro-batches of its batches; 0 takes train.accumulation_steps."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: Natural = 1000
    """Optimizer steps; 0 takes as many as total_tokens needs."""
    total_tokens: Natural = 0
    """Tokens to train on when steps is 0."""
    batch_size: Count = 8
    """Rows in a global batch, after the ramp."""
    batch_ramp: tuple[RampStage, ...] = ()
    """Stages with smaller batches before batch_size is reached."""
    accumulation_steps: Count = 1
    """Micro-batches a batch is cut into; the result is that of the whole batch."""
    rows_per_device: Natural = 0
    """Rows of a micro-batch on each device: as many micro-batches as that takes on the devices there are, so that a run
    goes on with the same batches on fewer or more of them. 0 leaves it to accumulation_steps."""
    loss_chunk: Count = 1024
    """Tokens on each device whose logits exist at one time; costs this times vocabulary times 4 bytes, twice."""
    z_loss_weight: NonNegative = 0.0
    """Weight of the squared log-partition function (PaLM); 0 leaves it out."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    sample_every: Natural = 0
    """Steps between sample texts; 0 never."""
    sample_prompts: tuple[str, ...] = ("import ", "def main(", "class ")
    """Beginnings of the sample texts."""
    sample_tokens: Count = 48
    """Length of a sample, in tokens."""
    compiler_options: tuple[str, ...] = ()
    """Options of XLA for the step, `name=value`, beside those that the chip gets anyway; names that begin with
    xla_tpu_, xla_gpu_ or xla_cpu_ count on that platform alone."""
    working_memory_gb: NonNegative = 0.0
    """GB of each TPU that a step may take beside the state and its gradients, for the compiler to start messages early;
    0 lets it take all there is."""
    compilation_cache: str = "runs/xla_cache"
    """Directory of compiled programs that later starts reuse; empty for none."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out bits per byte during and after training."""

    every: Natural = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    batches: Count = 4
    """Batches of an evaluation during training."""
    final_batches: Natural = 0
    """Batches of the last evaluation; 0 takes all held-out text."""
    batch_size: Natural = 0
    """Rows in an evaluation batch; 0 takes the rows of a micro-batch."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    name: str = "run"
    """Title in reports and logs."""
    seed: Seed = 0
    """Seed of weights, shuffling and sampling."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    data: DataConfig = DataConfig()
    """Text to batches."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Gradients to updates."""
    parallel: ParallelConfig = ParallelConfig()
    """The device mesh."""
    train: TrainConfig = TrainConfig()
    """The loop."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out text."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    faults: FaultsConfig = FaultsConfig()
    """Fault detection and handling."""
    tracking: TrackingConfig = TrackingConfig()
    """Experiment trackers."""
    hardware: HardwareConfig = HardwareConfig()
    """Peak speed."""

    def __post_init__(self):
        if isinstance(self.model, ModelConfig):
            object.__setattr__(self, "model", self.model.of_run(self.data))
        checks.check_run(self)


def to_dict(config) -> dict:
    """The configuration as nested plain dictionaries, ready for JSON."""
    return dataclasses.asdict(config)
