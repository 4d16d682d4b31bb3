"""Every setting of every service, as one tree. The string under a field is its documentation.

One TOML file holds one table per model below; `loader.py` reads it. Shared values are written once and checked
against each other here, so that a wrong combination is refused before anything starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from services.common.config.algorithm import AlgorithmConfig
from services.common.config.critic import CriticConfig
from services.common.config.lora import LoraConfig
from services.common.config.optimizer import OptimizerConfig
from services.common.config.remote import RemoteConfig
from services.common.config.section import Positive, Seconds, Section

REMOTE = "remote"
WEIGHTED = "weighted"
BUILT_IN_FILTERS = ("none", "nonzero_std", "nonzero_std_with_fallback")
FlagValue = bool | int | float | str | list[int | float | str]


def plain_flags(flags: dict[str, FlagValue]) -> dict[str, FlagValue]:
    """Raises ValueError unless these can be the arguments of another program, by the names of its flags."""
    for flag, setting in flags.items():
        if not flag.replace("-", "").replace("_", "").isalnum() or flag.startswith("-"):
            raise ValueError(f"{flag!r} is not the name of a flag: write it without its dashes")
        if setting is False:
            raise ValueError(f"{flag} = false: a flag that is not wanted is left out")
    return flags


class RunConfig(Section):
    name: str = "run"
    """Names the run in logs and in the store; all keys of a run share it as hash tag."""
    dir: Path = Path("runs/run")
    """Everything a run writes goes here: logs, metrics, checkpoints, the embedded store's files."""
    seed: int = 0
    num_rollout: Positive = 100
    """Training steps in all (slime: --num-rollout). One step trains one rollout batch."""
    deterministic: bool = False
    """Bit for bit the plain synchronous loop, whatever comes first (I9, docs/deterministic.md): fixed shapes in the
    engine, deterministic algorithms in the trainer, an interrupted completion is generated anew. Needs max_staleness =
    0, the in-house engine and float32 on CPUs."""
    colocate: bool = False
    """Engines and trainer have the same GPUs in turn (docs/weight-push.md): when a batch is ready the engines give up
    their memory, and have it back with the weights that were trained (slime: --colocate). Weights go over ipc."""
    offload_train: bool = True
    """With colocate: while the engines have the GPUs, what the trainer keeps is in pinned host memory
    (slime: --offload-train)."""
    offload_rollout: bool = True
    """With colocate: while the trainer has the GPUs, the engines hold neither weights nor KV cache; else they only stop
    (slime: --offload-rollout)."""
    stall_limit_s: Seconds = 300.0
    """If nothing changes state for this long, the run says what it waits for at warning level (I12)."""
    stable_after_s: Seconds = 20.0
    """A process that was up for this long is started again at once when it dies. One that dies sooner, eight times in a
    row, has failed for good."""

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, value: str) -> str:
        if not value or len(value) > 64 or not all(c.isalnum() or c in "-_." for c in value):
            raise ValueError("must be 1 to 64 letters, digits, '-', '_' or '.'")
        return value


class ModelConfig(Section):
    hf_checkpoint: Path = Path()
    """A Hugging Face model directory: config.json, safetensors, tokenizer (slime: --hf-checkpoint). In block-wise fp8
    it is the engines': weights are trained in `dtype`, and each push quantises them (docs/weight-push.md)."""
    ref_checkpoint: Path | None = None
    """The frozen model of the KL terms. Default: hf_checkpoint, which is where training begins. Where hf_checkpoint is
    in fp8, training begins here instead, or with its weights dequantised (slime: --ref-load)."""
    teacher_checkpoint: Path | None = None
    """The frozen model of on-policy distillation, of the same vocabulary (slime: --opd-teacher-load)."""
    critic_checkpoint: Path | None = None
    """The causal language model that the critic of trainer.algorithm.name = "ppo" begins as, without its head, of the
    same vocabulary. Default: what the policy begins as (slime: --critic-load)."""
    dtype: Literal["float32", "bfloat16"] = "float32"


