#!/bin/sh
# Install what blip_scale needs into an image of Debian 12: `install.sh REQUIREMENTS VENV`.
# Both recipes in this folder run it. g++ and Python's headers are for the operations that DeepSpeed and
# torch.compile build when a run starts, git for the commit in a run's manifest, the ibverbs packages for
# NCCL over InfiniBand. Java is left out: without it captions are not scored by METEOR and SPICE.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --no-install-recommends \
    ca-certificates g++ git ibverbs-providers libibverbs1 librdmacm1 python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*
python3 -m venv "$2"
"$2/bin/pip" install --quiet --no-cache-dir -r "$1"
