"""A run from the trainer's side: where to start, the loop, and what is left at the end."""

from __future__ import annotations

from contextlib import ExitStack

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
from services.trainer.checkpoint import Checkpoint, CheckpointStore
from services.trainer.colocated_loop import ColocatedLoop
from services.trainer.history import load_forks, record_fork
from services.trainer.io_thread import Io
from services.trainer.loop import Loop, Services
from services.trainer.ranks.group import RankGroup
from services.trainer.records import JsonLines
from services.trainer.saver import Saver
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
    known_epoch = max(checkpoints.newest_epoch(), *load_forks(config.run.dir), 0)
    acquired = io.call_or_stop(buffer.acquire_epoch(holder, known_epoch))
    if acquired is None:
        return False
    # Only now: an earlier trainer may have gone on saving until it was fenced.
    checkpoints.clean()
    checkpoint = checkpoints.load_newest(load_forks(config.run.dir))
    if checkpoint is not None:
        _resume(backend, checkpoint, config)
    version = checkpoint.state.version if checkpoint is not None else Version(acquired.epoch, 0)
    if version.step < config.run.num_rollout:
        keep_loaded()
        step = _run_epoch(config, io, buffer, status, holder, backend, checkpoints, checkpoint, acquired.epoch)
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
    checkpoint: Checkpoint | None,
    epoch: int,
) -> int:
    step = checkpoint.state.step if checkpoint is not None else 0
    watermark = checkpoint.state.watermark_message() if checkpoint is not None else None
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
        saver = Saver(checkpoints, buffer, io, epoch, _digest(config), step)
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


def _resume(backend: TorchBackend, checkpoint: Checkpoint, config: Config) -> None:
    state = checkpoint.state
    backend.load_state(checkpoint.tensors, state.optimizer_steps)
    log.info("resumed", step=state.step, version=str(state.version))
    if state.config_digest != _digest(config):
        log.warning("config_changed", step=state.step)


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