class DataConfig(Section):
    prompt_data: str = ""
    """A .jsonl or .parquet file, with an optional slice: path@[start:end] (slime: --prompt-data)."""
    input_key: str = "input"
    label_key: str | None = None
    metadata_key: str = "metadata"
    tool_key: str = "tools"
    apply_chat_template: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    shuffle: bool = False
    """Permute the rows anew in each epoch, by `seed` (slime: --rollout-shuffle)."""
    seed: Annotated[int, Field(ge=0, le=1 << 53)] = 42
    """slime: --rollout-seed"""


class BatchConfig(Section):
    rollout_batch_size: Positive = 8
    """Groups (prompts) per step: B in the docs."""
    n_samples_per_prompt: Positive = 8
    """Group size."""
    global_batch_size: Positive | None = None
    """Samples per optimizer step. Default: the whole rollout batch over num_steps_per_rollout."""
    num_steps_per_rollout: Positive | None = None
    """Optimizer steps per rollout batch. Default: what global_batch_size says, else 1."""
    over_sampling_batch_size: Positive | None = None
    """Groups that may be in the works per step; the surplus over rollout_batch_size covers filtered groups."""
    min_group_size: Positive | None = None
    """A group with dead samples is trained if this many remain. Default: all are needed."""
    dynamic_sampling_filter: str = "none"
    """nonzero_std drops groups whose rewards are all equal: they carry no gradient under GRPO;
    nonzero_std_with_fallback keeps them when max_refill_rounds is reached. A dotted path, pkg.mod:fn, names a function
    with slime's signature, which the reward service calls (slime: --dynamic-sampling-filter-path)."""
    max_refill_rounds: Positive = 4
    """When a filter has dropped so many batches' worth of groups since the last step, groups it would rather not have
    are kept (slime: keep_when_insufficient), or the wait for others is given as the filter's."""

    @property
    def user_filter(self) -> str:
        """The dotted path of a user's filter, empty for what is built in."""
        return "" if self.dynamic_sampling_filter in BUILT_IN_FILTERS else self.dynamic_sampling_filter

    @field_validator("dynamic_sampling_filter")
    @classmethod
    def _filter_is_known_or_a_path(cls, value: str) -> str:
        if value not in BUILT_IN_FILTERS and not any(mark in value.strip(".:") for mark in ".:"):
            raise ValueError(f"unknown filter {value!r}: known are {', '.join(BUILT_IN_FILTERS)} and pkg.mod:fn")
        return value

    @model_validator(mode="after")
    def _sizes_fit(self) -> BatchConfig:
        samples = self.rollout_batch_size * self.n_samples_per_prompt
        if self.global_batch_size is None:
            steps = self.num_steps_per_rollout or 1
            if samples % steps:
                raise ValueError(
                    f"rollout_batch_size × n_samples_per_prompt = {self.rollout_batch_size} × "
                    f"{self.n_samples_per_prompt} = {samples} is not a multiple of num_steps_per_rollout = {steps}"
                )
            self.global_batch_size, self.num_steps_per_rollout = samples // steps, steps
        elif self.num_steps_per_rollout is None:
            self.num_steps_per_rollout = max(1, samples // self.global_batch_size)
        trained = self.global_batch_size * self.num_steps_per_rollout
        if samples != trained:
            raise ValueError(
                f"rollout_batch_size × n_samples_per_prompt = {self.rollout_batch_size} × "
                f"{self.n_samples_per_prompt} = {samples} must equal global_batch_size × num_steps_per_rollout = "
                f"{self.global_batch_size} × {self.num_steps_per_rollout} = {trained}"
            )
        if self.rollout_batch_size % self.num_steps_per_rollout:
            raise ValueError(
                f"rollout_batch_size = {self.rollout_batch_size} groups cannot be split over num_steps_per_rollout = "
                f"{self.num_steps_per_rollout} optimizer steps: groups are never split"
            )
        if self.over_sampling_batch_size is not None and self.over_sampling_batch_size < self.rollout_batch_size:
            raise ValueError(
                f"over_sampling_batch_size = {self.over_sampling_batch_size} must be at least rollout_batch_size = "
                f"{self.rollout_batch_size}"
            )
        if self.min_group_size is not None and self.min_group_size > self.n_samples_per_prompt:
            raise ValueError(
                f"min_group_size = {self.min_group_size} is above n_samples_per_prompt = {self.n_samples_per_prompt}"
            )
        return self


class StalenessConfig(Section):
    max_staleness: Annotated[int, Field(ge=0)] = 4
    """Steps between the oldest token of a sample and the version it trains (I6). 0 is synchronous RL."""
    on_stale: Literal["wait", "mask", "drop"] = "wait"
    """What happens to a sample that would pass the bound."""
    partial_rollout: Literal[True] = True
    """Unfinished samples keep their tokens and are continued; there is no other way here (slime: --partial-rollout)."""
    mask_offpolicy: bool = False
    """Of a sample that several versions made, train only the tokens of the last
    (slime: --mask-offpolicy-in-partial-rollout)."""
    publish_interval: Positive = 1
    """Push weights every so many steps."""

    @model_validator(mode="after")
    def _interval_fits(self) -> StalenessConfig:
        if self.max_staleness < self.publish_interval - 1:
            raise ValueError(
                f"max_staleness = {self.max_staleness} must be at least publish_interval - 1 = "
                f"{self.publish_interval - 1}, or no batch could ever be trained"
            )
        return self


class StoreConfig(Section):
    url: str = "embedded"
    """"embedded" starts a Valkey of our own in the run directory; else redis://, rediss:// or unix://."""
    password: SecretStr | None = None
    """Only from the environment: POLYHEAD_STORE__PASSWORD."""
    appendfsync: Literal["always", "everysec"] = "always"
    """For the embedded store. "everysec" can lose up to two seconds of acknowledged work when the store or its machine
    crashes; what was lost is reported as lost_after_restart."""
    max_memory_mb: Positive = 2048
    """The store's budget: admission of new prompts stops at 80% of it."""

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        if value != "embedded" and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError('must be "embedded" or begin with redis://, rediss:// or unix://')
        if urlsplit(value).password:
            # It would be written to the run directory with the rest of the configuration.
            raise ValueError("a password comes from the environment only: POLYHEAD_STORE__PASSWORD")
        return value


class LimitsConfig(Section):
    message_mb: Positive = 64
    sample_mb: Positive = 8
    sample_tokens: Positive = 131_072
    metadata_kb: Positive = 64
    samples_per_rpc: Positive = 1_024


class BufferConfig(Section):
    replicas: Positive = 1
    """Processes on the one store. Calls are spread over them, and go on while one of them is up."""
    address: str = "127.0.0.1:0"
    """Where it listens; port 0 lets the launcher choose. Of several replicas, a list: host:port,host:port."""
    lease_ttl_s: Seconds = 30.0
    """Rollout and reward leases end after this long without a heartbeat."""
    replica_ttl_s: Seconds = 10.0
    max_attempts: Positive = 5
    """Failures attributed to a sample before it becomes a dead letter."""
    limits: LimitsConfig = Field(default_factory=LimitsConfig)

    @property
    def addresses(self) -> list[str]:
        """Of each replica; one with port 0 stands for all."""
        return self.address.split(",")

    @model_validator(mode="after")
    def _addresses_fit(self) -> BufferConfig:
        if len(self.addresses) not in (1, self.replicas):
            raise ValueError(f"address names {len(self.addresses)} of {self.replicas} replicas")
        return self


class SamplingConfig(Section):
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    max_response_len: Positive = 128
    """slime: --rollout-max-response-len"""
    max_prompt_len: Positive | None = None
    """Longer prompts are dropped as OVERSIZE."""
    stop: list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)


