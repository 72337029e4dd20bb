"""The training loop, and what it needs and leaves: losses, optimizers, evaluation, checkpoints, reports."""
