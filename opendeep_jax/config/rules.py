"""Rules for the fields of a run's configuration, alone and together: generators of sentences about violations.

A sentence is `field = value: rule. fix.` The rules assume that every value is of its annotated type (`checks.py`
looks at that first). Standard library only.
"""

import codecs
import math
import re
import struct
from collections.abc import Iterator
from typing import Any

from opendeep_jax.config.conditions import parse_condition
from opendeep_jax.config.model_rules import hybrid_mesh_problems
from opendeep_jax.config.operations import DRILL_KINDS, DRILLS
from opendeep_jax.config.schedule import micro_batches, padded_rows, total_steps
from opendeep_jax.config.sentences import problem

BYTE_VOCABULARY = 256 + 6
"""Bytes and the special tokens: the vocabulary of the `bytes` tokenizer."""

SMALLEST_BPE = 300
"""A `bpe:SIZE` vocabulary below this would be the bytes, the special tokens and hardly a merge."""

MESH_AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")
"""Axes of the device mesh, the outermost first."""

ROW_AXES = ("data", "fsdp", "expert")
"""Mesh axes that the rows of a batch are divided over."""

LENGTH_AXES = ("context", "tensor")
"""Mesh axes that a row is divided over."""


def run_problems(run: Any) -> Iterator[str]:
    """Yield a sentence for each rule that a `RunConfig` breaks, its model's own rules left out."""
    if not run.name.strip():
        yield problem("name", run.name, "must not be empty", "Give the run a title")
    yield from _data_problems(run)
    yield from _optimizer_problems(run)
    yield from _train_problems(run)
    yield from _operations_problems(run)
    yield from _parallel_problems(run)


def _data_problems(run: Any) -> Iterator[str]:
    data = run.data
    if not data.sources:
        yield problem("data.sources", data.sources, "must hold at least one source", "Add a SourceConfig")
    names = [source.name for source in data.sources]
    for index, source in enumerate(data.sources):
        where = f"data.sources.{index}"
        if not source.name.strip() or source.name in names[:index]:
            yield problem(f"{where}.name", source.name, "must not be empty or shared by two sources", "Rename it")
        for rule in source.keep:
            if parse_condition(rule) is None:
                fix = "As in license_type=permissive, or score>=3 with a number"
                yield problem(f"{where}.keep", rule, "must be written field=value", fix)
        if source.encoding and not _is_encoding(source.encoding):
            yield problem(f"{where}.encoding", source.encoding, "is no encoding of text", "As in latin-1 or utf-16")
        if source.held_out_end > 0 and not 0.001 <= data.held_out_fraction <= 0.5:
            rule = f"holds nothing out where data.held_out_fraction is {data.held_out_fraction}"
            fix = "Set --data.held_out_fraction between 0.001 and 0.5, or held_out_end to 0"
            yield problem(f"{where}.held_out_end", source.held_out_end, rule, fix)
        if not source.text_field:
            yield problem(f"{where}.text_field", "", "must name the field that holds the text", "Usually it is 'text'")
        if not source.path and source.name != "python_stdlib":
            yield problem(
                f"{where}.path",
                source.path,
                f"must say where the documents of {source.name!r} are; only 'python_stdlib' is embedded",
                "Give a file, directory or glob",
            )
    yield from _tokenizer_problems(data.tokenizer, run.model.vocab_size)
    lengths = [("data.sequence_length", data.sequence_length)]
    lengths += [(f"data.phases.{i}.sequence_length", p.sequence_length) for i, p in enumerate(data.phases)]
    for name, length in lengths:
        if length <= run.model.mtp.depth + 1 and not (length == 0 and name != "data.sequence_length"):
            yield problem(
                name,
                length,
                f"must exceed model.mtp.depth + 1 = {run.model.mtp.depth + 1}, or nothing is left to predict",
                "Use longer rows",
            )
    context, longest = run.model.context_length, data.longest_row
    if 0 < context < longest:
        rule = f"the run trains rows of {longest} tokens, and the model would be said to read {context}"
        fix = f"Set --model.context_length={longest} or more, 0 to follow the rows, or shorten data.sequence_length"
        yield problem("model.context_length", context, rule, fix)
    weights = [source.weight for source in data.sources]
    if weights and max(weights) == 0 and not (data.phases and all(phase.weights for phase in data.phases)):
        yield problem("data.sources.0.weight", weights[0], "one source must weigh more than 0", "Give one a weight")
    yield from _curation_problems(data.curation)
    yield from _phase_problems(run)