class EngineConfig(Section):
    kind: Literal["torch", "sglang"] = "torch"
    """"torch" is the in-house engine, "sglang" the real one, in an environment of its own: make engine-env."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where SGLang runs, and so which of its environments is used."""
    python: Path | None = None
    """SGLang's interpreter. Default: .engines/<device>/bin/python of this checkout."""
    args: dict[str, FlagValue] = Field(default_factory=dict)
    """Further server arguments of SGLang, by the name of the flag: mem-fraction-static = 0.8 (slime: --sglang-<flag>).
    True is a flag without a value, a list one with several."""
    gpus: Positive = 1
    """Tensor-parallel ranks of one engine (slime: --rollout-num-gpus-per-engine)."""
    base_gpu: Annotated[int, Field(ge=0)] = 0
    """The first GPU of the first engine of the first replica; the others take the GPUs after it."""
    external: list[str] = Field(default_factory=list)
    """Addresses of engines started elsewhere, http://host:port; then none are started here. Replicas share them out
    (slime: --rollout-external-engine-addrs). On other hosts, they need trainer.weights.address."""
    admin_key: SecretStr | None = None
    """Of external engines. Only from the environment: POLYHEAD_ROLLOUT__ENGINE__ADMIN_KEY."""
    decode_rate: Annotated[float, Field(gt=0)] | None = None
    """In-house engine: at most this many tokens per second and request, to stand for a slower one in benchmarks."""
    max_running_requests: Positive | None = None
    """Slots of the continuous batch. Default: SGLang's own choice on a GPU, else 64."""
    context_length: Positive | None = None
    """Tokens of prompt and completion together. Default: the model's, in the in-house engine at most 2,048."""
    prefill_chunk: Positive = 32
    """In-house engine: prompt tokens per forward pass."""
    stream_interval: Positive = 8
    """Tokens between two chunks of a stream."""
    threads: Positive = 1
    """torch threads on a CPU."""
    staging_mb: Annotated[int, Field(ge=0)] = 4096
    """SGLang: memory of each rank where weights arrive ahead of the pause of a push, at least two buckets; on a GPU it
    has to be left free by mem-fraction-static. With room for the whole model, a push pauses only for the copy from
    there. 0: SGLang receives by its own means, within the pause."""
    float32_logits: bool = True
    """SGLang in bfloat16: logits are not rounded, as the trainer's are not (its enable-fp32-lm-head)."""
    start_timeout_s: Seconds = 300.0

    @field_validator("args")
    @classmethod
    def _flags_are_plain(cls, value: dict[str, FlagValue]) -> dict[str, FlagValue]:
        return plain_flags(value)

    @field_validator("external")
    @classmethod
    def _addresses_are_urls(cls, value: list[str]) -> list[str]:
        seen: set[tuple[str, int]] = set()
        for address in value:
            parts = urlsplit(address)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.password or parts.path not in "/":
                raise ValueError(f"{address!r} is not an address like http://host:port")
            place = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
            if place in seen:
                raise ValueError(f"{address} is named twice")
            seen.add(place)
        return [address.rstrip("/") for address in value]

    @model_validator(mode="after")
    def _engines_are_ours_to_start(self) -> EngineConfig:
        if self.external and (self.gpus != 1 or self.args):
            given = "args" if self.args else "gpus"
            raise ValueError(f"{given} is for engines that are started here, and external names some started elsewhere")
        if self.gpus > 1 and self.device == "cpu":
            raise ValueError(f'gpus = {self.gpus} needs device = "cuda"')
        return self


