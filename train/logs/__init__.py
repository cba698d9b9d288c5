"""What a run reports: metrics, progress, Weights & Biases, the log file, plots."""
