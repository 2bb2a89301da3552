"""The training loader: order, mixing, worker processes and micro-batches."""
