"""Training on one device with plain PyTorch and the model classes of transformers."""
