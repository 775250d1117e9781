"""Students for other runtimes, checked against PyTorch; model cards and uploads."""
