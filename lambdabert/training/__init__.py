"""Training: options, checkpoints, the Trainer, and a run of a command from its start to its report."""
