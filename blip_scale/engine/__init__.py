"""All that knows about ranks and processes; nothing else imports torch.distributed or DeepSpeed."""

from blip_scale import logs

logs.hold_third_party_noise()  # before torch and DeepSpeed are imported
