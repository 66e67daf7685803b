"""RunConfig and its parts: frozen values that check themselves and name the remedy.

Every part is a frozen pydantic model that refuses unknown fields. A run is described by *progress*,
counted in reference samples: schedules, stopping and evaluation mean the same at every batch size
and every number of workers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from orchestrator.errors import ConfigError, did_you_mean

__all__ = [
    "LAMB",
    "SGD",
    "AcceleratorConfig",
    "Adam",
    "AdamW",
    "Adaptive",
    "BatchPolicy",
    "CheckpointConfig",
    "Constant",
    "Cosine",
    "DataConfig",
    "EvaluationConfig",
    "Exponential",
    "FailureConfig",
    "Fixed",
    "FleetConfig",
    "Goodput",
    "HealthConfig",
    "LayoutConfig",
    "Linear",
    "Penalties",
    "PlanningConfig",
    "Policy",
    "Ramp",
    "Recipe",
    "Rule",
    "RunConfig",
    "ScaleConfig",
    "Step",
    "Stop",
    "StorageConfig",
    "TelemetryConfig",
    "WarmUp",
    "WarmupStableDecay",
    "apply_overrides",
    "differing_fields",
    "explain_validation",
    "parse_config",
    "parse_value",
]

Auto = Literal["auto"]
Rule = Literal["auto", "none", "linear", "sqrt", "adascale"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
ENDPOINT = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?/?")
NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,45}[a-z0-9])?")
QUEUE_NAME = "use 1 to 47 lower-case letters, digits, '.', '_' or '-', starting and ending with a letter or digit"


class Part(BaseModel):
    """Base of every config part: frozen, unknown fields refused, NaN and infinity refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


# -- recipe: what the user knows to work -------------------------------------------------------


class SGD(Part):
    """Stochastic gradient descent with momentum (``torch.optim.SGD``)."""

    name: Literal["sgd"] = "sgd"
    """Which optimizer."""
    learning_rate: PositiveFloat
    """Peak learning rate at the reference batch."""
    momentum: BelowOne = 0.9
    """Momentum coefficient; 0 switches it off."""
    nesterov: bool = False
    """Nesterov's variant; needs momentum above 0."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGD:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=true needs momentum above 0: set momentum=0.9 or nesterov=false")
        return self


class Adaptive(Part):
    """What the optimizers of Adam's family share."""

    name: str
    """Which optimizer."""
    learning_rate: PositiveFloat
    """Peak learning rate at the reference batch."""
    beta1: BelowOne = 0.9
    """Decay of the first moment."""
    beta2: BelowOne = 0.999
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""


class Adam(Adaptive):
    """Adam (``torch.optim.Adam``)."""

    name: Literal["adam"] = "adam"
    """Which optimizer."""


class AdamW(Adaptive):
    """Adam, with the decay of ``recipe.penalties.weight_decay`` decoupled from the gradient."""

    name: Literal["adamw"] = "adamw"
    """Which optimizer."""


class LAMB(Adaptive):
    """Layer-wise adaptive moments (DeepSpeed's fused kernel: GPU and ZeRO stage 0 only)."""

    name: Literal["lamb"] = "lamb"
    """Which optimizer."""
    eps: PositiveFloat = 1e-6
    """Added to the denominator."""


class WarmUp(Part):
    """What all schedules share."""

    name: str
    """Which schedule."""
    warmup: Fraction = 0.0
    """Share of the run's length in which the rate rises linearly from 0."""


class Constant(WarmUp):
    """The peak learning rate after the warm-up."""

    name: Literal["constant"] = "constant"
    """Which schedule."""


class Linear(WarmUp):
    """Linear decay from the peak to ``final`` of it."""

    name: Literal["linear"] = "linear"
    """Which schedule."""
    final: Fraction = 0.0
    """Share of the peak rate left at the end."""


class Cosine(WarmUp):
    """Half a cosine from the peak to ``final`` of it."""

    name: Literal["cosine"] = "cosine"
    """Which schedule."""
    final: Fraction = 0.0
    """Share of the peak rate left at the end."""


class Step(WarmUp):
    """Multiply by ``factor`` at each of ``at`` (shares of the run's length)."""

    name: Literal["step"] = "step"
    """Which schedule."""
    at: tuple[Fraction, ...] = (0.5, 0.75)
    """Where the rate drops, as shares of the run's length, rising."""
    factor: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """What the rate is multiplied by at each drop."""

    @field_validator("at")
    @classmethod
    def _rising(cls, at: tuple[float, ...]) -> tuple[float, ...]:
        if list(at) != sorted(set(at)):
            raise ValueError("the drops must rise, as in 0.5,0.75")
        return at


