"""BLIP pretraining at scale on DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
