"""Every configuration key, with its type, its default and one line on what it does.

The YAML sections are the classes below. Unknown keys are refused. A value that depends on others
(`num_kv_heads`, `ffn_size`, `dp: auto`, ...) is None or "auto" here and is filled in by `load.resolve`,
so that everything after loading reads plain numbers. No torch is imported here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def _as_text(value: Any) -> Any:
    """A number as its text; whatever else is left for the type to judge (true and false are no numbers)."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Word = Annotated[str, BeforeValidator(_as_text)]
"""Text that may look like a number."""

DTYPE_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
SMALLEST_BPE = 257
"""Entries of the smallest byte-level BPE: 256 bytes and the end of text."""


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused, no silent conversions (strict numbers)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(Section):
    """The GPT. The defaults are the GPT-2 family; rope + rmsnorm + swiglu + untied is the Llama family."""

    num_layers: Positive
    """Transformer layers."""
    hidden_size: Positive
    """Width of the residual stream."""
    num_heads: Positive
    """Query heads; hidden_size must be divisible by it."""
    num_kv_heads: Positive | None = None
    """Key and value heads (grouped-query attention); default num_heads."""
    ffn_size: Positive | None = None
    """Inner width of the MLP; default 4 x hidden_size."""
    seq_len: Positive
    """Tokens per sequence."""
    vocab_size: Positive | None = None
    """Rows of the embedding; default the tokenizer's size."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention, before the MLP and before the head."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """gelu is the tanh form of GPT-2."""
    position: Literal["learned", "rope"] = "learned"
    """Learned position embedding, or rotary on queries and keys."""
    tie_embeddings: bool = True
    """The head uses the token embedding's weight."""
    bias: bool = True
    """Biases in linear layers (and in LayerNorm)."""
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
    """How the model and the batch are split over ranks."""

    dp: Positive | Literal["auto"] = "auto"
    """Data-parallel copies; auto = world / (tp x pp x cp)."""
    tp: Positive = 1
    """Tensor-parallel ranks (matmuls split by column and row)."""
    pp: Positive = 1
    """Pipeline stages."""
    cp: Positive = 1
    """Context-parallel ranks (the sequence split)."""
    cp_kind: Literal["ring", "ulysses"] = "ring"
    """How context-parallel attention communicates."""
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
    """The optimizer and where its state lives."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Optimizer."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """AdamW's averaging constants."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    momentum: Fraction = 0.9
    """SGD's momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled for AdamW; matrices and embeddings only."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    warmup: NonNegative = 0
    """Steps of linear warm-up."""
    decay: Literal["none", "cosine", "linear"] = "cosine"
    """Shape of the decay after warm-up, until train.steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Final learning rate as a share of lr."""
    sharding: Literal["none", "zero1", "zero2", "zero3"] = "zero1"
    """What is sharded over the data axis."""
    engine: Literal["native", "deepspeed"] = "native"
    """Who shards and steps."""
    shard_group: Literal["data", "node"] = "data"
    """Shard over all data ranks, or inside a node and replicate across nodes."""
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
    """The loop."""

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
    """fp16: what a micro-batch's mean loss is multiplied by at first; halved after an overflow."""
    loss_scale_window: Positive = 1000
    """fp16: doubled after so many steps without an overflow."""
    max_skipped: Positive = 10
    """Steps in a row without finite loss and gradients, each skipped, after which the run gives up."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Computed again in the backward instead of kept: nothing, attention's inner part, or whole layers."""
    compile: bool = False
    """torch.compile of what holds no collective."""
    loss_chunks: Positive = 1
    """Pieces in which logits and loss are computed."""
    eval_every: NonNegative = 0
    """Steps between validations; 0: only before the first and after the last step where eval_batches > 0."""
    eval_batches: NonNegative = 0
    """Global batches per validation; 0 switches validation off."""


class DataConfig(Section):
    """Where tokens come from."""

    source: str = "stdlib"
    """stdlib (the Python standard library's sources), synthetic, or a path: text, folder, .bin, .npy, .bin/.idx."""
    tokenizer: str = "byte"
    """byte, or bpe:SIZE (trained on the source and cached)."""
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
    """When state is saved."""

    every: NonNegative = 0
    """Steps between checkpoints; 0: never."""
    keep: Positive = 2
    """Checkpoints kept."""
    async_save: bool = False
    """Write while training goes on."""