class Exponential(WarmUp):
    """Exponential decay from the peak to ``final`` of it."""

    name: Literal["exponential"] = "exponential"
    """Which schedule."""
    final: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    """Share of the peak rate left at the end."""


class WarmupStableDecay(WarmUp):
    """Warm-up, a plateau, then linear decay to ``final`` over the last ``decay`` of the run."""

    name: Literal["wsd"] = "wsd"
    """Which schedule."""
    decay: Fraction = 0.2
    """Share of the run's length that the final decay takes."""
    final: Fraction = 0.0
    """Share of the peak rate left at the end."""

    @model_validator(mode="after")
    def _fits(self) -> WarmupStableDecay:
        if self.warmup + self.decay > 1.0:
            raise ValueError("warmup + decay exceed the whole run: make their sum at most 1")
        return self


Optimizer = Annotated[SGD | Adam | AdamW | LAMB, Field(discriminator="name")]
Schedule = Annotated[Constant | Linear | Cosine | Step | Exponential | WarmupStableDecay, Field(discriminator="name")]


class Penalties(Part):
    """Regularisation that pulls weights towards zero; applied to the fp32 weights at each step, after clipping."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay: weights shrink by learning_rate x weight_decay each step (Loshchilov & Hutter 2019)."""
    l2: NonNegativeFloat = 0.0
    """Coupled L2: adds l2 x w to the gradient, the gradient of l2/2 |w|^2."""
    l1: NonNegativeFloat = 0.0
    """L1: adds l1 x sign(w) to the gradient, the gradient of l1 |w|_1."""
    exempt: Literal["none", "norm_and_bias"] = "norm_and_bias"
    """Which parameters are left out: none, or all with fewer than two dimensions."""


class Stop(Part):
    """When the run ends: whichever comes first. Lengths are counted at the reference batch."""

    steps: PositiveInt | None = None
    """Length in optimizer steps at the reference batch."""
    epochs: PositiveFloat | None = None
    """Length in passes over the training set."""
    samples: PositiveInt | None = None
    """Length in samples."""
    wall_time_s: PositiveFloat | None = None
    """Stop after so many seconds of training, summed over attempts."""
    metric: str | None = None
    """Name of an evaluation metric that ends the run when it reaches the target."""
    at_least: float | None = None
    """Target for a metric that grows, such as accuracy."""
    at_most: float | None = None
    """Target for a metric that falls, such as loss."""

    @model_validator(mode="after")
    def _consistent(self) -> Stop:
        lengths = [n for n in ("steps", "epochs", "samples") if getattr(self, n) is not None]
        if len(lengths) > 1:
            raise ValueError(f"{' and '.join(lengths)} are given: keep one of steps, epochs, samples")
        if not lengths and self.wall_time_s is None and self.metric is None:
            raise ValueError("nothing ends the run: give one of steps, epochs, samples, wall_time_s, metric")
        targets = [self.at_least, self.at_most].count(None)
        if self.metric is not None and targets != 1:
            raise ValueError(f"metric={self.metric!r} needs exactly one of at_least and at_most")
        if self.metric is None and targets != 2:
            raise ValueError("at_least and at_most need metric: name the evaluation metric they belong to")
        return self

    @property
    def has_length(self) -> bool:
        """Whether the run has a length that schedules can be laid over."""
        return not (self.steps is None and self.epochs is None and self.samples is None)


class Recipe(Part):
    """What the user knows to work, at a reference batch."""

    batch: PositiveInt
    """The reference batch: global samples per optimizer step the recipe was tuned at."""
    optimizer: Optimizer
    """Optimizer and its settings at the reference batch."""
    schedule: Schedule = Constant()
    """Learning-rate schedule over progress."""
    penalties: Penalties = Penalties()
    """Weight decay, L2 and L1."""
    clip_norm: PositiveFloat | None = None
    """Clip the global gradient norm to this; none leaves it."""
    stop: Stop
    """When the run ends."""

    @model_validator(mode="after")
    def _schedule_needs_length(self) -> Recipe:
        needs = self.schedule.name != "constant" or self.schedule.warmup > 0
        if needs and not self.stop.has_length:
            raise ValueError(
                f"schedule {self.schedule.name!r} is laid over the run's length, and stop gives none: "
                "set one of stop.steps, stop.epochs, stop.samples, or the schedule to constant without warmup"
            )
        return self


