"""What all services share."""

import os

# gRPC would print a line at every fork of a process that has used it; children here always exec at once.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