class RouterConfig(Section):
    """sglang-router, in front of the engines of a replica that has more than one."""

    python: Path | None = None
    """The interpreter that has sglang-router. Default: this one if it has it, else SGLang's."""
    policy: Literal["cache_aware", "round_robin", "random"] = "cache_aware"
    args: dict[str, FlagValue] = Field(default_factory=dict)
    """Further arguments, by the name of the flag: cache-threshold = 0.5 (slime: --router-<flag>)."""
    start_timeout_s: Seconds = 30.0

    @field_validator("args")
    @classmethod
    def _flags_are_plain(cls, value: dict[str, FlagValue]) -> dict[str, FlagValue]:
        return plain_flags(value)


class RolloutConfig(Section):
    replicas: Positive = 1
    engines: Positive = 1
    """Engines of one replica. With more than one, sglang-router stands in front of them."""
    address: str = "127.0.0.1:0"
    max_inflight: Positive | None = None
    """Samples one replica works on at a time. Default: as many as its engines have slots and KV memory for."""
    save_interval_s: Seconds = 1.0
    """How often partial tokens go to the buffer."""
    pause_mode: Literal["in_place", "retract", "abort"] = "in_place"
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)

    @model_validator(mode="after")
    def _engines_fit(self) -> RolloutConfig:
        external = len(self.engine.external)
        if external and self.engines != 1:
            raise ValueError(
                f"engines = {self.engines} is for engines that are started here, and engine.external names {external} "
                "started elsewhere"
            )
        if self.router.args and self.engines == 1 and external <= self.replicas:
            raise ValueError("router.args are given, but no replica has several engines, and so a router")
        return self