# -- how it is run -----------------------------------------------------------------------------


class BatchPolicy(Part):
    """What all policies share: how learning rate, progress and the noise behind both follow the batch."""

    name: str
    """Which policy."""
    rule: Rule = "auto"
    """How the learning rate follows the batch; auto: what belongs to the optimizer, and its other settings with it."""
    noise_interval_steps: PositiveInt = 10
    """Steps between two measurements of the noise at first, a fifth until an estimate; then as noise_cost allows."""
    noise_cost: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    """Share of a step's time that measuring the gradient noise may take on average; 1: any, and the interval stays."""
    noise_preconditioned: bool = False
    """Measure the noise as Adam's update sees it, each parameter tensor over the root of its mean second moment."""


class Fixed(BatchPolicy):
    """The global batch stays as planned, whatever happens to the workers."""

    name: Literal["fixed"] = "fixed"
    """Which policy."""


class Ramp(BatchPolicy):
    """Batches by progress, as written down beforehand."""

    name: Literal["ramp"] = "ramp"
    """Which policy."""
    at: tuple[Fraction, ...] = (0.0, 0.25, 0.5)
    """Where the batch changes, as shares of the run's length, rising."""
    batches: tuple[PositiveInt, ...]
    """The global batch from each of these on."""

    @model_validator(mode="after")
    def _one_batch_each(self) -> Ramp:
        if list(self.at) != sorted(set(self.at)) or not self.at:
            raise ValueError("the shares in at must rise, as in 0,0.25,0.5")
        if len(self.at) != len(self.batches):
            raise ValueError(f"{len(self.at)} shares in at and {len(self.batches)} batches: give one batch for each")
        return self


class Goodput(BatchPolicy):
    """The batch of the highest goodput: samples per second times how far a sample of that batch gets the recipe."""

    name: Literal["goodput"] = "goodput"
    """Which policy."""
    min_batch: PositiveInt | Auto = "auto"
    """Smallest global batch; auto: the reference batch."""
    max_batch: PositiveInt | Auto = "auto"
    """Largest global batch; auto: 64 times the reference batch, and at most a quarter of the training set."""
    min_gain: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Change only for so much more goodput."""
    min_interval_steps: PositiveInt = 10
    """Steps between two changes."""
    explore: bool = True
    """Time a second micro batch in the first steps, at the same global batch."""
    guard_sigma: PositiveFloat = 3.0
    """Take a change back when the loss is worse than expected by so many standard errors."""
    seesaw: bool = False
    """Where the schedule decays, grow the batch up to the noise scale (Meterez et al. 2025, arXiv:2510.14717)."""

    @model_validator(mode="after")
    def _range_rises(self) -> Goodput:
        if self.min_batch != "auto" and self.max_batch != "auto" and self.min_batch > self.max_batch:
            raise ValueError(f"min_batch={self.min_batch} exceeds max_batch={self.max_batch}: swap them")
        return self


Policy = Annotated[Fixed | Ramp | Goodput, Field(discriminator="name")]


class LayoutConfig(Part):
    """How one optimizer step is laid out over workers and memory; "auto" lets the plan choose."""

    global_batch: PositiveInt | Auto = "auto"
    """Samples per optimizer step over all workers; auto: the reference batch."""
    micro_batch: PositiveInt | Auto = "auto"
    """Samples per worker and forward pass; auto: what accumulation leaves."""
    accumulation: PositiveInt | Auto = "auto"
    """Micro batches per optimizer step; auto: 1, or what micro_batch leaves."""
    zero_stage: Literal[0, 1, 2, 3] | Auto = "auto"
    """What ZeRO partitions: 0 nothing, 1 optimizer state, 2 + gradients, 3 + parameters; auto: 1, or 0 alone."""
    offload: Literal["none", "optimizer", "all"] | Auto = "auto"
    """What moves to host memory: nothing, optimizer state, or parameters too (stage 3); auto: nothing."""
    activation_checkpointing: bool | Auto = "auto"
    """Recompute the activations of repeated blocks in the backward pass; auto: no."""
    precision: Literal["fp32", "bf16", "fp16"] | Auto = "auto"
    """Type of forward and backward; auto: bf16 where the accelerator has it, fp16 on older GPUs, fp32 on CPU."""
    sync_batch_norm: bool = False
    """Compute batch-norm statistics over the whole micro batch of all workers, not over each worker's."""
    compile: bool | Auto = "auto"
    """Compile the model with torch.compile; auto: on GPUs of compute capability 8.0 and more, but in ZeRO stage 3."""
    tf32: bool | Auto = "auto"
    """Round the factors of fp32 matrix products to TF32; auto: on GPUs that have it, beside bf16 or fp16."""
    fused_optimizer: bool | Auto = "auto"
    """Update all weights in a few kernels; auto: on GPUs."""
    channels_last: bool | Auto = "auto"
    """Keep the channels of a pixel together in memory; auto: on GPUs in 16 bit, for models with convolutions."""
    attention: Literal["flash", "efficient", "math"] | Auto = "auto"
    """Kernel of scaled_dot_product_attention; auto: torch's choice at each call."""


