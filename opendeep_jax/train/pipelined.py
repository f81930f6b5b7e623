"""The gradients of a batch where the layers are divided over pipeline stages: the numbers of `step.batch_gradients`.

At rest every weight is divided over stage x fsdp, so that a checkpoint knows nothing of the pipeline. A step begins by
laying each stage's layers out on it, and ends by sending their gradients home. Micro-batches are those of
`train.accumulation_steps`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from opendeep_jax.config.rules import ROW_AXES
from opendeep_jax.config.schedule import micro_batches
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.models.accounting import flops_per_token
from opendeep_jax.models.decoder import one_layer, scan_layers
from opendeep_jax.models.moe import RouterStats
from opendeep_jax.models.parameters import Arrays, Skeleton
from opendeep_jax.parallel.axes import BATCH_SPEC, sum_over_copies, weight_specs
from opendeep_jax.parallel.collectives import axis_size, psum
from opendeep_jax.parallel.pipeline import Pieces, from_stages, pipelined_value_and_grad, to_stages
from opendeep_jax.parallel.schedule import Layout, make_schedule, stage_layout
from opendeep_jax.train.inputs import Inputs, TargetCounts
from opendeep_jax.train.losses import ROUTERS, balance_losses, losses


def stacked_layers(config: RunConfig) -> str:
    """Name of the stack that is divided over the stages: the MoE blocks, or in a dense model all blocks."""
    return "moe_layers" if config.model.num_moe_layers else "dense_layers"


def layers_on_stages(config: RunConfig, stages: int) -> Layout:
    """Which stage has which layers. Leading dense layers are the first stage's, MTP modules the last one's."""
    model, chunks = config.model, config.parallel.stage_chunks
    layers = model.num_moe_layers or model.num_layers
    first = model.num_leading_dense_layers if model.num_moe_layers else 0
    # A layer's work is that of its share of the weights; every prediction passes through the head.
    flops = flops_per_token(model, 1).weights / 6
    head = model.hidden_size * model.vocab_size
    layer = max((flops - (1 + model.mtp.depth) * head) / (model.num_layers + model.mtp.depth), 1)
    last = model.mtp.depth + (1 + model.mtp.depth) * head / layer
    return stage_layout(layers, stages, chunks, float(first), last)


def pipelined_gradients(
    config: RunConfig, skeleton: Skeleton, params: Arrays, router_bias: Arrays, inputs: Inputs, counts, step
) -> tuple[Arrays, dict]:
    """Gradients and metrics of the global batch; arguments and results as those of `step.device_gradients`, whole."""
    mesh = jax.sharding.get_abstract_mesh()
    layout, prefix = layers_on_stages(config, mesh.shape["stage"]), stacked_layers(config) + "."
    specs, whole = weight_specs(skeleton, mesh), PartitionSpec()
    specs = {name: _on_stage(spec) if name.startswith(prefix) else spec for name, spec in specs.items()}

    def lay_out(arrays: Arrays) -> Arrays:
        laid = {name: to_stages(layout, x) if name.startswith(prefix) else x for name, x in arrays.items()}
        return {name: jax.lax.with_sharding_constraint(x, specs[name]) for name, x in laid.items()}

    def device_program(params, router_bias, inputs, counts, step):
        return _device_gradients(config, skeleton, layout, specs, params, router_bias, inputs, counts, step)

    param_specs = {name: specs[name] for name in params}
    bias_specs = {name: specs[name] for name in router_bias}
    divided = jax.shard_map(
        device_program,
        mesh=mesh,
        in_specs=(param_specs, bias_specs, BATCH_SPEC, whole, whole),
        out_specs=(param_specs, whole, PartitionSpec("stage")),
        check_vma=False,
    )
    grads, metrics, layer_load = divided(lay_out(params), lay_out(router_bias), inputs, counts, step)
    grads = {name: from_stages(layout, g) if name.startswith(prefix) else g for name, g in grads.items()}
    if config.model.num_moe_layers:
        metrics["load"][ROUTERS] = from_stages(layout, layer_load)
    return grads, metrics


def _on_stage(spec: PartitionSpec) -> PartitionSpec:
    """The spec of stacked layers once they are laid out."""
    return PartitionSpec("stage", *tuple(spec)[1:])


def _device_gradients(config, skeleton, layout, specs, params, router_bias, inputs: Inputs, counts: TargetCounts, step):
    """One device's program."""
    mesh, stack = jax.sharding.get_abstract_mesh(), stacked_layers(config)
    stages = mesh.shape["stage"]
    shards = axis_size(ROW_AXES)
    micros = micro_batches(config.train, len(inputs.batch.tokens) * shards, shards)
    layers = {name: x for name, x in params.items() if name.startswith(stack + ".")}
    shared = {name: x for name, x in params.items() if name not in layers}
    constants = {name: x for name, x in router_bias.items() if name.startswith(stack + ".")}

    def model_of(shared):
        return skeleton.model({**shared, **layers}, router_bias)

    def embed(shared, microbatch):
        model, (inputs, context) = model_of(shared), microbatch
        x = model.embedding(inputs.batch.tokens)
        return x if stack == "dense_layers" else scan_layers(model.dense_layers, x, context, config.model)[0]

    def layer(weights, constant, x, microbatch):
        function, state = one_layer(getattr(model_of(shared), stack), microbatch[1], config.model, scanned=True)
        arrays = {**weights, **constant}
        flat = [
            (path, variable.replace(arrays[f"{stack}.{'.'.join(map(str, path))}"]))
            for path, variable in nnx.to_flat_state(state)
        ]
        x, stats = function(x, nnx.from_flat_state(flat))
        if stats is None:
            return x, jnp.float32(0), RouterStats(jnp.zeros((0,), jnp.int32), jnp.float32(0))
        balance, weighted = balance_losses(config, [stats], counts)
        return x, weighted, RouterStats(stats.load, balance)

    def output(shared, x, microbatch):
        model, (inputs, context) = model_of(shared), microbatch
        out = model.outputs(x, context, [module.tokens for module in inputs.mtp])
        return losses(config, model, out, inputs, counts, step)

    batch = inputs.batch
    context = model_of(shared).context(batch.tokens, batch.segment_ids, batch.positions, inputs.order)
    result = pipelined_value_and_grad(
        Pieces(embed, layer, output),
        make_schedule(stages, micros, config.parallel.stage_chunks),
        layout,
        shared,
        layers,
        constants,
        jax.tree.map(lambda x: x.reshape(micros, -1, *x.shape[1:]), (inputs, context)),
    )
    grads = {**result.shared_gradients, **result.layer_gradients}
    grads = sum_over_copies(grads, specs, mesh)
    metrics = dict(result.output_sums)
    if config.model.num_moe_layers:
        metrics["balance_loss"] = metrics.get("balance_loss", 0.0) + jnp.sum(result.layer_sums.balance_loss)
    metrics["loss"] = result.loss
    within_stage = tuple(name for name in mesh.axis_names if name != "stage")
    return grads, psum(metrics, mesh.axis_names), psum(result.layer_sums.load, within_stage)
