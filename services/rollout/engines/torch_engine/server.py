"""The HTTP server's life: bind, load, serve, stop."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket

import structlog
from aiohttp import web

from services.common.errors import ConfigError
from services.rollout.engines.torch_engine.admin_routes import AdminRoutes
from services.rollout.engines.torch_engine.engine import Engine
from services.rollout.engines.torch_engine.http_json import errors_as_json, require_key
from services.rollout.engines.torch_engine.options import EngineOptions
from services.rollout.engines.torch_engine.serving_routes import ServingRoutes

log = structlog.get_logger()

MAX_BODY_BYTES = 256 << 20
SHUTDOWN_GRACE_S = 0.5


def bind(host: str, port: int) -> socket.socket:
    """Takes the port before the model is loaded. Raises ConfigError when it is in use or cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _port_error(host, port, error) from error
    return listener


def application(engine: Engine) -> web.Application:
    admin = AdminRoutes(engine).routes()
    guard = require_key(engine.options.admin_api_key, frozenset(route.path for route in admin))
    app = web.Application(middlewares=[errors_as_json, guard], client_max_size=MAX_BODY_BYTES)
    app.add_routes([*ServingRoutes(engine).routes(), *admin])
    return app


async def serve(options: EngineOptions, listener: socket.socket) -> None:
    """Loads the model and serves until SIGTERM or SIGINT.

    Raises ConfigError or InvalidArgumentError when the model cannot be served.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    engine = Engine(options)
    engine.start()
    # A client that goes away cancels its handler, which aborts its requests.
    runner = web.AppRunner(
        application(engine), access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_GRACE_S
    )
    await runner.setup()
    host, port = listener.getsockname()[:2]
    try:
        await web.SockSite(runner, listener).start()
    except OSError as error:
        raise _port_error(host, port, error) from error
    log.info("serving", host=host, port=port, model=str(options.model_path), context_length=engine.context_length)
    await stop.wait()
    log.info("stopping")
    await runner.cleanup()
    engine.stop()


def _port_error(host: str, port: int, error: OSError) -> ConfigError:
    reason = "the port is in use" if error.errno == errno.EADDRINUSE else f"cannot listen: {error.strerror}"
    return ConfigError(reason, field=f"{host}:{port}")
