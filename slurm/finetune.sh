#!/usr/bin/env bash
# Fine-tune from the weights of any checkpoint: a run, BLIP's .pth, or a Hugging Face folder.
# Submit it from the clone. Arguments are settings of the recipe:
#
#   RECIPE=finetune_retrieval_coco INIT=runs/pretrain_129M sbatch slurm/finetune.sh
#   RECIPE=finetune_captioning_coco INIT=model_base_capfilt_large.pth sbatch slurm/finetune.sh
#
# Settings of your cluster; change them here or on sbatch's command line (--partition, --nodes ...):
#SBATCH --job-name=finetune
#SBATCH --nodes=1
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

: "${RECIPE:?a recipe of the package or a YAML file}" "${INIT:?the checkpoint to start from}"
export RECIPE OUTPUT_DIR=${OUTPUT_DIR:-${REPO:-$SLURM_SUBMIT_DIR}/runs/$(basename "$RECIPE" .yaml)}
set -- model.checkpoint="$INIT" "$@"
# shellcheck source=slurm/train.sh
source "${REPO:-$SLURM_SUBMIT_DIR}/slurm/train.sh"
