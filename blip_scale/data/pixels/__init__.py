"""Images: decoded, augmented and turned into tensors."""
