"""Planted faults that the default test run must catch: proof that the tests have power.

    python tests/mutations.py                         plant every fault, one after the other
    python tests/mutations.py causal_mask top_p       only these
    python tests/mutations.py --jobs=4                several at a time, each in its own copy of the tree
    python tests/mutations.py --list                  the table
    python tests/mutations.py --check                 check the table alone: seconds, runs no test

Each fault is a small change to one source file and the tests that must fail with it. The tree is copied, the tests that
are named run once without a fault (they must pass), then each fault is planted in a copy of its own and its tests run
there. A fault whose tests pass has survived: write the cheap test that is missing. Run by hand, outside CI.

When a line of the source moves or changes, `--check` names the fault whose text is no longer there: adapt it.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TIMEOUT = 900
"""Seconds after which a fault's tests are stopped; a program that hangs counts as caught."""


class Mutation(NamedTuple):
    """One fault: in `file`, `old` (which is there exactly once) becomes `new`, and one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    """Node ids, separated by spaces."""


MUTATIONS = [
    # Attention and its masks.
    Mutation(
        "causal_mask",
        "kernels_pallas/flash_mla/blocks.py",
        "visible = (distance >= 0)",
        "visible = (distance >= -1)",
        "tests/ops/test_causal_attention.py::test_output_is_that_of_a_dense_mask",
    ),
    Mutation(
        "segment_mask",
        "kernels_pallas/flash_mla/blocks.py",
        "query_segments[:, rows, None] == key_segments[:, None, seen]",
        "query_segments[:, rows, None] >= key_segments[:, None, seen]",
        "tests/ops/test_causal_attention.py::test_output_is_that_of_a_dense_mask",
    ),
    Mutation(
        "window_off_by_one",
        "kernels_pallas/flash_mla/blocks.py",
        "visible &= distance < window",
        "visible &= distance <= window",
        "tests/ops/test_causal_attention.py::test_windows_sinks_and_soft_caps_give_the_full_softmax_and_its_gradients",
    ),
    Mutation(
        "swapped_axes_of_grouped_heads",
        "kernels_pallas/flash_mla/blocks.py",
        "query.reshape(batch, length, groups, heads // groups, -1).transpose(0, 2, 3, 1, 4)",
        "query.reshape(batch, length, heads // groups, groups, -1).transpose(0, 3, 2, 1, 4)",
        "tests/ops/test_causal_attention.py::test_output_is_that_of_a_dense_mask",
    ),
    Mutation(
        "attention_gradient_without_delta",
        "kernels_pallas/flash_mla/blocks.py",
        "d_weights - delta[:, :, :, rows]",
        "d_weights",
        "tests/ops/test_causal_attention.py::test_gradients_are_those_of_a_dense_mask",
    ),
    # Rotation.
    Mutation(
        "yarn_does_not_stretch",
        "opendeep_jax/ops/rope.py",
        "plain / rope.yarn_factor * interpolated",
        "plain * interpolated",
        "tests/ops/test_rope.py::test_yarn_keeps_fast_pairs_and_stretches_slow_ones",
    ),
    Mutation(
        "yarn_temperature_not_squared",
        "opendeep_jax/ops/rope.py",
        "rope.yarn_mscale_all_dim) ** 2",
        "rope.yarn_mscale_all_dim)",
        "tests/ops/test_rope.py::test_yarn_sharpens_the_softmax_by_its_squared_temperature",
    ),
    # Routing and experts.
    Mutation(
        "router_bias_sign",
        "opendeep_jax/ops/routing.py",
        "bias + speed * jnp.sign",
        "bias - speed * jnp.sign",
        "tests/ops/test_routing.py::test_biases_move_by_the_speed_against_the_load",
    ),
    Mutation(
        "router_bias_weighs",
        "opendeep_jax/ops/routing.py",
        "jnp.take_along_axis(scores, indices",
        "jnp.take_along_axis(selection, indices",
        "tests/ops/test_routing.py::test_the_bias_selects_and_does_not_weigh",
    ),
    Mutation(
        "groups_by_their_best_expert",
        "opendeep_jax/ops/routing.py",
        "jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)",
        "jnp.sum(jax.lax.top_k(grouped, 1)[0], axis=-1)",
        "tests/ops/test_routing.py::test_choice_and_weights_are_those_of_the_reports",
    ),
    Mutation(
        "padding_counts_as_load",
        "opendeep_jax/ops/routing.py",
        "jnp.arange(num_experts)) & valid[:, :, None, None]",
        "jnp.arange(num_experts))",
        "tests/ops/test_routing.py::test_counts_leave_out_padding",
    ),
    Mutation(
        "router_bias_not_updated",
        "opendeep_jax/train/step.py",
        "updated_bias(bias, loads[name], speed) if name in loads else bias",
        "bias",
        "tests/train/test_step.py::test_loads_count_every_valid_tokens_choices_and_biases_move_against_them",
    ),
    Mutation(
        "expert_output_to_the_wrong_token",
        "opendeep_jax/ops/dispatch.py",
        "Slots(order // indices.shape[1], inverse.T)",
        "Slots(order % indices.shape[0], inverse.T)",
        "tests/ops/test_dispatch.py::test_output_and_gradients_are_those_of_each_token_by_itself",
    ),
    Mutation(
        "tokens_beyond_the_buffer_dropped",
        "opendeep_jax/ops/exchange.py",
        "return main(arrays, choices) if sizes.exact else with_overflow(",
        "return main(arrays, choices) if True else with_overflow(",
        "tests/ops/test_exchange.py::test_outputs_and_gradients_are_those_of_one_device_however_unbalanced",
    ),
    # The loss.
    Mutation(
        "loss_over_padding",
        "kernels_pallas/cross_entropy/chunks.py",
        "each = jnp.where(mask, log_z - target_logit, 0.0)",
        "each = log_z - target_logit",
        "tests/kernels/test_cross_entropy.py::test_sum_each_token_and_gradients_are_those_of_the_definition",
    ),
    Mutation(
        "z_loss_without_gradient",
        "kernels_pallas/cross_entropy/chunks.py",
        "1.0 + 2.0 * z_loss_weight * log_z",
        "1.0 + 0.0 * z_loss_weight * log_z",
        "tests/kernels/test_cross_entropy.py::test_the_z_loss_is_in_the_sum_and_the_gradients_but_not_in_each_token",
    ),
    Mutation(
        "soft_cap_missing_in_the_gradient",
        "kernels_pallas/cross_entropy/chunks.py",
        "d_logits *= 1 - jnp.square(logits / softcap)",
        "d_logits *= 1",
        "tests/kernels/test_cross_entropy.py::test_a_soft_cap_bounds_the_logits_and_their_gradients",
    ),
    Mutation(
        "mean_over_local_targets",
        "opendeep_jax/train/objective.py",
        "return total / count, nats / count",
        "count = jnp.maximum(jnp.sum(mask), 1)\n            return total / count, nats / count",
        "tests/train/test_step.py::test_a_cut_batch_has_the_loss_and_gradients_of_the_whole_one",
    ),
    Mutation(
        "mtp_shift",
        "opendeep_jax/train/objective.py",
        "shift_left(batch.targets, k - 1), shift_left(batch.targets, k)",
        "shift_left(batch.targets, k), shift_left(batch.targets, k)",
        "tests/models/test_decoder.py::test_a_mtp_module_is_given_the_token_before_its_target",
    ),
    Mutation(
        "mtp_mask_across_documents",
        "opendeep_jax/train/objective.py",
        "mask = mask & shift_left(loss_mask, k)",
        "mask = shift_left(loss_mask, k)",
        "tests/models/test_decoder.py::test_mtp_targets_lie_in_the_document_of_their_position",
    ),
    # Gradients and updates.
    Mutation(
        "gradients_not_summed_over_copies",
        "opendeep_jax/parallel/axes.py",
        "return psum(grad.astype(jnp.float32), copies) if copies else grad",
        "return grad",
        "tests/train/test_step.py::test_a_cut_batch_has_the_loss_and_gradients_of_the_whole_one",
    ),
    Mutation(
        "clip_by_each_arrays_norm",
        "opendeep_jax/train/step.py",
        "grads = jax.tree.map(lambda grad: grad * scale, grads)",
        "grads = jax.tree.map(lambda g: g * jnp.minimum(1, config.optimizer.clip_norm / optax.global_norm(g)), grads)",
        "tests/train/test_step.py::test_gradients_are_cut_to_the_clip_norm_and_smaller_ones_left_alone",
    ),
    Mutation(
        "weight_decay_on_norms",
        "opendeep_jax/train/optimizer.py",
        'return len(_matrix_axes(names)) > 1 and ("vocab" not in names or optimizer.decay_embeddings)',
        'return "vocab" not in names or optimizer.decay_embeddings',
        "tests/train/test_optimizer.py::test_adamw_is_the_papers_and_decays_matrices_alone",
    ),
    Mutation(
        "learning_rate_off_by_one",
        "opendeep_jax/train/optimizer.py",
        "falling = -rate(clock.count)",
        "falling = -rate(clock.count + 1)",
        "tests/train/test_optimizer.py::test_the_applied_rate_is_the_logged_one_after_skipped_updates_and_batches_passed_over",
    ),
    Mutation(
        "warm_up_from_zero",
        "opendeep_jax/config/schedule.py",
        '"linear", 1.0 / max(warmup, 1), 1.0, 0, max(warmup - 1, 1)',
        '"linear", 0.0, 1.0, 0, max(warmup, 1)',
        "tests/train/test_optimizer.py::test_the_warm_up_begins_at_its_first_stair_and_ends_at_the_peak",
    ),
    Mutation(
        "adam_bias_correction",
        "opendeep_jax/train/optimizer.py",
        "rule.update(updates, before._replace(**exact), params)",
        "rule.update(updates, before._replace(**exact, count=before.count + 1), params)",
        "tests/train/test_optimizer.py::test_adamw_is_the_papers_and_decays_matrices_alone",
    ),
    Mutation(
        "muon_transposed",
        "opendeep_jax/train/optimizer.py",
        "reduction_axis=matrix[:inputs], output_axis=matrix[inputs:]",
        "reduction_axis=matrix[:1], output_axis=matrix[1:]",
        "tests/train/test_optimizer.py::test_muon_takes_heads_and_head_size_as_one_side_of_the_output_projection",
    ),
    # Low precision.
    Mutation(
        "unscaled_fp8_block",
        "kernels_pallas/fp8_matmul/quantize.py",
        "_round(tiles / scales[:, :, None, :, None], carrier)",
        "_round(tiles, carrier)",
        "tests/kernels/test_fp8_matmul.py",
    ),
    # Parallel programs.
    Mutation(
        "mean_of_means",
        "opendeep_jax/parallel/shares.py",
        "share.total / jnp.maximum(share.count, 1)",
        "share.total",
        "tests/parallel/test_shares.py::test_any_cut_gives_the_sum_mean_and_maximum_of_all_terms",
    ),
    Mutation(
        "pipeline_runs_what_has_not_arrived",
        "opendeep_jax/parallel/schedule.py",
        "if part == 0 or forward_tick.get((part - 1, m), tick) < tick:",
        "if part == 0 or forward_tick.get((part - 1, m), tick + 1) <= tick:",
        "tests/parallel/test_pipeline_schedule.py::test_nothing_runs_before_what_it_needs_has_traveled_for_a_tick",
    ),
    # Text to batches.
    Mutation(
        "targets_not_shifted",
        "opendeep_jax/data/pipeline.py",
        "batch.targets[in_batch] = stream[:, 1:]",
        "batch.targets[in_batch] = stream[:, :-1]",
        "tests/data/test_pipeline.py::test_a_target_is_the_next_token_of_its_own_document",
    ),
    Mutation(
        "loss_across_documents",
        "opendeep_jax/data/pipeline.py",
        "valid & (segments[:, :-1] == segments[:, 1:])",
        "valid",
        "tests/data/test_pipeline.py::test_a_target_is_the_next_token_of_its_own_document",
    ),
    Mutation(
        "packing_loses_a_token",
        "opendeep_jax/data/plan.py",
        "begins = number * length\n",
        "begins = number * (length + 1)\n",
        "tests/data/test_packing.py::test_every_token_but_a_documents_first_is_predicted_exactly_once",
    ),
    Mutation(
        "packing_overfills",
        "opendeep_jax/data/plan.py",
        "[packing](ends - begins, length + 1)",
        "[packing](ends - begins, length + 2)",
        "tests/data/test_packing.py::test_no_row_is_longer_than_its_positions_and_their_last_target",
    ),
    Mutation(
        "same_order_in_every_epoch",
        "opendeep_jax/data/order.py",
        "shuffled(places[mine], size, self.config.seed, source, kind.length, epoch)",
        "shuffled(places[mine], size, self.config.seed, source, kind.length, 0)",
        "tests/data/test_order.py::test_an_epoch_takes_every_row_of_a_source_once_and_the_next_in_another_order",
    ),
    # Generation.
    Mutation(
        "page_freed_twice",
        "opendeep_jax/generation/cache.py",
        "if not self._holders[page]:",
        "if self._holders[page] <= 1:",
        "tests/generation/test_engine.py::test_an_aborted_request_frees_its_pages_and_disturbs_no_other",
    ),
    Mutation(
        "stale_cache_page",
        "opendeep_jax/generation/attention.py",
        "values = jnp.where(inside[:, :, None, :, None], values, 0)",
        "values = values",
        "tests/generation/test_engine.py::test_what_is_left_in_freed_pages_reaches_nobody",
    ),
    Mutation(
        "decoding_sees_one_position_too_few",
        "opendeep_jax/generation/attention.py",
        "jnp.where(places.present, places.positions + 1, 0)",
        "jnp.where(places.present, places.positions, 0)",
        "tests/generation/test_engine.py::test_greedy_output_and_its_probabilities_are_those_of_the_model_without_a_cache",
    ),
    Mutation(
        "top_p",
        "opendeep_jax/generation/sampling.py",
        "jnp.where(probabilities >= least, logits, -jnp.inf)",
        "jnp.where(probabilities > least, logits, -jnp.inf)",
        "tests/generation/test_sampling_filters.py::test_filters_keep_the_tokens_that_sorting_keeps",
    ),
    Mutation(
        "draws_do_not_depend_on_the_place",
        "opendeep_jax/generation/sampling.py",
        "jax.random.fold_in(jax.random.key(seed), index)",
        "jax.random.fold_in(jax.random.key(seed), 0 * index)",
        "tests/generation/test_sampling_filters.py::test_a_rows_draw_depends_on_its_seed_and_place_alone",
    ),
    Mutation(
        "drafts_accepted_after_a_refusal",
        "opendeep_jax/generation/speculation.py",
        "jnp.sum(jnp.cumprod(stands, axis=1), axis=1, dtype=jnp.int32)",
        "jnp.sum(stands, axis=1, dtype=jnp.int32)",
        "tests/generation/test_speculation.py::test_output_and_log_probabilities_are_those_of_plain_decoding",
    ),
    # Tokenizers, curation, evaluation.
    Mutation(
        "begin_token_twice",
        "opendeep_jax/text/tokenizer.py",
        "return list(ids) if list(ids[: len(begin)]) == begin else begin + list(ids)",
        "return begin + list(ids)",
        "tests/text/test_tokenizer_files.py::test_a_directory_says_what_begins_and_ends_a_text",
    ),
    Mutation(
        "curation_keeps_what_it_should_drop",
        "opendeep_jax/data/curation/stages.py",
        "            if reason:\n                return reason",
        "            if not reason:\n                return name",
        "tests/data/curation/test_curate.py::test_what_is_planted_is_removed_and_counted_under_its_reason",
    ),
    Mutation(
        "window_scores_a_token_twice",
        "opendeep_jax/evaluation/windows.py",
        "yield Window(list(tokens[begin:end]), scored_to - begin)",
        "yield Window(list(tokens[begin:end]), scored_to - begin - 1)",
        "tests/evaluation/test_eval_windows.py::test_every_token_but_the_first_is_scored_once_and_in_order",
    ),
    # Runs that survive.
    Mutation(
        "digests_not_compared",
        "opendeep_jax/checkpoint/files.py",
        'if found[name] != record["arrays"][name]["digest"]]',
        'if name not in record["arrays"]]',
        "tests/checkpoint/test_checkpoint_damage.py::test_a_digest_names_the_damaged_array",
    ),
    Mutation(
        "digest_without_positions",
        "opendeep_jax/checkpoint/digests.py",
        "return first + jnp.arange(bits.shape[dimension], dtype=jnp.uint32)",
        "return first + 0 * jnp.arange(bits.shape[dimension], dtype=jnp.uint32)",
        "tests/checkpoint/test_digests.py::test_a_device_and_numpy_agree_for_every_dtype_and_shape",
    ),
    Mutation(
        "rollback_does_not_skip",
        "opendeep_jax/faults/recovery.py",
        "return is_skipped(self.windows, step)",
        "return False",
        "tests/faults/test_recovery.py::test_a_window_is_on_disk_before_the_run_goes_on_and_the_next_start_reads_it",
    ),
    Mutation(
        "spike_window_keeps_the_oldest",
        "opendeep_jax/faults/health.py",
        "jnp.roll(window, -1).at[-1].set(value)",
        "jnp.roll(window, 1).at[-1].set(value)",
        "tests/faults/test_health.py::test_only_the_last_losses_are_remembered",
    ),
    Mutation(
        "update_that_is_not_finite_applied",
        "opendeep_jax/faults/health.py",
        "finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)",
        "finite = jnp.isfinite(loss) | jnp.isfinite(grad_norm)",
        "tests/faults/test_health.py::test_what_is_not_finite_is_skipped_and_forgotten",
    ),
    Mutation(
        "goodput_counts_the_gap_twice",
        "opendeep_jax/record/goodput.py",
        'gap = record["wall"] - sum(seconds.values()) - self._last["wall"]',
        'gap = record["wall"] - self._last["wall"]',
        "tests/record/test_goodput.py::test_the_time_between_two_starts_is_restart_and_steps_done_twice_are_waste",
    ),
    Mutation(
        "processes_read_each_others_rows",
        "opendeep_jax/parallel/mesh.py",
        "begin = int(np.searchsorted(here, first))",
        "begin = 0",
        "tests/parallel/test_axes.py::test_rows_and_lengths_go_to_their_devices_in_order",
    ),
    # Files of others.
    Mutation(
        "gguf_heads_not_interleaved",
        "opendeep_jax/interop/gguf_tensors.py",
        "return rows.reshape(-1, first, second, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)",
        "return rows",
        "tests/interop/test_gguf.py::test_the_gguf_package_reads_metadata_and_llama_layout",
    ),
    Mutation(
        "float8_scale_of_the_next_block",
        "opendeep_jax/interop/hf_weights.py",
        "*= scales[block]",
        "*= scales[0]",
        "tests/interop/test_hf.py::test_float8_blocks_are_multiplied_by_their_scales_in_any_part",
    ),
    # Configuration and jobs.
    Mutation(
        "truth_value_as_a_number",
        "opendeep_jax/config/checks.py",
        "return type(value) is annotation",
        "return isinstance(value, annotation)",
        "tests/config/test_checks.py",
    ),
    Mutation(
        "work_directory_not_quoted",
        "opendeep_jax/jobs/launch/render.py",
        '"workdir": shlex.quote(job.workdir)',
        '"workdir": job.workdir',
        "tests/jobs/test_launch_templates.py::test_a_work_directory_with_a_space_is_one_word_of_the_file",
    ),
    Mutation(
        "sweep_ranks_the_worst_first",
        "opendeep_jax/jobs/sweep/results.py",
        "(not row.complete, row.mean if row.complete else 0.0)",
        "(not row.complete, -row.mean if row.complete else 0.0)",
        "tests/jobs/test_sweep_results.py::test_a_table_has_mean_spread_and_rank_over_the_seeds",
    ),
    # Hybrids.
    Mutation(
        "state_across_documents",
        "opendeep_jax/ops/state_space.py",
        "held = jnp.where((documents == last_document[:, None])[..., None, None], jnp.exp(passed), 0)",
        "held = jnp.exp(passed)",
        "tests/models/test_mamba2.py::test_chunks_of_any_size_give_what_the_recurrence_gives",
    ),
    Mutation(
        "mtp_inputs_swapped",
        "opendeep_jax/models/decoder.py",
        "[self.embedding_norm(embedded), self.hidden_norm(hidden)]",
        "[self.hidden_norm(hidden), self.embedding_norm(embedded)]",
        "tests/interop/test_golden.py::test_mtp_logits_equal_those_of_transformers",
    ),
    Mutation(
        "hugging_face_name",
        "opendeep_jax/interop/hf_family.py",
        '"attention.out": "self_attn.o_proj.weight"',
        '"attention.out": "self_attn.out_proj.weight"',
        "tests/interop/test_families.py::test_logits_equal_those_of_transformers",
    ),
    Mutation(
        "sources_repeat_their_rows",
        "opendeep_jax/data/mixture.py",
        "return sources, periods * self.counts[sources] + self.ranks[n]",
        "return sources, periods + self.ranks[n]",
        "tests/data/test_mixture.py::test_each_source_gives_its_rows_in_order_without_gaps",
    ),
    Mutation(
        "middle_before_suffix",
        "opendeep_jax/data/fim.py",
        "hole, (j, tokens - 1), stop, (i, j),",
        "hole, (i, j), stop, (j, tokens - 1),",
        "tests/data/test_fim.py::test_a_rearranged_document_is_begin_prefix_suffix_middle_end",
    ),
    Mutation(
        "stop_string_shown",
        "opendeep_jax/text/stream.py",
        "return text[: end - len(self.matched)]",
        "return text[:end]",
        "tests/text/test_text_stream.py",
    ),
]


def problems(mutations: Iterable[Mutation]) -> list[str]:
    """What is wrong with the table: texts that are not there exactly once, tests that are not there or are slow."""
    found = []
    for mutation in mutations:
        path = ROOT / mutation.file
        count = path.read_text(encoding="utf-8").count(mutation.old) if path.is_file() else 0
        if count != 1:
            found.append(f"{mutation.name}: {mutation.file} has its old text {count} times, not once: {mutation.old!r}")
        found += [f"{mutation.name}: {problem}" for test in mutation.tests.split() if (problem := problem_of(test))]
    names = [mutation.name for mutation in mutations]
    return found + [f"{name}: is there twice" for name in sorted({name for name in names if names.count(name) > 1})]


def problem_of(test: str) -> str | None:
    """What keeps a node id out of the default run, or None."""
    file, *names = re.sub(r"\[.*", "", test).split("::")
    if not (ROOT / file).is_file():
        return f"{file} is not there"
    body, inside = ast.parse((ROOT / file).read_text(encoding="utf-8")).body, False
    for name in names:
        node = next((n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name), None)
        if node is None:
            return None if inside else f"{test} is not there"  # a class may have inherited it
        if any("mark.slow" in ast.unparse(decorator) for decorator in node.decorator_list):
            return f"{test} is slow, so the default run leaves it out"
        body, inside = node.body, isinstance(node, ast.ClassDef)
    return None


def copy_tree(to: Path) -> None:
    """Copy what git knows of the tree and has not ignored; compiled programs are shared with the tree's own tests."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    programs = ROOT / ".pytest_cache" / "d" / "xla"
    programs.mkdir(parents=True, exist_ok=True)
    (to / ".pytest_cache" / "d").mkdir(parents=True)
    (to / ".pytest_cache" / "d" / "xla").symlink_to(programs)


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run tests of a copy of the tree as the default run does; returns pytest's status and the end of what it said."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "--no-header", "--tb=line", *tests]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return 1, f"nothing after {TIMEOUT} seconds"
    return done.returncode, "\n".join((done.stdout + done.stderr).strip().splitlines()[-6:])


