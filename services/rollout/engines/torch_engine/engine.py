"""The engine as the HTTP routes see it: requests in, replies out, and the parts that administration needs."""

from __future__ import annotations

import asyncio
from typing import Any

import torch

from services.common.errors import InvalidArgumentError, PreconditionError
from services.common.model_files import fp8_weights
from services.rollout.engines.torch_engine.checkpoint import load_checkpoint
from services.rollout.engines.torch_engine.decoder import Decoder
from services.rollout.engines.torch_engine.decoder_config import read_config
from services.rollout.engines.torch_engine.engine_thread import EngineThread
from services.rollout.engines.torch_engine.generate_request import GenerateRequest, RequestParser
from services.rollout.engines.torch_engine.memory import Memory
from services.rollout.engines.torch_engine.options import MAX_DEFAULT_CONTEXT, EngineOptions
from services.rollout.engines.torch_engine.parameters import DTYPES, Parameters
from services.rollout.engines.torch_engine.replies import Reply
from services.rollout.engines.torch_engine.request_log import RequestLog
from services.rollout.engines.torch_engine.scheduler import Scheduler, cache_length, slots_needed
from services.rollout.engines.torch_engine.sequence import Delta
from services.rollout.engines.torch_engine.text import TextCodec
from services.rollout.engines.torch_engine.weight_updates import WeightUpdates

DEVICE = torch.device("cpu")
STOP_TIMEOUT_S = 2.0


class Engine:
    """Loads the model and owns the engine's thread. Its methods belong to the event loop."""

    def __init__(self, options: EngineOptions) -> None:
        """Loads everything. Raises ConfigError or InvalidArgumentError when the model directory does not do."""
        torch.set_num_threads(options.threads)
        self.options = options
        self.model_config = read_config(options.model_path)
        fp8 = fp8_weights(options.model_path)
        self.parameters = Parameters(self.model_config, DTYPES[options.dtype], DEVICE, fp8)
        load_checkpoint(options.model_path, self.parameters)
        own_length = self.model_config.max_position_embeddings
        self.context_length = options.context_length or min(own_length, MAX_DEFAULT_CONTEXT)
        if self.context_length > own_length:
            raise InvalidArgumentError(
                f"{self.context_length} is above the model's max_position_embeddings = {own_length}",
                field="--context-length",
            )
        self.kv_tokens = options.max_running_requests * self.context_length
        """Each slot has room for a whole context."""
        codec = TextCodec.load(options.model_path)
        self.codec = None if options.skip_tokenizer_init else codec
        self.parser = RequestParser(
            vocab_size=self.model_config.vocab_size,
            context_length=self.context_length,
            eos_ids=self.model_config.eos_token_ids | (codec.eos_ids if codec else frozenset()),
            codec=self.codec,
            random_seed=options.random_seed,
        )
        self.updates = WeightUpdates(self.parameters, DEVICE, options.shared_weights_dir)
        deterministic = options.enable_deterministic_inference
        decoder = Decoder(
            self.model_config,
            self.parameters,
            slots_needed(options.max_running_requests, deterministic),
            cache_length(self.context_length, options.prefill_chunk),
        )
        self.scheduler = Scheduler(
            decoder,
            max_running=options.max_running_requests,
            prefill_chunk=options.prefill_chunk,
            stream_interval=options.stream_interval,
            deterministic=deterministic,
            weight_version=options.weight_version,
            deliver=self._deliver,
            decode_rate=options.decode_rate,
            log=RequestLog() if options.log_requests else None,
        )
        self.memory = Memory(self.parameters.tensors(), decoder.caches())
        self.thread = EngineThread(self.scheduler, may_step=lambda: self.updates.whole and not self.memory.asleep)
        self._replies: dict[str, Reply] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begins to work; call it on the event loop that will serve."""
        self._loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        self.thread.stop(STOP_TIMEOUT_S)

    def submit(self, request: GenerateRequest) -> Reply:
        """Hands a request to the scheduler. Raises InvalidArgumentError for a `rid` that is in use."""
        for sequence in request.sequences:
            if sequence.rid in self._replies:
                raise InvalidArgumentError(f"{sequence.rid!r} is in use", field="rid")
        reply = Reply(request, self.codec, incremental=self.options.incremental_streaming_output)
        self._replies.update((sequence.rid, reply) for sequence in request.sequences)
        self.thread.post(lambda: self.scheduler.add(request.sequences))
        return reply

    def abort(self, rids: list[str]) -> None:
        """Ends requests with what they have; unknown ones are passed over."""

        def abort() -> None:
            for rid in rids:
                self.scheduler.abort(rid, "aborted by request")

        self.thread.post(abort)

    async def abort_all(self) -> None:
        await self.thread.call(lambda: self.scheduler.abort(None, "aborted by request"))

    async def release_memory(self, tags: list[str]) -> None:
        """Gives up memory, by SGLang's tags. Raises PreconditionError where requests run, or it was not started for it.

        SGLang would end instead.
        """

        def release() -> None:
            if self.scheduler.num_running or self.scheduler.num_waiting:
                raise PreconditionError("requests are running or waiting", field="release_memory_occupation")
            self.memory.release(tags)
            if "weights" in self.memory.asleep:
                self.updates.lose()

        if not self.options.enable_memory_saver:
            raise PreconditionError("started without --enable-memory-saver", field="release_memory_occupation")
        await self.thread.call(release)

    def require_weights(self) -> None:
        """Raises PreconditionError while their memory is given up."""
        if "weights" in self.memory.asleep:
            raise PreconditionError("the engine is asleep: it has given up its weights", field="weights")

    async def resume_memory(self, tags: list[str]) -> None:
        """Takes it back. Weights are torn until an update brings them all."""
        await self.thread.call(lambda: self.memory.resume(tags))

    def info(self) -> dict[str, Any]:
        """What /server_info answers beyond the options."""
        return {
            "kind": "torch_engine",
            "context_length": self.context_length,
            "tp_size": 1,
            "max_total_num_tokens": self.kv_tokens,
            "weight_version": self.scheduler.weight_version,
            "weights": self.updates.state,
            "asleep": sorted(self.memory.asleep),
            "memory_bytes": self.memory.num_bytes,
            "paused": self.thread.paused,
            "num_running_requests": self.scheduler.num_running,
            "num_waiting_requests": self.scheduler.num_waiting,
            "busy_seconds": self.thread.busy_seconds,
            "generated_tokens": self.scheduler.generated_tokens,
        }

    def load(self) -> dict[str, Any]:
        """The figures of /v1/loads."""
        running, waiting, used = self.scheduler.num_running, self.scheduler.num_waiting, self.scheduler.used_tokens
        return {
            "dp_rank": 0,
            "num_running_reqs": running,
            "num_waiting_reqs": waiting,
            "num_total_reqs": running + waiting,
            "num_used_tokens": used,
            "max_total_num_tokens": self.kv_tokens,
            "max_running_requests": self.options.max_running_requests,
            "token_usage": round(used / self.kv_tokens, 4),
        }

    def _deliver(self, deltas: list[Delta]) -> None:
        """On the engine's thread: one hop to the event loop for all of a step."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._dispatch, deltas)

    def _dispatch(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            rid = delta.sequence.rid
            reply = self._replies.get(rid) if delta.finish_reason is None else self._replies.pop(rid, None)
            if reply is not None:
                reply.accept(delta)
