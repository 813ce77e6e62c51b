"""Every configuration key, with its type, its default and one line on what it does.

The YAML sections are the classes below. Unknown keys are refused. A value that depends on others
(`num_kv_heads`, `ffn_size`, `dp: auto`, ...) is None or "auto" here and is filled in by `load.resolve`,
so that all code after loading reads plain numbers. This module does not import torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def _as_text(value: Any) -> Any:
    """Return a number as its text and any other value as it is, for the type to judge (booleans are not numbers)."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Word = Annotated[str, BeforeValidator(_as_text)]
"""Text, or a number, which becomes its text."""

DTYPE_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
SMALLEST_BPE = 257
"""Entries of the smallest byte-level BPE: 256 bytes and the end of text."""


class Section(BaseModel):
    """Base of all sections: immutable, without unknown keys or silent conversions (strict numbers)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(Section):
    """The GPT model. The defaults are the GPT-2 family; rope + rmsnorm + swiglu + untied is the Llama family."""

    num_layers: Positive
    """Number of transformer layers."""
    hidden_size: Positive
    """Width of the residual stream."""
    num_heads: Positive
    """Number of query heads; hidden_size must be divisible by it."""
    num_kv_heads: Positive | None = None
    """Number of key and value heads (grouped-query attention); default num_heads."""
    ffn_size: Positive | None = None
    """Inner width of the MLP; default 4 x hidden_size."""
    seq_len: Positive
    """Tokens per sequence."""
    vocab_size: Positive | None = None
    """Rows of the embedding; default the tokenizer's size."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention, before the MLP and before the head."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Activation of the MLP; gelu is the tanh form of GPT-2."""
    position: Literal["learned", "rope"] = "learned"
    """Learned position embedding, or rotary embedding of queries and keys."""
    tie_embeddings: bool = True
    """Use the token embedding's weight in the head."""
    bias: bool = True
    """Use biases in linear layers (and in LayerNorm)."""
    dropout: Fraction = 0.0
    """Dropout after the embedding and on both residual branches."""
    attention_dropout: Fraction | None = None
    """Dropout of attention probabilities, inside scaled_dot_product_attention; default model.dropout."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Epsilon of the normalisation."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of initial weights; output projections are scaled by 1/sqrt(2 x num_layers)."""


class ParallelConfig(Section):
    """Split of the model and the batch over ranks."""

    dp: Positive | Literal["auto"] = "auto"
    """Data-parallel replicas; auto = world / (tp x pp x cp)."""
    tp: Positive = 1
    """Tensor-parallel ranks (matmuls split by column and row)."""
    pp: Positive = 1
    """Pipeline stages."""
    cp: Positive = 1
    """Context-parallel ranks (the sequence is split)."""
    cp_kind: Literal["ring", "ulysses"] = "ring"
    """Communication of context-parallel attention."""
    sequence_parallel: bool = False
    """Split norms, dropout and residuals over tp as well (by token)."""
    virtual_stages: Positive = 1
    """Model chunks per pipeline rank."""
    layers: Literal["balanced", "equal"] | list[NonNegative] = "balanced"
    """Layers per chunk: balanced by cost (embedding and head counted), equal, or a list in chunk order."""
    p2p_scatter: bool = False
    """Send 1/tp of each pipeline message and gather it on arrival."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zb_h2", "zbv"] = "1f1b"
    """Pipeline schedule."""


class OptimConfig(Section):
    """The optimizer, and the placement of its state."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Name of the optimizer."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """AdamW's decay rates of the first and second moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    momentum: Fraction = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Weight decay of matrices and embeddings only; decoupled for AdamW."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    warmup: NonNegative = 0
    """Steps of linear warm-up."""
    decay: Literal["none", "cosine", "linear"] = "cosine"
    """Shape of the decay after warm-up, until train.steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Final learning rate as a share of lr."""
    sharding: Literal["none", "zero1", "zero2", "zero3"] = "zero1"
    """ZeRO stage: how much of the training state is sharded over the data axis."""
    engine: Literal["native", "deepspeed"] = "native"
    """Engine that shards the state and runs the optimizer step."""
    shard_group: Literal["data", "node"] = "data"
    """Shard over all data ranks, or inside each node and replicate across nodes."""
    reshard: Literal["pass", "step"] = "pass"
    """zero3: free gathered parameters after each forward and backward of a block, or keep them until the update."""
    grad_dtype: Literal["fp32", "bf16"] | None = None
    """Dtype in which gradients are kept and accumulated; default fp32 (fp64 in fp64)."""
    reduce_dtype: Literal["fp32", "bf16"] | None = None
    """Dtype of gradient reductions over the data axis; default the gradient's."""
    state_dtype: Literal["fp32", "bf16"] | None = None
    """Dtype of optimizer state; default the master's."""
    offload: bool = False
    """Keep optimizer state in host memory."""
    bucket_mb: Annotated[float, Field(gt=0)] = 25.0
    """Gradients are reduced in buckets of at least this many MB (1e6 bytes); a block is never split."""


