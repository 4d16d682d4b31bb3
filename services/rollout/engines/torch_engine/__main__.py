"""`python -m services.rollout.engines.torch_engine --model-path DIR --port P`."""

from __future__ import annotations

import asyncio
import os
import sys

from services.common.errors import PolyheadError
from services.common.process import loading
from services.common.telemetry import configure_logging
from services.rollout.engines.torch_engine.options import parse_options


def main() -> int:
    """Serves until told to stop; the return value is the exit status: 0, or 2 for what cannot be served."""
    options = parse_options()
    configure_logging("torch_engine")
    with loading():
        from services.rollout.engines.torch_engine.server import bind, serve
    try:
        asyncio.run(serve(options, bind(options.host, options.port)))
    except PolyheadError as error:
        print(f"torch_engine: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a thread that waits in a collective cannot be interrupted, and the interpreter would wait for it.
    os._exit(status)
