"""Planted faults of attention, layers, loss, step and optimizer: see `mutations.py`."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """One fault: in `file`, `old` (which is there exactly once) becomes `new`, and one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    """Node ids, separated by spaces."""


COMPUTE = [
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
    # Objectives and frozen weights.
    Mutation(
        "weights_not_in_the_normalizer",
        "opendeep_jax/train/objective.py",
        "if batch.weights is None:\n        counts",
        "if True:\n        counts",
        "tests/train/test_objective.py::test_pretraining_weighs_targets_and_weights_of_one_change_nothing",
    ),
    Mutation(
        "mtp_weights_not_shifted",
        "opendeep_jax/train/objective.py",
        "None if batch.weights is None else shift_left(batch.weights, k)",
        "batch.weights",
        "tests/train/test_objective.py::test_an_mtp_target_has_the_weight_of_its_token",
    ),
    Mutation(
        "weighted_loss_without_soft_cap",
        "opendeep_jax/train/objective.py",
        "mask=mask, chunk=chunk, softcap=softcap)",
        "mask=mask, chunk=chunk)",
        "tests/train/test_objective.py::test_weights_of_one_leave_a_soft_capped_loss_as_it_is",
    ),
    Mutation(
        "token_logprobs_without_soft_cap",
        "kernels_pallas/cross_entropy/chunks.py",
        "logits = _logits(hidden, head, how[1]) / temperature",
        "logits = _logits(hidden, head, 0.0) / temperature",
        "tests/kernels/test_token_logprobs.py::test_both_results_and_their_gradients_are_those_of_the_definition",
    ),
    Mutation(
        "logprob_gradient_without_temperature",
        "kernels_pallas/cross_entropy/chunks.py",
        "jnp.where(mask, x / temperature, 0.0)[:, None]",
        "jnp.where(mask, x, 0.0)[:, None]",
        "tests/kernels/test_token_logprobs.py::test_both_results_and_their_gradients_are_those_of_the_definition",
    ),
    Mutation(
        "entropy_gradient_without_entropy",
        "kernels_pallas/cross_entropy/chunks.py",
        "entropy_slope * (log_p + entropy[:, None])",
        "entropy_slope * log_p",
        "tests/kernels/test_token_logprobs.py::test_both_results_and_their_gradients_are_those_of_the_definition",
    ),
    Mutation(
        "frozen_weights_train",
        "opendeep_jax/train/state.py",
        "for name, array in params.items() if name not in frozen.get(BASE, {})}",
        "for name, array in params.items()}",
        "tests/train/test_objective.py::test_the_first_state_has_no_masters_and_no_moments_of_frozen_weights",
    ),
    Mutation(
        "other_frozen_weights_taken",
        "opendeep_jax/checkpoint/files.py",
        'saved = read_record(path).get("frozen", {})',
        "saved = digests",
        "tests/train/test_objective.py::test_a_checkpoint_holds_frozen_weights_by_their_digests_alone",
    ),
    Mutation(
        "last_micro_batch_alone",
        "opendeep_jax/train/step.py",
        "jax.tree.map(jnp.add, total[0], grads)",
        "jax.tree.map(lambda _, grad: grad, total[0], grads)",
        "tests/train/test_step.py::test_a_cut_batch_has_the_loss_and_gradients_of_the_whole_one",
    ),
    # The optimizer's schedule and Muon's stacks.
    Mutation(
        "muon_stack_order",
        "opendeep_jax/train/muon.py",
        "jnp.concatenate(matrices)",
        "jnp.concatenate(matrices[::-1])",
        "tests/train/test_muon.py::test_matrices_of_one_shape_together_are_what_they_are_alone",
    ),
    Mutation(
        "wsd_decays_too_late",
        "opendeep_jax/config/schedule.py",
        '"linear", 1.0, final, total - decay, decay)',
        '"linear", 1.0, final, total - decay // 2, decay)',
        "tests/train/test_optimizer.py::test_wsd_is_stable_and_then_falls_linearly",
    ),
    # Experts in blocks.
    Mutation(
        "first_block_of_the_group_before",
        "kernels_pallas/grouped_matmul/blocks.py",
        "v[:, None] >= until",
        "v[:, None] > until",
        "tests/kernels/test_grouped_matmul.py::test_each_group_meets_its_own_matrix_and_rows_beyond_give_zeros",
    ),
    Mutation(
        "block_overwrites_rows_of_others",
        "kernels_pallas/grouped_matmul/blocks.py",
        "jnp.where(blocks.own(v), y, blocks.cut(out, v))",
        "y",
        "tests/kernels/test_grouped_matmul.py::test_each_group_meets_its_own_matrix_and_rows_beyond_give_zeros",
    ),
]
