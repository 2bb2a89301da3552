#!/usr/bin/env bash
# Pretrain ViT-B/16 on the 129M pairs. Submit it from the clone. Arguments are settings of the recipe:
#
#   sbatch slurm/pretrain_129M.sh train.epochs=10
#
# Settings of your cluster; change them here or on sbatch's command line (--partition, --nodes ...):
#SBATCH --job-name=pretrain_129M
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
# slurm/train.sh lists environment variables to set (REPO, PYTHON, OUTPUT_DIR, a bucket's keys).
trap 'export STOP_REQUESTED=1' USR1  # until run_ranks.py handles it
set -euo pipefail

export RECIPE=${RECIPE:-base_129M}
# shellcheck source=slurm/train.sh
source "${REPO:-$SLURM_SUBMIT_DIR}/slurm/train.sh"
