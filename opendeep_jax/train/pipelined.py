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
from opendeep_jax.models.parameters import Arrays, Skeleton
from opendeep_jax.parallel.axes import BATCH_SPEC, sum_over_copies, weight_specs
from opendeep_jax.parallel.collectives import axis_size
from opendeep_jax.parallel.pipeline import Pieces, from_stages, pipelined_value_and_grad, to_stages
from opendeep_jax.parallel.schedule import Layout, make_schedule, stage_layout
from opendeep_jax.parallel.shares import Sum, all_entries, meet, numbers, over_devices
from opendeep_jax.train.inputs import Inputs, TargetCounts
from opendeep_jax.train.losses import layer_losses, loads, total_loss


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
    grads, metrics, layer_loads = divided(lay_out(params), lay_out(router_bias), inputs, counts, step)
    grads = {name: from_stages(layout, g) if name.startswith(prefix) else g for name, g in grads.items()}
    metrics["load"] |= {name: from_stages(layout, load) for name, load in layer_loads.items()}
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
        if stack == "dense_layers":
            return x, {}
        x, report = scan_layers(model.dense_layers, x, context, config.model)
        loss, metrics = layer_losses(config, {"dense_layers": report}, counts)
        assert loss is None, "leading dense layers run where a pipeline takes no loss"
        return x, metrics

    def layer(weights, constant, x, microbatch):
        function, state = one_layer(getattr(model_of(shared), stack), microbatch[1], config.model, scanned=True)
        arrays = {**weights, **constant}
        flat = [
            (path, variable.replace(arrays[f"{stack}.{'.'.join(map(str, path))}"]))
            for path, variable in nnx.to_flat_state(state)
        ]
        x, report = function(x, nnx.from_flat_state(flat))
        loss, metrics = layer_losses(config, {stack: report}, counts)
        return x, jnp.float32(0) if loss is None else loss, {"metrics": metrics, "load": loads({stack: report})}

    def output(shared, x, microbatch):
        model, (inputs, context) = model_of(shared), microbatch
        out = model.outputs(x, context, [module.tokens for module in inputs.mtp])
        return total_loss(config, model, out, inputs, counts, step)

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
    metrics = dict(result.output_shares)
    for more in (all_entries(result.layer_shares["metrics"]), result.embed_shares):
        metrics |= {name: meet(metrics[name], share) if name in metrics else share for name, share in more.items()}
    metrics["loss"] = Sum(result.loss)
    within_stage = tuple(name for name in mesh.axis_names if name != "stage")
    layer_loads = numbers(over_devices(result.layer_shares["load"], within_stage))
    return grads, numbers(over_devices(metrics, mesh.axis_names)), layer_loads
