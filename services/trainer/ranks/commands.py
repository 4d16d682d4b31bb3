"""What rank 0 tells the others to do, by name."""

TRAIN = "train"
WEIGHTS = "weights"
SAVE = "save"
"""With the directory that each rank writes its part of a checkpoint to."""
LOAD = "load"
"""With the directory of the checkpoint."""