def _is_encoding(name: str) -> bool:
    try:
        return codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):
        return False


def _curation_problems(curation: Any) -> Iterator[str]:
    where = "data.curation"
    if curation.languages and not curation.language_model:
        yield problem(
            f"{where}.languages",
            curation.languages,
            "needs a model that tells languages, and data.curation.language_model names none",
            "Give the path of fastText's lid.176.bin",
        )


def _phase_problems(run: Any) -> Iterator[str]:
    phases, sources = run.data.phases, run.data.sources
    for index, phase in enumerate(phases):
        where, last = f"data.phases.{index}", index == len(phases) - 1
        if not phase.name.strip() or phase.name in [other.name for other in phases[:index]]:
            yield problem(f"{where}.name", phase.name, "must not be empty or shared by two phases", "Rename it")
        if (phase.tokens == 0) != last:
            rule = "the last phase never ends, so it has no length" if last else "only the last phase has no length"
            yield problem(f"{where}.tokens", phase.tokens, rule, "Set it to 0" if last else "Give its tokens")
        weights = phase.weights or [source.weight for source in sources]
        if len(weights) != len(sources):
            yield problem(
                f"{where}.weights",
                phase.weights,
                f"must have one weight for each of the {len(sources)} sources of data.sources",
                "A source that this phase leaves out has weight 0",
            )
        elif min(weights, default=0) < 0 or max(weights, default=0) == 0:
            yield problem(f"{where}.weights", phase.weights, "must be 0 or above, and one of them above 0", "")
    if len(phases) > 1 and min(run.train.batch_size, run.data.sequence_length, phases[0].tokens) > 0:
        ramp = sum(stage.tokens for stage in run.train.batch_ramp)
        if ramp >= phases[0].tokens:
            yield problem(
                "data.phases.0.tokens",
                phases[0].tokens,
                f"must exceed the {ramp} tokens of train.batch_ramp, which lies inside the first phase",
                "Lengthen the phase, or shorten the ramp",
            )


def _tokenizer_problems(tokenizer: str, vocab_size: int) -> Iterator[str]:
    kind, _, size = tokenizer.partition(":")
    needed = 0
    if tokenizer == "bytes":
        needed = BYTE_VOCABULARY
    elif kind == "bpe" and size.isascii() and size.isdigit():
        needed = int(size)
        if needed < SMALLEST_BPE:
            yield problem("data.tokenizer", tokenizer, f"a BPE needs a vocabulary of {SMALLEST_BPE} or more", "")
    elif not tokenizer.endswith(".json"):
        yield problem(
            "data.tokenizer",
            tokenizer,
            "is none of the known forms",
            "Write 'bytes', 'bpe:SIZE' such as 'bpe:8192', or the path of a tokenizer.json",
        )
    if needed > vocab_size:
        yield problem(
            "data.tokenizer",
            tokenizer,
            f"has {needed} tokens, more than model.vocab_size = {vocab_size} rows of the embedding",
            f"Set model.vocab_size to {needed} or more",
        )


def _optimizer_problems(run: Any) -> Iterator[str]:
    optimizer, where = run.optimizer, "optimizer"
    for name in ("beta1", "beta2", "muon_momentum"):
        decay = getattr(optimizer, name)
        if 0 <= decay < 1 and struct.unpack("f", struct.pack("f", decay)) == (1.0,):
            rule = f"1 - {name} = {1 - decay:.1e} is less than float32 can take from 1, so no gradient would ever count"
            yield problem(f"{where}.{name}", decay, rule, "Use 0.999999 or less")
    if optimizer.schedule == "phases" and not optimizer.phases:
        yield problem(
            "optimizer.schedule", "phases", "needs optimizer.phases, which is empty", "List phases in the recipe"
        )
    for index, phase in enumerate(optimizer.phases):
        endless = phase.shape == "constant" and index == len(optimizer.phases) - 1
        if phase.tokens == 0 and not endless:
            yield problem(
                f"optimizer.phases.{index}.tokens", 0, "only a constant last phase has no length", "Give its tokens"
            )


