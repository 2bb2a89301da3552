"""Ranks and processes. No other room imports torch.distributed or DeepSpeed."""

from blip_scale import logs

logs.hold_third_party_noise()  # before torch and DeepSpeed are imported