class ScaleConfig(Part):
    """How many workers, and what each one holds."""

    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Data-parallel workers: a number, or a range such as 2,8 that follows the cluster where it shares the batch."""
    resize_interval_s: PositiveFloat = 60.0
    """How often a run with a range looks whether there is room for more workers, in s; it grows when it next saved."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs reserved per worker."""
    accelerators_per_worker: Literal[0, 1] | Auto = "auto"
    """Accelerators per worker; auto: 1 where the cluster has any, else 0."""

    @field_validator("workers")
    @classmethod
    def _range_rises(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError(f"the range falls: write {workers[1]},{workers[0]}")
        return workers


class AcceleratorConfig(Part):
    """An accelerator that the table does not know, or knows differently; rates as its data sheet has them, dense."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    """What ``--accelerator`` and Ray call it, in lower case."""
    memory_gib: PositiveFloat
    """Memory, in GiB."""
    bf16_tflops: NonNegativeFloat = 0.0
    """Peak of bf16 matrix products; 0: it has none."""
    fp16_tflops: NonNegativeFloat = 0.0
    """Peak of fp16 matrix products; 0: it has none."""
    fp32_tflops: PositiveFloat
    """Peak of fp32 matrix products."""
    memory_gb_per_s: PositiveFloat
    """Bandwidth of its memory."""
    link_gb_per_s: PositiveFloat = 25.0
    """To another one of the node, in one direction."""
    network_gbit_per_s: PositiveFloat = 25.0
    """Its share of the node's network."""
    per_node: PositiveInt = 8
    """How many a node holds."""
    matmul_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    """What large matrix products reach of the peak."""


class PlanningConfig(Part):
    """What the plan cannot know by itself."""

    accelerator: AcceleratorConfig | None = None
    """An accelerator of your own."""
    price_per_hour: NonNegativeFloat | None = None
    """Price of a worker's accelerator, or on CPUs of a worker, for an hour, in your currency; none: no cost is said."""
    memory_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of a device's memory that the plan may count on; less where others use the device too."""


class EvaluationConfig(Part):
    """When the held-out set is evaluated; always once at the end."""

    every_epochs: PositiveFloat = 1.0
    """Evaluate each time progress passes a multiple of this many epochs."""
    batch: PositiveInt = 256
    """Samples per worker and forward pass in evaluation."""


class CheckpointConfig(Part):
    """Where a run's folder is, and how often its state is saved."""

    uri: str = "runs"
    """What holds the runs: a folder, relative ones from the working directory, or s3://BUCKET/PREFIX."""
    interval_s: PositiveFloat | Auto = 60.0
    """Seconds between checkpoints; auto: what loses the least, by the cost of a save and the failures so far."""
    interval_steps: PositiveInt | None = None
    """Also save every so many optimizer steps."""
    interval_samples: PositiveInt | None = None
    """Also save each time that progress has passed a multiple of so many reference samples, whatever the batch."""
    keep: PositiveInt = 2
    """How many checkpoints are kept."""
    best: str | None = None
    """Save when this metric is better than ever, and keep that checkpoint too: accuracy:max or loss:min, say."""

    @field_validator("best")
    @classmethod
    def _names_a_direction(cls, best: str | None) -> str | None:
        if best is not None and not re.fullmatch(r"[^:]+:(max|min)", best):
            raise ValueError(f"{best!r} names no metric and direction: write accuracy:max or loss:min, for example")
        return best


class DataConfig(Part):
    """How Parquet data is read. What the order of the samples depends on belongs to the run: it cannot change later."""

    mode: Literal["memory", "streaming"] | Auto = "auto"
    """Where a data set lies: in memory whole, or read as it is needed; auto: in memory up to 1 GiB uncompressed."""
    window: PositiveInt = 16
    """Row groups that are shuffled together when streaming; a worker holds this window and the next."""
    lanes: PositiveInt = 1
    """Parts of a window that each batch is dealt from; at n lanes each of n workers reads an nth of the data."""
    threads: PositiveInt = 4
    """Threads of each worker that read and decode."""
    ahead: NonNegativeInt = 2
    """Steps for which a worker decodes ahead."""

    @model_validator(mode="after")
    def _lanes_fit(self) -> DataConfig:
        if self.lanes > self.window:
            raise ValueError(f"lanes={self.lanes} exceeds window={self.window}: a lane is at least one row group")
        return self


class StorageConfig(Part):
    """How S3 and compatible stores are reached. Credentials come from the usual chain of AWS, never from here."""

    endpoint_url: str | None = None
    """Address of a compatible store, as in http://10.0.0.5:8333; none: AWS_ENDPOINT_URL, and without it AWS."""
    region: str | None = None
    """Region of the bucket; none: the usual chain's, such as AWS_REGION."""
    addressing: Literal["path", "virtual"] | Auto = "auto"
    """Whether the bucket stands in the path or in the host name; auto: in the path where there is an endpoint."""
    retry_budget_s: PositiveFloat = 120.0
    """Seconds for which a failing request is tried again."""

    @field_validator("endpoint_url")
    @classmethod
    def _is_an_address(cls, url: str | None) -> str | None:
        if url is not None and not ENDPOINT.fullmatch(url):
            raise ValueError("write it as http://HOST:PORT or https://HOST, without user, password and path")
        return url


class FailureConfig(Part):
    """What a run does about trouble."""

    max_restarts: NonNegativeInt = 3
    """How often lost workers are replaced, without progress in between, before the run fails."""
    max_preemptions: NonNegativeInt = 100
    """The same for workers whose nodes were taken away after notice."""
    hang_factor: PositiveFloat = 50.0
    """A step that takes so many times as long as usual hangs: its stacks are written down, and the run starts again."""
    hang_least_s: PositiveFloat = 600.0
    """Seconds that a step may take in any case."""
    skip_nonfinite_steps: NonNegativeInt = 0
    """Optimizer steps in a row that may be skipped because of a NaN or infinite gradient; 0 stops the run."""
    on_corrupt_row_group: Literal["stop", "skip"] = "stop"
    """A row group that cannot be read: stop the run, or count it and use the next readable one's samples instead."""
    storage_budget_s: PositiveFloat = 900.0
    """Seconds for which checkpoints may fail to reach S3, while training goes on, before the run stops."""
    stop_grace_s: PositiveFloat = 60.0
    """Seconds that workers get to finish the step and save after a signal."""


class HealthConfig(Part):
    """What each worker group checks of itself before its first step."""

    rates: bool | Auto = "auto"
    """Time matrix products and transfers; auto: on accelerators and on several nodes. The rest is always looked at."""
    slow_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """A rank with less than this share of the median rank's rates, or free device memory, is named."""
    exclude: bool = False
    """Start the workers anew without the node of a rank so named, where there is room elsewhere."""
    max_clock_skew_s: PositiveFloat = 2.0
    """Seconds by which a host's clock may differ from the others' before that is said."""
    min_free_disk_gib: NonNegativeFloat = 2.0
    """GiB of disk that should be free for checkpoints on each host."""


class TelemetryConfig(Part):
    """What a run says of itself."""

    progress_interval_s: PositiveFloat = 2.0
    """Seconds between two progress lines where output is not a terminal."""
    enabled: bool = True
    """Time the parts of each step and export metrics through the cluster's hub; records are written in any case."""
    bind: str = "127.0.0.1"
    """Address at which the hub is served; the first run on a cluster decides. 0.0.0.0 for a Prometheus elsewhere."""
    port: Annotated[int, Field(ge=1, le=65_435)] = 9400
    """Port of the hub, or the next one that is free."""
    ttl_s: PositiveFloat = 10.0
    """Seconds of silence after which a worker's metrics disappear."""
    tokens_per_sample: PositiveFloat | None = None
    """Tokens in a sample, to count them."""
    flops_per_sample: PositiveFloat | None = None
    """FLOPs of a sample's forward and backward pass, for model FLOP/s; none: what the planner traced."""
    peak_flops_per_s: PositiveFloat | None = None
    """Peak FLOP/s of a worker's device, for the model FLOP/s utilization; none: the planner's table, not for CPUs."""
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Experiment trackers that the records are also sent to."""
    profile: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step of which rank 0 leaves a torch profiler trace in the run's folder."""

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_is_enough(cls, trackers: object) -> object:
        return (trackers,) if isinstance(trackers, str) else trackers

    @field_validator("profile")
    @classmethod
    def _steps_rise(cls, profile: tuple[int, int] | None) -> tuple[int, int] | None:
        if profile is not None and profile[0] > profile[1]:
            raise ValueError(f"the range falls: write {profile[1]},{profile[0]}")
        return profile


class FleetConfig(Part):
    """How the run shares a cluster with others: with a queue it is given devices, and waits where it gets none."""

    queue: str | None = None
    """Queue in which it takes part; none: it takes what it needs at once, as if it were alone."""
    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    """Each point doubles its weight against others."""
    deadline_s: PositiveFloat | None = None
    """Seconds from its submission by which it should have ended; none: it is in no hurry."""
    policy: Literal["goodput", "fair", "fifo"] = "goodput"
    """Who gets how many devices; the first run on a cluster decides it for all."""
    uri: str | None = None
    """Folder or s3://BUCKET/PREFIX of the fleet's book, seen by the head; none: .fleet beside the runs."""

    @field_validator("queue")
    @classmethod
    def _is_a_safe_queue(cls, queue: str | None) -> str | None:
        if queue is not None and (not NAME.fullmatch(queue) or ".." in queue):
            raise ValueError(QUEUE_NAME)
        return queue


class RunConfig(Part):
    """Everything that determines a run, but the task itself."""

    name: str
    """Identifies the run and its folder: lower-case letters, digits, '.', '_', '-', at most 47 characters."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initialisation, sample order and every random choice."""
    recipe: Recipe
    """What the user knows to work."""
    policy: Policy = Goodput()
    """Who chooses the batch while the run goes."""
    layout: LayoutConfig = LayoutConfig()
    """How one optimizer step is laid out."""
    scale: ScaleConfig = ScaleConfig()
    """How many workers."""
    planning: PlanningConfig = PlanningConfig()
    """What the plan is told: an accelerator of your own, prices."""
    data: DataConfig = DataConfig()
    """How data is read."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """When the held-out set is evaluated."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Where and how often state is saved."""
    storage: StorageConfig = StorageConfig()
    """How S3 is reached."""
    health: HealthConfig = HealthConfig()
    """What is checked before the first step."""
    failures: FailureConfig = FailureConfig()
    """What is done about trouble."""
    fleet: FleetConfig = FleetConfig()
    """How it shares a cluster with other runs."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """What the run says of itself."""

    @field_validator("name")
    @classmethod
    def _is_a_safe_name(cls, name: str) -> str:
        # The name becomes a folder, a Ray submission id and a Kubernetes object: the strictest of the three decides.
        if not NAME.fullmatch(name) or ".." in name:
            raise ValueError(
                "use 1 to 47 lower-case letters, digits, '.', '_' or '-', starting and ending with a letter or digit"
            )
        return name


# -- overrides ---------------------------------------------------------------------------------

PartT = TypeVar("PartT", bound=Part)
Path = tuple[str, ...]

# Fields of which a config holds one at most: setting one by an override drops the others.
RIVALS = (
    {"recipe.stop.steps", "recipe.stop.epochs", "recipe.stop.samples"},
    {"recipe.stop.at_least", "recipe.stop.at_most"},
)


def parse_config(data: Mapping[str, Any], model: type[PartT] = RunConfig) -> PartT:  # type: ignore[assignment]
    """Validate ``data`` into ``model``.

    Raises:
        ConfigError: one line per finding, each naming the field, the value and the remedy.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, model)) from None