def _train_problems(run: Any) -> Iterator[str]:
    train = run.train
    if (train.steps > 0) == (train.total_tokens > 0):
        both = "both are set" if train.steps else "neither is"
        yield problem(
            "train.steps",
            train.steps,
            f"exactly one of train.steps and train.total_tokens says how long to train, and {both}",
            "Set one to 0 and the other above it",
        )
    elif min(run.data.sequence_length, *(rows for _, rows, _ in _batches(run))) > 0:
        steps = total_steps(run)
        if run.optimizer.warmup_steps > steps:
            yield problem(
                "optimizer.warmup_steps",
                run.optimizer.warmup_steps,
                f"cannot exceed the run, which has {steps} steps",
                f"Use at most {steps}, or train longer",
            )
    for name, rows, micros in _batches(run):
        if micros > 0 and rows % micros and not train.rows_per_device:
            yield problem(
                name,
                rows,
                f"must be a multiple of its accumulation_steps, which is {micros}",
                f"Use {math.ceil(rows / micros) * micros}",
            )
    for option in train.compiler_options:
        name, equals, value = option.partition("=")
        if not (name.startswith("xla_") and equals and value):
            yield problem("train.compiler_options", option, "is no option of XLA", "Write it as xla_name=value")
    if train.sample_every and not train.sample_prompts:
        yield problem("train.sample_prompts", (), "must not be empty when train.sample_every is set", "Add a prompt")


def _operations_problems(run: Any) -> Iterator[str]:
    saving, faults = run.checkpoint, run.faults
    for drill in faults.drill:
        if not re.fullmatch(DRILLS, drill):
            rule = f"must be kind@step, the kind one of {', '.join(DRILL_KINDS)}"
            yield problem("faults.drill", drill, rule, "As in sigkill@20")
    if faults.replay_every and run.parallel.stage != 1:
        rule = "replays need parallel.stage = 1"
        yield problem("faults.replay_every", faults.replay_every, rule, "Set it to 0")
    if saving.local_every and not saving.local_directory:
        rule = "needs checkpoint.local_directory"
        yield problem("checkpoint.local_every", saving.local_every, rule, "Name a fast disk there")
    if saving.keep_best and not run.evaluation.every:
        rule = "needs evaluations along the way"
        yield problem("checkpoint.keep_best", saving.keep_best, rule, "Set evaluation.every")


def _parallel_problems(run: Any) -> Iterator[str]:
    sizes = axis_sizes(run.parallel)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        yield problem(
            f"parallel.{free[0]}", -1, f"only one axis can be -1, and {', '.join(free)} are", "Fix all but one"
        )
    if len(free) < 2 and all(size > 0 or size == -1 for size in sizes.values()):
        yield from mesh_problems(run, sizes)


def mesh_problems(run: Any, sizes: dict[str, int]) -> Iterator[str]:
    """Yield a sentence for everything that does not divide over a mesh of these sizes; -1 is not known yet."""
    rows = [sizes[axis] for axis in ROW_AXES]
    if -1 not in rows:
        yield from _row_problems(run, math.prod(rows))
    yield from width_problems(run.model, sizes)
    yield from hybrid_mesh_problems(run.model, sizes)
    yield from _length_problems(run, sizes)
    model, stages, chunks = run.model, sizes["stage"], run.parallel.stage_chunks
    layers = model.num_moe_layers or model.num_layers
    if stages > 1 and layers < stages * chunks:
        yield problem(
            "parallel.stage",
            stages,
            f"the model has {layers} layers that can be divided, fewer than {stages} stages x {chunks} chunks",
            "Use fewer stages or chunks",
        )
    if stages > 1 and model.attention.sliding_layers:
        yield problem(
            "parallel.stage", stages, "a pipeline's layers must be alike, and some of these slide", "Set it to 1"
        )


