"""Runs in every process of a run whose PYTHONPATH begins with this directory."""

import os
import sys

if os.environ.get("FAULT_POINTS"):
    from tests.kit.faults import points

    points.install(sys.orig_argv)

if os.environ.get("PUSH_POINTS"):
    from tests.kit.pushes import points as push_points

    push_points.install(sys.orig_argv)
