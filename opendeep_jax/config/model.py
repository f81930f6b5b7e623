"""The configuration of a model: a tree of frozen dataclasses, complete, hashable and checked.

One decoder, whose settings make it DeepSeek-V3, Llama, Gemma or gpt-oss. Standard library only.
"""

import copy
from dataclasses import dataclass, replace
from typing import Literal

from opendeep_jax.config import checks
from opendeep_jax.config.limits import Count, Natural, NonNegative, Positive, Stretch
from opendeep_jax.config.model_rules import REMAT_NAMES

DType = Literal["float32", "bfloat16"]
RematPolicy = Literal["none", "full", "named"]

HYBRID_STACKS = {"M": "mamba_layers", "*": "attention_layers", "-": "dense_layers", "E": "moe_layers"}
"""Names of the stacks of layers by letter of a hybrid's pattern."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021), with a stretch for long contexts: YaRN (Peng et al. 2023), Llama 3's,
    or linear interpolation (Chen et al. 2023)."""

    theta: Positive = 10_000.0
    """Base of the geometric series of rotation frequencies."""
    interleaved: bool = True
    """Rotate neighboring pairs (DeepSeek) rather than the two halves of a head (Llama)."""
    yarn_factor: Stretch = 1.0
    """Factor by which the context is extended; 1 switches YaRN off."""
    yarn_original_length: Count = 4096
    """Context length before stretching."""
    yarn_beta_fast: Positive = 32.0
    """Dimensions that turn more often than this within the original length keep their frequency."""
    yarn_beta_slow: Positive = 1.0
    """Dimensions that turn less often than this within the original length are fully interpolated."""
    yarn_mscale: float = 1.0
    """YaRN's attention temperature, numerator."""
    yarn_mscale_all_dim: NonNegative = 1.0
    """YaRN's attention temperature, denominator; its square also scales the softmax."""
    yarn_truncate: bool = True
    """Round the bounds between kept and interpolated dimensions to whole ones; gpt-oss does not."""
    llama3_factor: Stretch = 1.0
    """Llama 3.1's stretch: slow dimensions turn this many times slower; 1 switches it off."""
    llama3_low_frequency: Positive = 1.0
    """Dimensions that turn less often than this within the original length are slowed by the whole factor."""
    llama3_high_frequency: float = 4.0
    """Dimensions that turn more often than this keep their frequency."""
    llama3_original_length: Count = 8192
    """Context length before Llama 3.1's stretch."""
    linear_factor: Stretch = 1.0
    """All dimensions turn this many times slower; 1 switches it off. Gemma 3: 8."""

    @property
    def yarn_reach(self) -> int:
        """The context that YaRN stretches to; 0 without it."""
        return int(self.yarn_original_length * self.yarn_factor) if self.yarn_factor > 1 else 0


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, section 2.1) or grouped-query attention."""

    kind: Literal["mla", "gqa"] = "mla"
    """`mla` caches one small latent per token; `gqa` caches num_kv_heads keys and values."""
    num_heads: Count = 8
    """Query heads H."""
    q_lora_rank: int = 0
    """MLA: rank of the query compression; 0 projects queries directly, as V2-Lite does."""
    kv_lora_rank: int = 64
    """MLA: size of the cached latent that keys and values are made of."""
    qk_nope_head_dim: int = 32
    """MLA: size of a head's part without rotation."""
    qk_rope_head_dim: int = 16
    """MLA: size of a head's rotated part; its key is shared by all heads."""
    v_head_dim: int = 32
    """MLA: size of a value head."""
    num_kv_heads: int = 8
    """GQA: key/value heads, each shared by num_heads / num_kv_heads query heads."""
    head_dim: int = 32
    """GQA: size of a query, key or value head."""
    rotated: bool = True
    """GQA: rotate queries and keys; False where other layers know the order (Nemotron-H)."""
    rotary_dim: int = 0
    """GQA: dimensions of a head that are rotated, its first ones; 0 rotates all."""
    latent_norm_epsilon: float = 1e-6
    """MLA: epsilon of the latents' norms."""
    qkv_bias: bool = False
    """GQA: queries, keys and values have biases (Qwen 2, gpt-oss)."""
    out_bias: bool = False
    """GQA: the output projection has a bias (gpt-oss)."""
    qk_norm: Literal["none", "head", "all_heads"] = "none"
    """GQA: RMSNorm of queries and keys before rotation, over each head (Qwen 3, Gemma 3) or all together (OLMo 2)."""
    sinks: bool = False
    """GQA: attention sinks, a learned score of each head in the softmax's denominator only (gpt-oss)."""
    query_scale: NonNegative = 0.0
    """Factor on the scores; 0 takes qk_head_dim ** -0.5."""
    logit_softcap: float = 0.0
    """GQA: bound of the scores, `c tanh(score / c)` (Gemma 2); 0 leaves them as they are."""
    window: int = 0
    """GQA: tokens that a query of a sliding layer sees, itself included."""
    sliding_layers: tuple[int, ...] = ()
    """GQA: indices of the layers that see `window` tokens only."""
    sliding_rope_theta: float = 0.0
    """GQA: base of the sliding layers' own, unstretched rotation; 0 rotates as the other layers do."""
    rope: RopeConfig = RopeConfig()
    """Position embedding."""

    @property
    def qk_head_dim(self) -> int:
        """Size of a query/key head as the softmax sees it."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.kind == "mla" else self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Size of a value head."""
        return self.v_head_dim if self.kind == "mla" else self.head_dim


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts (DeepSeekMoE; V3 section 2.1.2). `num_experts=0` makes every layer dense."""

    num_experts: Natural = 0
    """Routed experts E in each MoE layer; 0 for a dense model."""
    experts_per_token: int = 2
    """Routed experts K chosen for each token."""
    num_shared_experts: int = 1
    """Experts that every token passes through; realized as one feed-forward of this many times their width."""
    shared_expert_size: int = 0
    """Hidden width of one shared expert; 0 takes expert_size."""
    expert_size: int = 256
    """Hidden width F of one expert."""
    num_groups: int = 1
    """Groups the experts are divided into for node-limited routing."""
    groups_per_token: int = 1
    """Groups kept for each token; experts of the other groups cannot be chosen."""
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    """Router score: sigmoid (V3) or softmax over all experts (V2)."""
    normalize_weights: bool = True
    """Divide the chosen experts' weights by their sum (V3) or use the scores as they are (V2)."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed experts' output; 2.5 in V3."""
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    """A group's score: sum of its two best biased scores (V3) or its best score (V2)."""
    use_router_bias: bool = True
    """Balance without auxiliary loss: add a bias to the scores for selection only, moved by the expert load."""
    router_linear_bias: bool = False
    """Add a trained bias to the router's logits (gpt-oss)."""
    expert_bias: bool = False
    """Experts' projections have biases (gpt-oss)."""
    bias_update_speed: float = 1e-3
    """Change of a router bias after each step (u in V3)."""
    bias_update_until_tokens: int = 0
    """Freeze the biases once this many tokens are trained; 0 never freezes them. V3: 14.3T."""
    balance_loss_weight: float = 1e-4
    """Weight of the sequence-wise balance loss (alpha in V3); 0 leaves it out."""

    @property
    def shared_size(self) -> int:
        """Hidden width of the shared experts together."""
        return self.num_shared_experts * (self.shared_expert_size or self.expert_size)


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Mamba-2 (Dao and Gu 2024), the `M` layers of a hybrid."""

    num_heads: Count = 8
    """Heads, each with a state and a decay of its own."""
    head_dim: Count = 32
    """Size of a head's input and output."""
    state_size: Count = 16
    """Numbers that a state keeps for each of head_dim."""
    num_groups: Count = 1
    """Groups of heads that share input and output projections of their states (B and C)."""
    conv_kernel: Count = 4
    """Positions that the convolution before the states sees, its own included."""
    conv_bias: bool = True
    """The convolution has a bias."""
    time_step_min: NonNegative = 0.0
    """No time step is shorter."""
    time_step_max: NonNegative = 0.0
    """No time step is longer; 0 for no bound."""
    chunk_size: Count = 128
    """Positions that are computed at once, as attention would; the result does not depend on it."""

    @property
    def size(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: the heads' inputs, and what writes to and reads from the states."""
        return self.size + 2 * self.num_groups * self.state_size


@dataclass(frozen=True, kw_only=True)
class MTPConfig:
    """Multi-token prediction (V3 section 2.2): modules after the main model, sharing its embedding and head."""

    depth: Natural = 0
    """Number of modules; module k predicts the token k steps beyond the next one. V3: 1."""
    loss_weight: NonNegative = 0.3
    """Weight of the modules' mean loss (lambda in V3)."""
    final_loss_weight: NonNegative = 0.1
    """Weight once final_from_tokens tokens are trained."""
    final_from_tokens: Natural = 0
    """Tokens after which the final weight applies; 0 never. V3: 10T."""


@dataclass(frozen=True, kw_only=True)
class RematConfig:
    """Recomputation in the backward pass, per kind of block."""

    dense: RematPolicy = "named"
    """Dense blocks: `none` saves every activation, `full` saves the block's input only, `named` the names below."""
    moe: RematPolicy = "named"
    """MoE blocks, the MTP module's included: as above."""
    names: tuple[str, ...] = REMAT_NAMES
    """Activations that `named` saves. All together are what matmuls give: only cheap arithmetic and attention's scores
    are then recomputed, which is also the fastest on a CPU."""
    offload: tuple[str, ...] = ()
    """Activations that `named` moves to the host's memory until they are needed, on TPUs and GPUs; `block_input` is
    what a block always keeps."""


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """Execution of the model. Nothing here changes a result beyond rounding."""

    expert_exchange: Literal["auto", "ragged", "all_to_all", "gather"] = "auto"
    """Exchange of tokens with experts on other devices: sent once to each (`ragged`), the same with worst-case slots
    (`all_to_all`, for platforms without ragged collectives), or all tokens to all (`gather`, for few devices)."""
    exchange_buffer: Positive = 1.25
    """Rows of a device's expert buffer over the balanced number. More rows than that take further rounds; none is
    dropped."""
    dense_weights_over_experts: bool = False
    """Divide the weights outside the experts over the expert axis too, instead of a copy on each of its devices: less
    memory, but they then travel on the links that the tokens need."""
    batch_parts: Count = 1
    """Parts that each block takes a device's rows in: with 2, attention of one hides the other's exchange."""
    attention: str = ""
    """Implementation of attention; empty takes the platform's own."""
    grouped_matmul: str = ""
    """Implementation of the experts' matmuls; empty takes the platform's own."""
    cross_entropy: str = ""
    """Implementation of the head and its loss; empty takes the platform's own."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder: embedding, `num_dense_layers` dense blocks, then MoE blocks, final norm, head; or a hybrid, whose
    layers are what `layer_pattern` says."""

    vocab_size: Count = 8192
    """Rows V of the embedding and columns of the head; at least the tokenizer's vocabulary."""
    hidden_size: Count = 256
    """Width D of the residual stream."""
    num_layers: Count = 4
    """All blocks, the leading dense ones included, MTP's not."""
    num_dense_layers: Natural = 1
    """Leading blocks with a dense SwiGLU; all of them when moe.num_experts is 0. Not of a hybrid."""
    layer_pattern: str = ""
    """A hybrid's layers in order, each one mixer with a norm before it: M is Mamba-2, * attention, - a feed-forward, E
    a mixture of experts (Nemotron-H); empty for the usual blocks of attention and feed-forward."""
    mlp_size: int = 1024
    """Hidden width of the dense SwiGLU."""
    norm_epsilon: Positive = 1e-6
    """Epsilon of the norms."""
    norm: Literal["rms", "rms_zero_centered", "layer_zero_centered"] = "rms"
    """RMSNorm; RMSNorm whose scale is 1 + weight (Gemma); LayerNorm of the same kind, with a bias (Nemotron)."""
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """Norms before attention and feed-forward, after them (OLMo 2), or on both sides (Gemma 3)."""
    activation: Literal["silu", "gelu_tanh", "relu2", "clamped_swiglu"] = "silu"
    """Nonlinearity of the feed-forward; `clamped_swiglu` is gpt-oss's."""
    swiglu_alpha: NonNegative = 1.702
    """clamped_swiglu: slope inside the sigmoid."""
    swiglu_limit: Positive = 7.0
    """clamped_swiglu: bound of gate and up."""
    gated_mlp: bool = True
    """Multiply the activated gate by a second projection; without, the feed-forward is `activation(x U) D`."""
    mlp_bias: bool = False
    """The projections of the dense feed-forward and of the shared experts have biases (an option of Llama's)."""
    embedding_scale: Positive = 1.0
    """Factor on the embeddings, rounded to dtype. Gemma: hidden_size ** 0.5."""
    logit_softcap: NonNegative = 0.0
    """Bound of the logits, `c tanh(logit / c)` (Gemma 2); 0 leaves them as they are."""
    context_length: Natural = 0
    """Longest row that the positions are made for; 0 takes the longest that the run trains on, and with YaRN
    yarn_original_length x yarn_factor if that is longer."""
    init_std: Positive = 0.006
    """Standard deviation of every weight at the start. V3: 0.006."""
    tie_embeddings: bool = False
    """Use the embedding as the head."""
    dtype: DType = "bfloat16"
    """Compute dtype of matmuls and activations; routing, norms, softmax and losses are float32 in any case."""
    precision: Literal["default", "fp8"] = "default"
    """`fp8` multiplies by weights in E4M3 with V3's fine-grained scales (section 3.3), `default` in dtype."""
    weight_dtype: DType = "float32"
    """Storage of the master weights, bfloat16 rounded to stochastically; norm scales and routers are float32 in any
    case."""
    attention: AttentionConfig = AttentionConfig()
    """Attention."""
    mamba: MambaConfig = MambaConfig()
    """Mamba-2, for the layers M of layer_pattern."""
    moe: MoEConfig = MoEConfig()
    """Mixture of experts."""
    mtp: MTPConfig = MTPConfig()
    """Multi-token prediction."""
    remat: RematConfig = RematConfig()
    """Rematerialization."""
    execution: ExecutionConfig = ExecutionConfig()
    """Kernels, precision and communication."""

    _data = None  # of the run that the model belongs to; no field, as it is nothing of the model's own

    def __post_init__(self):
        checks.check_model(self)

    def of_run(self, data) -> "ModelConfig":
        """The same model as part of a run with this DataConfig, whose rows its context follows unless it is set."""
        model = copy.copy(self)
        object.__setattr__(model, "_data", data)
        return model

    def settled(self) -> "ModelConfig":
        """The same model with its context set, so that it is kept outside of its run."""
        return replace(self, context_length=self.max_length)

    def reaching(self) -> "ModelConfig":
        """The same model with a context that was set extended to where YaRN reaches, as vLLM reads it."""
        longer = self.context_length and self.attention.rope.yarn_reach > self.context_length
        return replace(self, context_length=self.attention.rope.yarn_reach) if longer else self

    @property
    def max_length(self) -> int:
        """Longest row that the positions are made for."""
        rope, rows = self.attention.rope, self._data.longest_row if self._data else 0
        return self.context_length or max(rows, rope.yarn_reach) or rope.yarn_original_length

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts, MTP's not counted."""
        if self.layer_pattern:
            return self.layer_pattern.count("E")
        return self.num_layers - self.num_dense_layers if self.moe.num_experts else 0

    @property
    def num_leading_dense_layers(self) -> int:
        """Blocks with a dense SwiGLU; of a hybrid, all layers without routed experts."""
        return self.num_layers - self.num_moe_layers

    @property
    def layer_stacks(self) -> dict[str, tuple[int, ...]]:
        """Return the stacks of layers in the model, by name."""
        if self.layer_pattern:
            kinds = {name: kind for kind, name in HYBRID_STACKS.items()}
            stacks = {
                name: tuple(i for i, letter in enumerate(self.layer_pattern) if letter == kind)
                for name, kind in kinds.items()
            }
        else:
            dense, layers = self.num_leading_dense_layers, range(self.num_layers)
            stacks = {"dense_layers": tuple(layers[:dense]), "moe_layers": tuple(layers[dense:])}
        return {name: layers for name, layers in stacks.items() if layers}