class TrainConfig(Section):
    """The training loop."""

    steps: Positive
    """Optimizer steps."""
    global_batch: Positive
    """Sequences per step, over all data ranks and micro-batches."""
    micro_batch: Positive = 1
    """Sequences per micro-batch per data rank."""
    seed: NonNegative = 0
    """Seed of weights and dropout."""
    dtype: Literal["fp64", "fp32", "bf16", "fp16"] = "fp32"
    """Dtype of parameters and activations."""
    loss_scale: Annotated[float, Field(ge=1, le=2.0**32)] = 65536.0
    """fp16: initial factor of a micro-batch's mean loss; halved after an overflow."""
    loss_scale_window: Positive = 1000
    """fp16: steps without an overflow after which the scale is doubled."""
    max_skipped: Positive = 10
    """Number of steps skipped in a row (loss or gradients not finite) after which the run fails."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Recompute in the backward instead of keeping: nothing, attention's inner part, or whole layers."""
    compile: bool = False
    """Apply torch.compile to code without collectives."""
    loss_chunks: Positive = 1
    """Pieces in which logits and loss are computed."""
    eval_every: NonNegative = 0
    """Steps between validations; 0: only before the first and after the last step where eval_batches > 0."""
    eval_batches: NonNegative = 0
    """Global batches per validation; 0 switches validation off."""


class DataConfig(Section):
    """Source and order of the tokens."""

    source: str = "stdlib"
    """stdlib (the Python standard library's sources), synthetic, or a path: text, folder, .bin, .npy, .bin/.idx."""
    tokenizer: str = "byte"
    """Tokenizer: byte, or bpe:SIZE (trained on the source and cached)."""
    dtype: Literal["auto", "uint8", "uint16", "int32", "uint32", "int64"] = "auto"
    """Type of the little-endian integers in a headerless .bin; auto: uint16, refused if the file looks wider."""
    order: Literal["epochs", "replacement"] = "epochs"
    """epochs: each window once per pass over the data, reshuffled every time; replacement: drawn independently."""
    seed: NonNegative = 0
    """Seed of the order of batches."""
    val_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share of the tokens held out for validation."""
    cache: str | None = None
    """Folder of prepared tokens; default $XDG_CACHE_HOME/dist_gpt or ~/.cache/dist_gpt."""


class CheckpointConfig(Section):
    """Checkpoints of the training state."""

    every: NonNegative = 0
    """Steps between checkpoints; 0: never."""
    keep: Positive = 2
    """Number of checkpoints kept."""
    async_save: bool = False
    """Write checkpoints while training continues."""


class ProfileConfig(Section):
    """The profiling window."""

    steps: Annotated[list[NonNegative], Field(min_length=2, max_length=2)] | None = None
    """[first, last] step of the window, counted from 1: every collective and every entry of the step list is kept."""
    torch: bool = False
    """Run torch.profiler in the window."""
    torch_ranks: list[NonNegative] = [0]
    """Ranks that run torch.profiler."""


class WandbConfig(Section):
    """Tracking with Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """Mode of the tracker: disabled, offline (files in the run directory) or online."""
    project: str = "dist_gpt"
    """Project name."""


