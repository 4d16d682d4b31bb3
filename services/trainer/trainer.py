"""A run from the trainer's side: where to start, the loop, and what is left at the end."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import orjson
import structlog
import xxhash

from services.common.buffer_client import BufferClient
from services.common.config import Config
from services.common.process import keep_loaded
from services.common.versions import Version
from services.trainer import model_dir
from services.trainer.algorithms.user_function import load_advantage_function
from services.trainer.algorithms.user_loss import load_reducer
from services.trainer.backends.torch.backend import TorchBackend
from services.trainer.backends.torch.model import start_directory
from services.trainer.checkpoint import Checkpoint, CheckpointState, CheckpointStore
from services.trainer.colocated_loop import ColocatedLoop
from services.trainer.history import load_forks, record_fork
from services.trainer.io_thread import Io
from services.trainer.loop import Loop, Services
from services.trainer.lora import check_same, lora_state
from services.trainer.ranks import commands
from services.trainer.ranks.group import RankGroup
from services.trainer.records import JsonLines
from services.trainer.saver import Origin, Saver
from services.trainer.status import TrainerStatus
from services.trainer.turns import Turns
from services.trainer.weights.publisher import Publisher

log = structlog.get_logger()


def train(config: Config, io: Io, buffer: BufferClient, status: TrainerStatus, holder: str) -> bool:
    """Trains to the end, or until a stop is requested. `holder` is this process's replica id.

    Returns whether the run is complete: its last step is committed, and exported where that is wanted. Raises
    ConfigError for a model that cannot be trained or a user's function that fails, FencedError when another trainer
    takes over, UnavailableError when another rank is gone, and TrainingDivergedError.
    """
    load_advantage_function(config)
    load_reducer(config)
    group = RankGroup.form(config.trainer, 0)
    try:
        backend = TorchBackend(config, group)
        group.beat(io.fail_from_thread)
        return _train(config, io, buffer, status, holder, backend)
    finally:
        group.close()


def _train(
    config: Config, io: Io, buffer: BufferClient, status: TrainerStatus, holder: str, backend: TorchBackend
) -> bool:
    checkpoints = CheckpointStore(config.run.dir, config.trainer.checkpoint.keep_last)
    # A store that lost its data would count epochs from the beginning, below versions that replicas may still serve.
    known_epoch = max(_known_epoch(directory) for directory in _histories(config))
    acquired = io.call_or_stop(buffer.acquire_epoch(holder, known_epoch))
    if acquired is None:
        return False
    # Only now: an earlier trainer may have gone on saving until it was fenced.
    checkpoints.clean()
    origin = _origin(config, backend)
    start = _resume(backend, config, origin)
    version = start.version if start is not None else Version(acquired.epoch, 0)
    if version.step < config.run.num_rollout:
        keep_loaded()
        step = _run_epoch(config, io, buffer, status, holder, backend, checkpoints, origin, start, acquired.epoch)
        version = Version(acquired.epoch, step)
    if version.step < config.run.num_rollout:
        return False
    if config.trainer.checkpoint.export_hf:
        _export(config, backend, version)
    return True


def _export(config: Config, backend: TorchBackend, version: Version) -> None:
    """Leaves ``run.dir/hf`` with the weights of `version`; one that has them already is left alone."""
    target = config.run.dir / "hf"
    if model_dir.exported_version(target) == version:
        return
    model_dir.export(target, config.model.hf_checkpoint, version, backend.save_pretrained)
    log.info("exported", directory=str(target), version=str(version))


def _run_epoch(
    config: Config,
    io: Io,
    buffer: BufferClient,
    status: TrainerStatus,
    holder: str,
    backend: TorchBackend,
    checkpoints: CheckpointStore,
    origin: Origin,
    start: CheckpointState | None,
    epoch: int,
) -> int:
    step = start.step if start is not None else 0
    watermark = start.watermark_message() if start is not None else None
    recovered = io.call_or_stop(buffer.recover(epoch, step, watermark))
    if recovered is None:
        return step
    forks = record_fork(config.run.dir, epoch, step)
    log.info("epoch_begins", version=str(Version(epoch, step)), replayed_steps=len(recovered.replayed_steps))
    with ExitStack() as stack:
        pushes, metrics, samples = (
            stack.enter_context(JsonLines(config.run.dir / f"{name}.jsonl"))
            for name in ("pushes", "metrics", "samples")
        )
        publisher = Publisher(buffer, config, epoch, pushes.write)
        stack.callback(lambda: io.call_always(publisher.close()))
        io.call(publisher.start(io.watch))
        saver = Saver(checkpoints, buffer, io, epoch, origin, step)
        stack.callback(saver.close)
        services = Services(io, buffer, backend, publisher, saver, status, metrics, samples)
        if config.run.colocate:
            turns = Turns(buffer, epoch, config.trainer.weights.timeout_s)
            stack.callback(lambda: io.call_always(turns.close()))
            return ColocatedLoop(
                config,
                services,
                holder=holder,
                epoch=epoch,
                forks=forks,
                turns=turns,
                offload=config.run.offload_train,
            ).run(step)
        return Loop(config, services, holder=holder, epoch=epoch, forks=forks).run(step)


def _histories(config: Config) -> list[Path]:
    """The run directories whose checkpoints this run may go on from: its own before any other."""
    other = config.trainer.checkpoint.load
    return [config.run.dir, *([] if other is None else [other])]


def _known_epoch(run_dir: Path) -> int:
    return max(CheckpointStore(run_dir, 1).newest_epoch(), *load_forks(run_dir), 0)


def _resume(backend: TorchBackend, config: Config, origin: Origin) -> CheckpointState | None:
    """Loads the checkpoint that the run goes on from, on all ranks; None when there is none. Nothing of its tensors is
    held afterwards. Raises ConfigError for one of something else than this run trains.
    """
    checkpoint = _newest(config)
    if checkpoint is None:
        return None
    state = checkpoint.state
    check_same(origin.lora, state.lora, start_directory(config)[1])
    with backend.group.command(commands.LOAD, str(checkpoint.directory)):
        backend.load_state(checkpoint.tensors, state.optimizer_steps)
    log.info("resumed", step=state.step, version=str(state.version), directory=str(checkpoint.directory))
    if state.config_digest != origin.config_digest:
        log.warning("config_changed", step=state.step)
    return state


def _newest(config: Config) -> Checkpoint | None:
    for run_dir in _histories(config):
        checkpoint = CheckpointStore(run_dir, 1).load_newest(load_forks(run_dir))
        if checkpoint is not None:
            return checkpoint
    if config.trainer.checkpoint.load is not None:
        log.warning("nothing_to_load", directory=str(config.trainer.checkpoint.load))
    return None


def _origin(config: Config, backend: TorchBackend) -> Origin:
    base = start_directory(config)[0].resolve()
    return Origin(str(base), config.model.dtype, _digest(config), lora_state(backend.adapters, base))


def _digest(config: Config) -> str:
    """Of the settings that shape what is learned, as opposed to where and how fast."""
    shaping = {
        "model": config.model.model_dump(mode="json", exclude={"hf_checkpoint"}),
        "data": config.data.model_dump(mode="json"),
        "batch": config.batch.model_dump(mode="json"),
        "staleness": config.staleness.model_dump(mode="json"),
        "sampling": config.rollout.sampling.model_dump(mode="json"),
        "algorithm": config.trainer.algorithm.model_dump(mode="json"),
        "optimizer": config.trainer.optimizer.model_dump(mode="json"),
        "critic": config.trainer.critic.model_dump(mode="json"),
        "reward": config.reward.scorer,
    }
    return str(xxhash.xxh3_128_hexdigest(orjson.dumps(shaping, option=orjson.OPT_SORT_KEYS)))