def apply_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """Return ``config`` with ``dotted.field=value`` overrides applied, all checked together.

    Values are read as numbers, true/false, none or auto where they look like it; a comma makes a list
    where the field holds one. Changing the name of a choice, such as ``recipe.optimizer.name``, keeps the
    settings that the new choice knows and drops the others. Setting one of ``recipe.stop``'s steps, epochs and
    samples drops the other two, and at_least drops at_most.

    Raises:
        ConfigError: one line per finding, each naming the field, the value and the remedy.
    """
    old = config.model_dump(mode="python", warnings=False)
    new = copy.deepcopy(old)
    given: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigError(f"--set {override!r}: write it as dotted.field=value, as in scale.workers=2")
        given[name] = _set(new, name.split("."), text.strip())
    for path, choices in _choices(RunConfig):
        _switch(path, choices, old, new, given)
    for rivals in RIVALS:
        if any(given.get(name) is not None for name in rivals):
            for name in rivals - given.keys():
                *parents, leaf = name.split(".")
                _at(new, parents)[leaf] = None
    return parse_config(new)


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return ``"field: old -> new"`` for every leaf in which two dumped configs differ."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differing_fields(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def parse_value(text: str) -> Any:
    """Read one value of a command line: a number, true/false, none, or else the text itself."""
    lowered = text.lower()
    if lowered in ("none", "null"):
        return None
    if lowered in ("true", "false"):
        return lowered == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _set(data: dict[str, Any], path: list[str], text: str) -> Any:
    """Set the field at ``path`` and return its value."""
    for depth, key in enumerate(path[:-1]):
        node = _at(data, path[:depth])
        if node.get(key) is None and _is_optional_section(path[: depth + 1]):
            node[key] = {}
        if not isinstance(node.get(key), dict):
            sections = [name for name, value in node.items() if isinstance(value, dict)]
            where = ".".join(path[: depth + 1])
            if key in node:
                raise ConfigError(f"{where!r} is a field, not a section: write {where}=value")
            raise ConfigError(f"unknown section {where!r}; {did_you_mean(key, sections)}")
    node, leaf = _at(data, path[:-1]), path[-1]
    fields = _fields(tuple(path[:-1]))
    if leaf not in fields:
        raise ConfigError(f"unknown field {'.'.join(path)!r}; {did_you_mean(leaf, fields)}")
    optional = _is_optional_section(path)
    if optional and text.lower() in ("none", "null"):
        node[leaf] = None
        return None
    if optional or isinstance(node.get(leaf), dict):
        names = _fields(tuple(path)) if optional else node[leaf]
        raise ConfigError(f"{'.'.join(path)!r} is a section: set one of its fields: {', '.join(names)}")
    node[leaf] = _read(text, fields[leaf])
    return node[leaf]


