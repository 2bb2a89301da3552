"""Where a run's figures, pictures and texts go: TensorBoard, Weights & Biases, a CSV file."""
