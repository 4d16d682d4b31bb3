"""Rank 1 of a weight group, as a process of its own: ``weight_group_peer.py PORT BYTES TIMEOUT``.

Says "started" when it is about to join and "joined" when it has, receives one broadcast for each line on its standard
input and answers with the sum of the bytes it got, and leaves at the end of its input.
"""

from __future__ import annotations

import sys

import torch

from services.common.weight_group import WeightGroup


def main() -> None:
    port, num_bytes, timeout_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    print("started", flush=True)
    group = WeightGroup(
        backend="gloo", address="127.0.0.1", port=port, rank=1, world_size=2, name=f"w{port}", timeout_s=timeout_s
    )
    print("joined", flush=True)
    for _ in sys.stdin:
        flat = torch.zeros(num_bytes, dtype=torch.uint8)
        group.broadcast(flat)
        print(int(flat.sum(dtype=torch.int64)), flush=True)
    group.close()


if __name__ == "__main__":
    main()
