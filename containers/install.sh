#!/bin/sh
# Install what blip_scale needs into an image of Debian 12: `install.sh REQUIREMENTS VENV`.
# The Dockerfile and blip_scale.def run it. DeepSpeed and torch.compile need g++ and Python's headers to build
# operations when a run starts. git is for the commit in a run's manifest, the ibverbs packages are for NCCL over
# InfiniBand. Java is not installed, so METEOR and SPICE don't score captions.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --no-install-recommends \
    ca-certificates g++ git ibverbs-providers libibverbs1 librdmacm1 python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*
python3 -m venv "$2"
"$2/bin/pip" install --quiet --no-cache-dir -r "$1"