def _is_optional_section(path: Sequence[str]) -> bool:
    """Whether ``path`` is a section that a config may lack, such as an accelerator of one's own."""
    *parents, leaf = path
    annotation = _fields(tuple(parents)).get(leaf)
    return NoneType in get_args(annotation) and bool(_parts(annotation))


def _at(data: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for key in path:
        data = data[key]
    return data


def _fields(path: Path) -> dict[str, Any]:
    """Return name -> annotation of a section's fields; a choice has those of all its members: its name may change."""
    models: list[type[Part]] = [RunConfig]
    for key in path:
        models = _parts(models[0].model_fields[key].annotation)
    return {name: field.annotation for model in models for name, field in model.model_fields.items()}


def _read(text: str, annotation: Any) -> Any:
    """Read ``text`` for a field: as it stands where the field is text, as a list where it holds one or has a comma."""
    if annotation is str:
        return text
    if set(get_args(annotation)) == {str, NoneType}:
        return None if text.lower() in ("none", "null") else text
    if text.lower() in _words(annotation):
        return text.lower()
    if "," in text or get_origin(annotation) is tuple:
        return tuple(parse_value(part.strip()) for part in text.split(",") if part.strip())
    return parse_value(text)


def _words(annotation: Any) -> set[str]:
    """Return the words that a field's choices name; "none" is one of them where it says what is moved, not nothing."""
    members = (annotation, *get_args(annotation))
    return {
        value
        for member in members
        if get_origin(member) is Literal
        for value in get_args(member)
        if isinstance(value, str)
    }


def _parts(annotation: Any) -> list[type[Part]]:
    """Return the config parts an annotation allows: one for a section, several for a choice, none for a field."""
    members = (annotation, *get_args(annotation))
    return [m for m in members if isinstance(m, type) and issubclass(m, Part)]


def _choices(model: type[Part], prefix: Path = ()) -> Iterator[tuple[Path, dict[str, type[Part]]]]:
    """Yield path and members by name of every choice within ``model``."""
    for key, field in model.model_fields.items():
        parts = _parts(field.annotation)
        if len(parts) > 1:
            yield (*prefix, key), {part.model_fields["name"].default: part for part in parts}
        elif parts:
            yield from _choices(parts[0], (*prefix, key))


def _switch(
    path: Path, choices: dict[str, type[Part]], old: dict[str, Any], new: dict[str, Any], given: Mapping[str, Any]
) -> None:
    """Where a choice was changed, drop what the new one does not know and what the old one had by default.

    Nothing that the user has just set is dropped: if the new choice does not know it, the check says so.
    """
    before, after = _at(old, path), _at(new, path)
    if after["name"] == before["name"] or after["name"] not in choices:
        return
    known = choices[after["name"]].model_fields
    defaults = choices[before["name"]].model_fields
    for key in set(after) - {"name"}:
        by_default = key in defaults and before[key] == defaults[key].default
        if (key not in known or by_default) and ".".join((*path, key)) not in given:
            del after[key]


# -- errors ------------------------------------------------------------------------------------


def explain_validation(error: ValidationError) -> str:
    """Return the findings of a ``ValidationError``, one line each, in the words of ``ConfigError``."""
    model = next((part for part in _subclasses(Part) if part.__name__ == error.title), Part)
    lines = _explain(error, model).split("\n")
    return "\n".join(lines if model is RunConfig else [f"{error.title}: {line}" for line in lines])


def _subclasses(model: type[Part]) -> Iterator[type[Part]]:
    for child in model.__subclasses__():
        yield child
        yield from _subclasses(child)


def _explain(error: ValidationError, model: type[Part]) -> str:
    """Return one line per field: pydantic reports each member of a union by itself."""
    findings: dict[str, list[ErrorDetails]] = {}
    for item in error.errors(include_url=False):
        findings.setdefault(_dotted(model, item["loc"]), []).append(item)
    return "\n".join(_line(path, items, model) for path, items in findings.items())


def _line(path: str, items: list[ErrorDetails], model: type[Part]) -> str:
    item = items[0]
    if item["type"] == "extra_forbidden":
        owner, _ = _descend(model, item["loc"][:-1])
        return f"unknown field {path!r}; {did_you_mean(str(item['loc'][-1]), owner.model_fields)}"
    if item["type"] == "missing":
        return f"{path}: is required; add it"
    if item["type"] == "union_tag_not_found":
        return f"{path}.name: is required; add it"
    if item["type"] == "union_tag_invalid":
        expected = item["ctx"]["expected_tags"].split(", ")
        return f"{path}.name={item['ctx']['tag']!r}: should be {_or(expected)}"
    shown = "" if isinstance(item["input"], dict | Part) else f"={item['input']!r}"
    for own in items:
        if own["type"] == "value_error":
            return f"{path}{shown}: {own['msg'].removeprefix('Value error, ')}"
    wanted: dict[str, None] = {}
    for each in items:
        in_list = isinstance(each["loc"][-1], int) and each["type"] != "missing" and not path[-1].isdigit()
        phrases = _wanted(each)
        wanted |= dict.fromkeys([f"a list such as 2,8 with each {_or(phrases)}"] if in_list else phrases)
    return f"{path}{shown}: should be {_or(list(wanted))}"


def _wanted(item: ErrorDetails) -> list[str]:
    """Return what would have been right, as alternatives."""
    kind, context = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        return re.split(", | or ", context["expected"])
    if kind.startswith("bool_"):
        return ["true", "false"]
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in bounds:
        words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}[bounds[kind]]
        return [f"{words} {context[bounds[kind]]:g}"]
    for start, phrase in WANTED.items():
        if kind.startswith(start):
            return [phrase]
    return [item["msg"].removeprefix("Input should be ")]


