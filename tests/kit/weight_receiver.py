"""The engine's end of a weight group as a process of its own: joins and receives as it is told on standard input.

One JSON object a line in, one out: {"join": {...}}, {"receive": bytes, "to": path} and {"leave": true}. As rank 0 it
sends what it keeps. A weight group's name may exist once per process, so two ends of a channel cannot share one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from services.common.weight_group import WeightGroup


def main() -> None:
    torch.set_num_threads(1)
    print("{}", flush=True)
    group: WeightGroup | None = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if "join" in command:
                if group is not None:
                    group.close()
                group = WeightGroup(**command["join"])
            elif "leave" in command:
                if group is not None:
                    group.close()
                group = None
            else:
                assert group is not None
                flat = torch.randint(256, [command["receive"]], dtype=torch.uint8)
                group.broadcast(flat)
                Path(command["to"]).write_bytes(flat.numpy().tobytes())
            print("{}", flush=True)
        except RuntimeError as error:
            print(json.dumps({"error": str(error)}), flush=True)
    if group is not None:
        group.close()


if __name__ == "__main__":
    main()
