#!/usr/bin/env bash
# Run CapFilt on a set of shards as an array job. Each task processes one part of the shards on one
# GPU, and the last task merges the parts. If a task was killed or ran out of time, submit the same
# line again: finished shards are kept.
#
#   sbatch --array=0-63 slurm/capfilt.sh s3://bucket/laion s3://bucket/laion_capfilt \
#       --captioner runs/captioner --filter runs/filter
#
# Settings of your cluster; change them here or on sbatch's command line:
#SBATCH --job-name=capfilt
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=48G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=capfilt_%A_%a.log
set -euo pipefail

# Change these here or in the environment:
REPO=${REPO:-${SLURM_SUBMIT_DIR:-.}}          # clone of blip_scale
PYTHON=${PYTHON:-$REPO/.venv/bin/python}      # or "apptainer exec --nv blip_scale.sif python"
SRUN_ARGS=${SRUN_ARGS:-}                      # for pyxis: "--container-image=blip_scale.sqsh ..."
SCRATCH=${SCRATCH:-${TMPDIR:-/tmp}}           # temporary copies of a bucket's shards
# For a bucket: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if it isn't Amazon's, S3_ENDPOINT_URL.

if [ "$#" -lt 6 ]; then
    echo "usage: sbatch [--array=0-N] slurm/capfilt.sh IN OUT --captioner C --filter F [options]" >&2
    exit 2
fi
first=${SLURM_ARRAY_TASK_MIN:-0}
part=$((${SLURM_ARRAY_TASK_ID:-0} - first))
parts=${SLURM_ARRAY_TASK_COUNT:-1}

# Threads decode images. OpenMP threads inside each of them would only compete for cores.
export OMP_NUM_THREADS=1
read -ra python <<<"$PYTHON"
launcher=()
if [ -n "$SRUN_ARGS" ]; then
    read -ra srun_args <<<"$SRUN_ARGS"
    launcher=(srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-4}" "${srun_args[@]}")
fi
exec "${launcher[@]}" "${python[@]}" "$REPO/tools/capfilt.py" "$@" --shard "$part/$parts" \
    --threads "${SLURM_CPUS_PER_TASK:-4}" --scratch "$SCRATCH"