def plant(mutation: Mutation) -> tuple[str, str]:
    """Run a fault's tests with the fault: `caught`, `SURVIVED` or `ERROR`, and how it went."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        tree = Path(directory)
        copy_tree(tree)
        path = tree / mutation.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
        status, text = run_tests(tree, mutation.tests.split())
    word = {0: "SURVIVED", 1: "caught"}.get(status, "ERROR")
    return word, f"{time.monotonic() - begun:.0f} s" + ("" if word == "caught" else f"\n{text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="faults to plant; all of them if none is given")
    parser.add_argument("--list", action="store_true", help="print the table")
    parser.add_argument("--check", action="store_true", help="check the table alone")
    parser.add_argument("--jobs", type=int, default=1, help="faults to plant at a time")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {mutation.name for mutation in MUTATIONS}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))} (--list names them)")
    chosen = [mutation for mutation in MUTATIONS if mutation.name in arguments.names or not arguments.names]
    if arguments.list:
        for mutation in chosen:
            print(f"{mutation.name}\n    {mutation.file}: {mutation.old!r} -> {mutation.new!r}\n    {mutation.tests}")
        return 0
    if wrong := problems(chosen):
        print("\n".join(wrong))
        return 2
    if arguments.check:
        print(f"{len(chosen)} faults, each text once in its file, no test slow")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        copy_tree(Path(directory))
        status, text = run_tests(Path(directory), sorted({test for m in chosen for test in m.tests.split()}))
    if status:
        print(f"The tests fail without a fault:\n{text}")
        return 2
    words = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutation, (word, text) in zip(chosen, pool.map(plant, chosen), strict=True):
            words.append(word)
            print(f"{word:9} {mutation.name:40} {text}", flush=True)
    print(f"{words.count('caught')} of {len(words)} faults are caught")
    return int(words.count("caught") < len(words))


if __name__ == "__main__":
    sys.exit(main())
