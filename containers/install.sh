#!/bin/sh
# Install the dependencies of blip_scale into a Debian 12 image: `install.sh REQUIREMENTS VENV`.
# The Dockerfile and the .def file in this folder run it. DeepSpeed and torch.compile need g++ and
# Python's headers to compile operations when a run starts. git reads the commit for a run's manifest.
# NCCL needs the ibverbs packages for InfiniBand. Java is not installed; without it, captions are not
# scored by METEOR and SPICE.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --no-install-recommends \
    ca-certificates g++ git ibverbs-providers libibverbs1 librdmacm1 python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*
python3 -m venv "$2"
"$2/bin/pip" install --quiet --no-cache-dir -r "$1"