class ProfileConfig(Section):
    """The profiling window."""

    steps: Annotated[list[NonNegative], Field(min_length=2, max_length=2)] | None = None
    """[first, last] step of the window, counted from 1: every collective and every entry of the step list is kept."""
    torch: bool = False
    """Run torch.profiler in the window."""
    torch_ranks: list[NonNegative] = [0]
    """Ranks that run it."""


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """disabled, offline (files in the run directory) or online."""
    project: str = "dist_gpt"
    """Project name."""


class LogConfig(Section):
    """What is printed and tracked."""

    every: Positive = 1
    """Steps between lines on the console; metrics.jsonl has every step."""
    wandb: WandbConfig = WandbConfig()


class SlurmConfig(Section):
    """What sbatch is asked for, and how ranks are started inside the allocation."""

    starter: Literal["srun", "torchrun", "mpi"] = "srun"
    """srun: one task per rank (Frontier demands it); torchrun: one task per node; mpi: mpirun in the allocation."""
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
    """--gpus-per-node; 0 or null: none are asked for."""
    cpus_per_rank: Positive | None = None
    """--cpus-per-task, counted per rank (srun does not inherit it from sbatch: it is passed on)."""
    requeue: bool = True
    """Go back to the queue after a warning (USR1) and a save, and go on from there."""
    options: dict[str, Word] = {}
    """Further options of sbatch, long name: value, for example {mail-type: FAIL}; an empty value for a flag."""


class LaunchConfig(Section):
    """How ranks are started, watched and ended."""

    nodes: Positive = 1
    """Nodes."""
    ranks_per_node: Positive | Literal["auto"] = "auto"
    """Ranks per node; auto: world / nodes when dp is a number, else one per GPU (without a GPU, tp x pp x cp)."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Who communicates: nccl (GPUs), gloo (CPU), or auto: nccl where GPUs are visible."""
    single_copy: Literal["auto", "off"] = "auto"
    """On gloo, members of a group on one node read each other's memory where the system lets them; off: gloo carries
    everything."""
    bind: Literal["auto", "off"] = "auto"
    """On CPUs, each rank keeps to processors of its own where there are enough and nobody has bound it; off: never."""
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """One deadline for a collective, and for the whole initialisation."""
    silence_s: Annotated[float, Field(ge=1)] = 30.0
    """A rank that the launcher has not heard of for this long is taken as stopped, or cut off, and the job ends."""
    grace_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest time from a request to stop (SIGTERM, SIGUSR1) to the end of the save; a Slurm job is warned that long
    before its time is over."""
    max_restarts: NonNegative = 0
    """Times that the ranks are started again, from the newest checkpoint, after one of them failed."""
    preflight: Literal["strict", "warn", "off"] = "strict"
    """What is looked at before training starts: refuse what is wrong, only say it, or do not look."""
    interface: str | None = None
    """Network interface that nodes talk over; default the one whose route leads to the first node."""
    modules: list[str] = []
    """Environment modules that a Slurm job loads before anything else."""
    env: dict[str, Word] = {}
    """Variables set for every rank."""
    slurm: SlurmConfig = SlurmConfig()
    """Only for --via slurm."""
    elastic: bool = False
    """Go on with fewer ranks after a failure."""

    @property
    def reads_memory(self) -> bool:
        """Whether ranks of a node shall read each other's memory where they may."""
        return self.single_copy == "auto"


class Config(Section):
    """A whole run."""

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
        """Ranks of the job; only of a resolved configuration (dp is a number)."""
        p = self.parallel
        if p.dp == "auto":
            raise ValueError("world_size of an unresolved configuration: parallel.dp is 'auto'")
        return p.dp * p.cp * p.tp * p.pp

    @property
    def micro_batches(self) -> int:
        """Micro-batches per data rank and step."""
        p = self.parallel
        return self.train.global_batch // (int(p.dp) * self.train.micro_batch)