WANTED = {
    "int_": "a whole number",
    "float_": "a number",
    "finite_number": "a finite number",
    "string_": "text",
    "tuple_": "a list such as 2,8",
    "too_long": "a list of two such as 2,8",
    "missing": "a list of two such as 2,8",
    "model_": "a section with fields",
}


def _or(words: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _dotted(model: type[Part], loc: tuple[int | str, ...]) -> str:
    """Dotted path of a field, without the tags pydantic adds for the members of a union."""
    _, path = _descend(model, loc)
    return ".".join(path) or "config"


def _descend(model: type[Part], loc: tuple[int | str, ...]) -> tuple[type[Part], list[str]]:
    """Follow ``loc`` from ``model``: the innermost part it reaches, and the names on the way to the field."""
    path: list[str] = []
    choices: dict[str, type[Part]] = {}
    for position, key in enumerate(loc):
        if key in choices:
            model, choices = choices[str(key)], {}
            continue
        path.append(str(key))
        field = model.model_fields.get(str(key))
        parts = _parts(field.annotation) if field else []
        if not parts:
            # A leaf: what follows is an item's number, or within a union only the tag of a member.
            rest = loc[position + 1 :]
            plain = all(isinstance(part, int) for part in rest)
            return model, path + [str(part) for part in rest if plain]
        if len(parts) == 1:
            model = parts[0]
        else:
            choices = {part.model_fields["name"].default: part for part in parts}
    return model, path
