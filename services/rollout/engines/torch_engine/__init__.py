"""The in-house inference engine: continuous batching in plain torch behind the subset of SGLang's HTTP API we use."""