class CodeConfig(Section):
    timeout_s: Seconds = 6.0
    """What all tests of one sample may take, at most 0.8 of reward.score_timeout_s. A program over it has failed."""
    memory_mb: Annotated[int, Field(ge=64)] = 512
    """Of each process of a program, and of its files."""


class RewardEngineConfig(Section):
    """A Hugging Face reward model in an SGLang engine that the run starts, and starts again when it ends."""

    model: Path | None = None
    """Its directory: a sequence-classification model. None: no engine is started."""
    device: Literal["cpu", "cuda"] = "cpu"
    python: Path | None = None
    """SGLang's interpreter. Default: .engines/<device>/bin/python of this checkout."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto" is the checkpoint's."""
    port: Annotated[int, Field(ge=0, lt=65536)] = 0
    """On this machine; 0: any that is free."""
    gpus: Positive = 1
    """Tensor-parallel ranks."""
    base_gpu: Annotated[int, Field(ge=0)] = 0
    """The first of its GPUs."""
    threads: Positive = 1
    """torch threads on a CPU."""
    args: dict[str, FlagValue] = Field(default_factory=dict)
    """Further server arguments of SGLang, by the name of the flag: mem-fraction-static = 0.2."""

    @field_validator("args")
    @classmethod
    def _flags_are_plain(cls, value: dict[str, FlagValue]) -> dict[str, FlagValue]:
        return plain_flags(value)


class RewardConfig(Section):
    replicas: Positive = 1
    address: str = "127.0.0.1:0"
    scorer: str = "math"
    """"math", "deepscaler", "dapo", "f1", "gpqa", "ifbench", "code", "exact", "random", or one of these behind
    "boxed_"; "remote"; the dotted path of a function, pkg.mod:fn; or "weighted", which it is by itself where weights
    are given (slime: --rm-type, --custom-rm-path)."""
    weights: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    """Several scorers, built-in names and dotted paths, with the weights of their rewards in the sum that is the
    sample's: { math = 1.0, "pkg.mod:fn" = 0.2 }."""
    reward_key: str = ""
    """Which entry of a scorer's dict is the reward (slime: --reward-key). Default: the scorer's own, which is "score"
    or "reward" of a user's function."""
    overlong_buffer_len: Annotated[int, Field(ge=0)] = 0
    """Tokens before rollout.sampling.max_response_len over which a penalty grows from nothing to
    overlong_penalty_factor, DAPO's soft overlong punishment. 0: none."""
    overlong_penalty_factor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    shaping: str = ""
    """The dotted path of a function that is given each reward and returns the one to train on: fn(args, sample,
    reward). The penalty comes after it."""
    group_rm: bool = False
    """Whole groups are scored: the function gets a list of samples, and gives a list (slime: --group-rm)."""
    send_tokens: bool = False
    """A function's samples have their token ids as `tokens`, prompt and completion, and so has what goes to a server of
    kind "grpc": for rewards of spans of tokens."""
    buffer_filter: str = ""
    """The dotted path of a function with slime's signature that says which unfinished groups are continued first.
    Default: the oldest (slime: --buffer-filter-path)."""
    processes: Positive = 1
    """Size of the process pool."""
    score_timeout_s: Seconds = 10.0
    """A score that takes longer is killed, with its process."""
    max_inflight: Positive = 256
    code: CodeConfig = Field(default_factory=CodeConfig)
    remote: RemoteConfig = Field(default_factory=RemoteConfig)
    """The servers of scorer = "remote" (docs/rewards_remote.md)."""
    engine: RewardEngineConfig = Field(default_factory=RewardEngineConfig)
    """One such server that the run starts by itself."""

    @model_validator(mode="after")
    def _remote_is_wanted_and_there(self) -> RewardConfig:
        if self.engine.model is not None and (self.scorer, self.remote.kind) != (REMOTE, "classify"):
            raise ValueError('engine.model is for scorer = "remote" with remote.kind = "classify"')
        if self.scorer == REMOTE and not self.remote.urls and self.engine.model is None:
            raise ValueError('scorer = "remote" needs remote.urls, or engine.model')
        if self.scorer != REMOTE and self.remote.urls:
            raise ValueError(f'remote.urls is for scorer = "remote", not {self.scorer!r}')
        return self

    @model_validator(mode="before")
    @classmethod
    def _weights_are_the_scorer(cls, value: Any) -> Any:
        weighted = isinstance(value, dict) and value.get("weights") and "scorer" not in value
        return {**value, "scorer": WEIGHTED} if weighted else value

    @model_validator(mode="after")
    def _weights_fit(self) -> RewardConfig:
        if self.scorer == WEIGHTED and not self.weights:
            raise ValueError('scorer = "weighted" needs weights')
        if self.weights and self.scorer != WEIGHTED:
            raise ValueError(f'weights are for scorer = "weighted", not {self.scorer!r}')
        if self.weights and self.reward_key:
            raise ValueError(f"reward_key = {self.reward_key!r} is for one scorer, and weights name several")
        if self.shaping and self.scorer == REMOTE:
            raise ValueError('shaping is for scorers that run here, not for scorer = "remote"')
        for name in (REMOTE, WEIGHTED):
            if name in self.weights:
                raise ValueError(f"weights.{name}: only scorers that run here can be weighted")
        return self

    @model_validator(mode="after")
    def _groups_are_for_functions(self) -> RewardConfig:
        if self.group_rm and "." not in self.scorer and ":" not in self.scorer:
            raise ValueError(
                f"group_rm needs a function of yours as scorer, pkg.mod:fn; {self.scorer!r} scores samples one by one"
            )
        return self


