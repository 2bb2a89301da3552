"""BLIP's losses as functions of tensors, and the state that they need."""
