"""What a run tells: metrics, progress, Weights & Biases, the log file, plots."""
