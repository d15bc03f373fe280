"""What stays on disk: run folders, checkpoints, metrics and comparisons."""
