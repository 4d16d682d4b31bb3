"""What an engine's own answers say about it: /server_info and /v1/loads, as SGLang writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.rollout.engines.messages import EngineLoad, EngineUnavailableError, ServerInfo


def read_server_info(info: Mapping[str, Any]) -> ServerInfo:
    kind = info.get("kind", "sglang")
    # SGLang takes no prompt of the last few tokens of its context, which a partial may have to be resumed from.
    context_length = info.get("max_req_input_len", info.get("context_length"))
    return ServerInfo(
        name=f"{kind}/{info.get('version', 'unknown')}",
        context_length=_count(context_length),
        ranks=_count(info.get("tp_size")) or 1,
        overlapped=kind == "sglang" and not info.get("disable_overlap_schedule"),
        max_running_requests=_count(info.get("max_running_requests")),
        kv_tokens=_count(info.get("max_total_num_tokens")),
        model_path=str(info.get("model_path") or ""),
        stream_interval=_count(info.get("stream_interval")),
        prefix_cache=not info.get("disable_radix_cache"),
        sleeps=bool(info.get("enable_memory_saver")),
        shares_memory=bool(info.get("shared_weights_dir")),
    )


def read_loads(answer: Mapping[str, Any]) -> EngineLoad:
    """The sum over the data-parallel ranks. Raises EngineUnavailableError when it cannot be read."""
    try:
        loads = [
            EngineLoad(
                running=load["num_running_reqs"],
                waiting=load["num_waiting_reqs"],
                used_tokens=load["num_used_tokens"],
                max_tokens=load["max_total_num_tokens"],
                slots=load["max_running_requests"],
            )
            for load in answer["loads"]
        ]
        return EngineLoad(
            running=sum(load.running for load in loads),
            waiting=sum(load.waiting for load in loads),
            used_tokens=sum(load.used_tokens for load in loads),
            max_tokens=sum(load.max_tokens for load in loads),
            slots=sum(load.slots for load in loads),
        )
    except (KeyError, TypeError) as error:
        raise EngineUnavailableError(f"cannot be read: {error!r}", field="engine /v1/loads") from error


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
