"""Runs at the start of a CPU SGLang's every process: lets a torchvision built for CUDA be imported beside a CPU torch.

The wheel registers shape functions for operators of its compiled library, which a CPU torch cannot load; the names
are then unknown, and the import of that one module fails. Text models use none of them.
"""

import gc
import sys
import types

sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
# Three processes import most of SGLang for each engine: a fifth of that time would be garbage collections.
gc.set_threshold(50_000, 20, 100)