def width_problems(model: Any, sizes: dict[str, int]) -> Iterator[str]:
    """Yield a sentence for every width of a model that does not divide over a mesh of these sizes."""
    attention, moe = model.attention, model.moe
    divided = [("tensor", "model.attention.num_heads", attention.num_heads)]
    if attention.qk_norm == "all_heads" and sizes["tensor"] > 1:
        yield problem(
            "parallel.tensor", sizes["tensor"], "qk_norm='all_heads' needs all heads on a device", "Set it to 1"
        )
    if attention.kind == "gqa":
        divided.append(("tensor", "model.attention.num_kv_heads", attention.num_kv_heads))
    if model.num_leading_dense_layers:
        divided.append(("tensor", "model.mlp_size", model.mlp_size))
    if moe.num_experts:
        shared = moe.shared_size
        divided.append(("expert", "model.moe.num_experts", moe.num_experts))
        divided.append(("tensor", "model.moe.shared_size", shared))
    elif sizes["expert"] > 1:
        yield problem("parallel.expert", sizes["expert"], "this model has no experts", "Set it to 1")
    for axis, name, size in divided:
        if sizes[axis] > 0 and size % sizes[axis]:
            fix = f"Use parallel.{axis}={math.gcd(size, sizes[axis])}, or another that divides {size}"
            yield problem(name, size, f"must divide over parallel.{axis} = {sizes[axis]}", fix)


def _length_problems(run: Any, sizes: dict[str, int]) -> Iterator[str]:
    context, tensor = (max(sizes[axis], 1) for axis in LENGTH_AXES)
    parts = tensor * (2 * context if context > 1 else 1)
    lengths = [("data.sequence_length", run.data.sequence_length)]
    for i, phase in enumerate(run.data.phases):
        if phase.sequence_length:
            lengths.append((f"data.phases.{i}.sequence_length", phase.sequence_length))
    for name, length in lengths:
        if length % parts:
            in_parts = " in two parts each" if context > 1 else ""
            yield problem(
                name,
                length,
                f"rows are divided over parallel.context = {context}{in_parts} and parallel.tensor = {tensor}, "
                f"so it must be a multiple of {parts}",
                f"Use {math.ceil(length / parts) * parts}",
            )


def _row_problems(run: Any, shards: int) -> Iterator[str]:
    """Yield a sentence for each batch of which more than a third would be padding on `shards` devices."""
    for name, rows, parts in _batches(run):
        padded = padded_rows(run.train, rows, shards) if min(rows, parts) > 0 and rows % parts == 0 else rows
        if padded > 1.5 * rows:
            in_parts = f" in each of {parts} micro-batches" if parts > 1 else ""
            yield problem(
                name,
                rows,
                f"rows must divide over the {shards} devices of {' x '.join(ROW_AXES)}{in_parts}, and {padded - rows} "
                f"of {padded} would be padding",
                f"Use a multiple of {parts * shards}, such as {padded}, or fewer devices",
            )


def _batches(run: Any) -> list[tuple[str, int, int]]:
    """Each batch that the run has: the field that sets it, its rows and its micro-batches."""
    stages = enumerate(run.train.batch_ramp)
    ramp = [(f"train.batch_ramp.{index}.batch_size", stage.batch_size) for index, stage in stages]
    phases = [(f"data.phases.{i}.batch_size", p.batch_size) for i, p in enumerate(run.data.phases) if p.batch_size]
    batches = ("train.batch_size", run.train.batch_size), *ramp, *phases
    return [(name, rows, micro_batches(run.train, rows)) for name, rows in batches]


def axis_sizes(parallel: Any, devices: int = 0) -> dict[str, int]:
    """Return the size of each mesh axis; -1 is filled by the devices that the others leave, or stays without `devices`.

    `config.checks.check_devices` has the rules.
    """
    sizes = {axis: getattr(parallel, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    return {axis: devices // fixed if size == -1 and devices else size for axis, size in sizes.items()}