class LogConfig(Section):
    """Console output and tracking."""

    every: Positive = 1
    """Steps between lines on the console; metrics.jsonl has every step."""
    wandb: WandbConfig = WandbConfig()


class SlurmConfig(Section):
    """Options of sbatch, and the launcher of the ranks inside the allocation."""

    starter: Literal["srun", "torchrun", "mpi"] = "srun"
    """srun: one task per rank (required on Frontier); torchrun: one task per node; mpi: mpirun in the allocation."""
    partition: str | None = None
    """--partition; null leaves it to the cluster, as with the keys below."""
    account: str | None = None
    """--account."""
    qos: str | None = None
    """--qos."""
    constraint: str | None = None
    """--constraint, for example gpu."""
    time: Word | None = None
    """--time: minutes, H:MM:SS or D-H:MM:SS; at least two minutes more than launch.grace_s."""
    gpus_per_node: NonNegative | None = None
    """--gpus-per-node; 0 or null: none are requested."""
    cpus_per_rank: Positive | None = None
    """--cpus-per-task, counted per rank (passed to srun as well, which does not inherit it from sbatch)."""
    requeue: bool = True
    """After a warning (USR1) and a save, requeue the job, which resumes from that checkpoint."""
    options: dict[str, Word] = {}
    """Further options of sbatch as long name: value, for example {mail-type: FAIL}; a flag has an empty value."""


class LaunchConfig(Section):
    """Start, supervision and end of the ranks."""

    nodes: Positive = 1
    """Number of nodes."""
    ranks_per_node: Positive | Literal["auto"] = "auto"
    """Ranks per node; auto: world / nodes when dp is a number, else one per GPU (without a GPU, tp x pp x cp)."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Communication backend: nccl (GPUs), gloo (CPUs), or auto: nccl where GPUs are visible."""
    single_copy: Literal["auto", "off"] = "auto"
    """On gloo, members of a group on one node read each other's memory where the system permits it; off: gloo carries
    all traffic."""
    bind: Literal["auto", "off"] = "auto"
    """CPU pinning: each CPU rank gets CPUs of its own if there are enough and it is not yet pinned; off: never."""
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """Deadline in seconds of each collective, and of the whole initialisation."""
    silence_s: Annotated[float, Field(ge=1)] = 30.0
    """Seconds without a heartbeat after which the launcher considers a rank stopped or cut off, and ends the job."""
    grace_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest time in seconds from a request to stop (SIGTERM, SIGUSR1) to the end of the save; a Slurm job is warned
    this long before its time limit."""
    max_restarts: NonNegative = 0
    """Largest number of times that ranks are restarted, from the newest checkpoint, after one of them failed."""
    preflight: Literal["strict", "warn", "off"] = "strict"
    """Checks before training starts: refuse to train with a problem, only report it, or do not check."""
    interface: str | None = None
    """Network interface between nodes; default the one whose route leads to the first node."""
    modules: list[str] = []
    """Environment modules that a Slurm job loads before anything else."""
    env: dict[str, Word] = {}
    """Environment variables set for every rank."""
    slurm: SlurmConfig = SlurmConfig()
    """Settings that only --via slurm uses."""
    elastic: bool = False
    """Continue with fewer ranks after a failure."""

    @property
    def reads_memory(self) -> bool:
        """True if ranks of a node are to read each other's memory where the system permits it."""
        return self.single_copy == "auto"


class Config(Section):
    """Configuration of a whole run."""

    name: str = "run"
    """Name of the run."""
    run_dir: str | None = None
    """Directory of the run; default runs/NAME."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()
    log: LogConfig = LogConfig()
    launch: LaunchConfig = LaunchConfig()

    @property
    def world_size(self) -> int:
        """Number of ranks of a resolved configuration; raises ValueError while dp is "auto"."""
        p = self.parallel
        if p.dp == "auto":
            raise ValueError("world_size of an unresolved configuration: parallel.dp is 'auto'")
        return p.dp * p.cp * p.tp * p.pp

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches per data rank and step."""
        p = self.parallel
        return self.train.global_batch // (int(p.dp) * self.train.micro_batch)
