"""Loggers for metrics, pictures and texts: TensorBoard, Weights & Biases, a CSV file."""
