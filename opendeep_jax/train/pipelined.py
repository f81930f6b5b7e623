"""The gradients of a batch where the layers are divided over pipeline stages: the numbers of `step.batch_gradients`.

At rest every weight is divided over stage x fsdp, so that a checkpoint knows nothing of the pipeline. A step begins by
laying each stage's layers out on it, and ends by sending their gradients home. Micro-batches are those of
`train.accumulation_steps`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.config.rules import ROW_AXES
from opendeep_jax.config.schedule import micro_batches
from opendeep_jax.config.schema import RunConfig
from opendeep_jax.models.accounting import flops_per_token
from opendeep_jax.models.decoder import one_layer, scan_layers
from opendeep_jax.models.parameters import Arrays, ModelDefinition
from opendeep_jax.parallel.axes import BATCH_SPEC, sum_over_copies, weight_specs
from opendeep_jax.parallel.collectives import axis_size, per_device
from opendeep_jax.parallel.pipeline import StageFunctions, from_stages, pipelined_value_and_grad, to_stages
from opendeep_jax.parallel.schedule import StageLayout, make_schedule, stage_layout
from opendeep_jax.parallel.shares import Sum, all_entries, over_devices, values
from opendeep_jax.train.objective import DeviceArguments, Measured, Objective, joined, layer_losses, total_loss
from opendeep_jax.train.state import BASE


def stacked_layers(config: RunConfig) -> str:
    """Name of the stack that is divided over the stages: the MoE blocks, or in a dense model all blocks."""
    return "moe_layers" if config.model.num_moe_layers else "dense_layers"


def layers_on_stages(config: RunConfig, stages: int) -> StageLayout:
    """Return the stage of each layer. Leading dense layers are the first stage's, MTP modules the last one's."""
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
    config: RunConfig, definition: ModelDefinition, objective: Objective, arguments: DeviceArguments
) -> tuple[Arrays, Measured]:
    """Gradients and metrics of the global batch, whole, like those of `step.batch_gradients`.

    Raises:
        ConfigError: for frozen weights of another model, which lie on no stage.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if others := sorted(set(arguments.frozen) - {BASE}):
        raise ConfigError(
            f"parallel.stage = {mesh.shape['stage']}: a pipeline has no place for the other model {others[0]!r} that "
            "the objective reads. Give --parallel.stage=1, and divide the devices over fsdp, expert or tensor."
        )
    layout, prefix = layers_on_stages(config, mesh.shape["stage"]), stacked_layers(config) + "."
    whole: Any = PartitionSpec()  # in the place of arrays
    by_rows: Any = BATCH_SPEC
    specs = weight_specs(definition, mesh)
    specs = {name: _on_stage(spec) if name.startswith(prefix) else spec for name, spec in specs.items()}

    def lay_out(arrays: Arrays) -> Arrays:
        laid = {name: to_stages(layout, x) if name.startswith(prefix) else x for name, x in arrays.items()}
        return {name: jax.lax.with_sharding_constraint(x, specs[name]) for name, x in laid.items()}

    def device_program(arguments: DeviceArguments):
        return _device_gradients(config, definition, objective, layout, specs, arguments)

    def specs_of(arrays: Arrays) -> dict[str, PartitionSpec]:
        return {name: specs[name] for name in arrays}

    params, base = specs_of(arguments.params), specs_of(arguments.frozen.get(BASE, {}))
    frozen = {BASE: base} if base else {}
    divided = DeviceArguments(params, specs_of(arguments.router_bias), frozen, by_rows, whole, whole, whole)
    laid = arguments._replace(
        params=lay_out(arguments.params),
        router_bias=lay_out(arguments.router_bias),
        frozen={group: lay_out(arrays) for group, arrays in arguments.frozen.items()},
    )
    program = per_device(device_program, (divided,), (params, whole, PartitionSpec("stage")))
    grads, measured, layer_loads = program(laid)
    grads = {name: from_stages(layout, g) if name.startswith(prefix) else g for name, g in grads.items()}
    layer_loads = {name: from_stages(layout, load) for name, load in layer_loads.items()}
    return grads, measured._replace(loads=measured.loads | layer_loads)


def _on_stage(spec: PartitionSpec) -> PartitionSpec:
    """The spec of stacked layers once they are laid out."""
    return PartitionSpec("stage", *tuple(spec)[1:])


def _device_gradients(config, definition, objective, layout, specs, arguments: DeviceArguments):
    """One device's program: gradients, the batch's metrics, and the loads of this stage's layers."""
    mesh, stack = jax.sharding.get_abstract_mesh(), stacked_layers(config)
    stages, shards = mesh.shape["stage"], axis_size(ROW_AXES)
    params, router_bias, frozen = arguments.params, arguments.router_bias, arguments.frozen.get(BASE, {})
    micros = micro_batches(config.train, len(arguments.inputs.batch.tokens) * shards, shards)
    layers = {name: x for name, x in params.items() if name.startswith(stack + ".")}
    shared = {name: x for name, x in params.items() if name not in layers}
    constants = {name: x for name, x in (router_bias | frozen).items() if name.startswith(stack + ".")}

    def model_of(shared):
        return definition.model({**frozen, **shared, **layers}, router_bias)

    def embed(shared, microbatch):
        model, (inputs, context) = model_of(shared), microbatch
        x = model.embedding(inputs.batch.tokens)
        if stack == "dense_layers":
            return x, {}
        x, report = scan_layers(model.dense_layers, x, context, config.model)
        loss, measured = layer_losses(config, {"dense_layers": report}, arguments.rows)
        assert loss is None, "leading dense layers run where a pipeline takes no loss"
        return x, measured.metrics

    def layer(weights, constant, x, microbatch):
        function, state = one_layer(getattr(model_of(shared), stack), microbatch[1], config.model, scanned=True)
        arrays = {**weights, **constant}
        flat = [
            (path, variable.replace(arrays[f"{stack}.{'.'.join(map(str, path))}"]))
            for path, variable in nnx.to_flat_state(state)
        ]
        x, report = function(x, nnx.from_flat_state(flat))
        loss, measured = layer_losses(config, {stack: report}, arguments.rows)
        return x, jnp.float32(0) if loss is None else loss, measured

    def output(shared, x, microbatch):
        model, (inputs, context) = model_of(shared), microbatch
        out = model.outputs(x, context, [module.tokens for module in inputs.mtp])
        return total_loss(config, objective, out, model.head_kernel, arguments._replace(inputs=inputs))

    batch = arguments.inputs.batch
    context = model_of(shared).context(batch.tokens, batch.segment_ids, batch.positions, arguments.inputs.order)
    result = pipelined_value_and_grad(
        StageFunctions(embed, layer, output),
        make_schedule(stages, micros, config.parallel.stage_chunks),
        layout,
        shared,
        layers,
        constants,
        jax.tree.map(lambda x: x.reshape(micros, -1, *x.shape[1:]), (arguments.inputs, context)),
    )
    grads = sum_over_copies({**result.shared_gradients, **result.layer_gradients}, specs, mesh)
    output, layers = result.output_shares, result.layer_shares
    metrics = joined(output.metrics, all_entries(layers.metrics), result.embed_shares) | {"loss": Sum(result.loss)}
    measured = values(over_devices(output._replace(metrics=metrics), mesh.axis_names))
    within_stage = tuple(name for name in mesh.axis_names if name != "stage")
    return grads, measured, values(over_devices(layers.loads, within_stage))