class CheckpointConfig(Section):
    save_interval: Positive = 100
    """Steps between checkpoints; the last step always writes one (slime: --save-interval)."""
    keep_last: Positive = 2
    load: Path | None = None
    """The directory of another run, whose newest checkpoint this run goes on from as long as it has none of its own:
    weights, optimizer, step and place in the data. Without one there, it begins with the model (slime: --load)."""
    export_hf: bool = True
    """Write run.dir/hf at the end."""


class WeightsConfig(Section):
    backend: Literal["gloo", "nccl", "ipc", "disk"] = "gloo"
    """How weights reach the engines (docs/weight-push.md): "nccl" between GPUs, "gloo" anywhere, "ipc" within one
    machine, out of memory that the trainer shares with them, "disk" by a directory that the trainer writes and engines
    load from. Default: gloo; with run.colocate, ipc."""
    directory: Path | None = None
    """backend = "disk": where versions are written, which replicas and engines see under the same path. Default:
    run.dir/weights."""
    keep_last: Positive = 1
    """backend = "disk": the newest versions that stay there when no engine loads them any more."""
    address: str = "127.0.0.1"
    """Where engines reach the trainer's collective: an IPv4 address of this machine, or its name. The default is for
    engines on this machine only."""
    bucket_mb: Positive = 2048
    timeout_s: Seconds = 60.0
    """Deadline of each call of a push; a replica that misses one is quarantined."""

    @field_validator("address")
    @classmethod
    def _address_can_be_reached(cls, value: str) -> str:
        if value in ("", "0.0.0.0") or ":" in value:
            raise ValueError(f"{value!r} is not one IPv4 address of this machine, or its name")
        return value


