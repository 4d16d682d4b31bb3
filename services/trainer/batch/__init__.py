"""From leased messages to packed micro-batches."""