class TrainerConfig(Section):
    address: str = "127.0.0.1:0"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Positive = 1
    """Of each rank."""
    ranks: Positive = 1
    """Processes that train together, each with a share of every batch and a shard of the model: one a GPU, or on CPUs
    over gloo (docs/trainer-ranks.md; slime: --actor-num-nodes times --actor-num-gpus-per-node)."""
    context_parallel: Positive = 1
    """How many ranks share each sequence, and so a micro-batch of as many times max_tokens_per_gpu: for sequences too
    long for one GPU (slime: --context-parallel-size). Divides `ranks`."""
    base_gpu: Annotated[int, Field(ge=0)] = 0
    """With device = "cuda": the GPU of the first rank; the others take those after it."""
    rendezvous: str = "127.0.0.1:0"
    """Where rank 0 listens for the other ranks. The launcher takes a free port for 0."""
    rank_timeout_s: Seconds = 600.0
    """A rank that waits for another for longer ends, and with it all of them. One that dies is noticed at once."""
    reduce_each_micro_batch: bool = False
    """With several ranks: add gradients up over the ranks after each micro-batch instead of after the last one. More
    traffic, and no rank holds a whole gradient, which is 4 bytes a parameter."""
    recompute: bool = False
    """Keep no activations within a decoder layer, and compute them again for the gradient (slime:
    --recompute-granularity)."""
    recompute_layers: Positive | None = None
    """With `recompute`: of the first so many layers only. Default: of all."""
    offload: bool = False
    """With device = "cuda": weights, gradients and the optimizer's state are in the host's memory. Each layer comes
    from there when it computes, and the optimizer steps on the CPU (slime: --optimizer-cpu-offload)."""
    max_tokens_per_gpu: Positive = 4096
    """Tokens packed into one micro-batch; a longer sample makes one of its own (docs/batching.md)."""
    use_dynamic_batch_size: bool | None = None
    """Pack by max_tokens_per_gpu, and ignore micro_batch_size. Default: unless micro_batch_size is given."""
    micro_batch_size: Positive | None = None
    """Sequences in one micro-batch, whatever their lengths. Default: 1 where use_dynamic_batch_size is false."""
    balance_data: bool = False
    """Share micro-batches out over data-parallel ranks by their estimated FLOPs, the costliest first."""
    compile: bool = False
    """Decoder layers by torch.compile, which joins what is computed element by element: a minute at the start, and a C
    compiler, for less time in each step on a GPU."""
    wide_residuals: bool = True
    """With model.dtype = "bfloat16": the sum that runs through the layers is float32. Less mismatch_kl, for more memory
    traffic (docs/algorithms.md)."""
    offload_reference: bool = True
    """With device = "cuda": reference and teacher model leave the GPU while nothing asks for their log-probs."""
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    critic: CriticConfig = Field(default_factory=CriticConfig)
    """Of algorithm.name = "ppo"."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    """Adapters on a frozen model; a critic is trained whole."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    weights: WeightsConfig = Field(default_factory=WeightsConfig)

    @model_validator(mode="after")
    def _ranks_share_sequences_evenly(self) -> TrainerConfig:
        if self.ranks % self.context_parallel:
            raise ValueError(f"ranks = {self.ranks} is not a multiple of context_parallel = {self.context_parallel}")
        return self

    @model_validator(mode="after")
    def _critic_is_wanted(self) -> TrainerConfig:
        if self.critic != CriticConfig() and not self.algorithm.has_critic:
            raise ValueError(f"critic is for algorithm.name = ppo, not {self.algorithm.name}")
        return self

    @model_validator(mode="after")
    def _adapters_are_wanted(self) -> TrainerConfig:
        if self.lora != LoraConfig() and not self.lora.rank:
            raise ValueError("lora says what adapters are like, and lora.rank = 0 that there are none")
        return self

    @model_validator(mode="after")
    def _offload_is_from_a_gpu(self) -> TrainerConfig:
        if self.offload and self.device == "cpu":
            raise ValueError('offload needs device = "cuda"')
        return self

    @property
    def fixed_micro_batch_size(self) -> int | None:
        """Sequences in each micro-batch; None when tokens decide."""
        dynamic = self.use_dynamic_batch_size
        if dynamic or (dynamic is None and self.micro_batch_size is None):
            return None
        return self.micro_batch_size or 1


class PluginsConfig(Section):
    """Where user functions may come from: dotted paths are taken from this file only, never from data or RPCs."""

    paths: list[Path] = Field(default_factory=list)
    """Directories put on sys.path of the processes that run user functions."""
