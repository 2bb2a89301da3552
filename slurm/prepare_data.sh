#!/usr/bin/env bash
# Convert a published set to shards as an array job. Each task converts one part of the input on one
# node with all its cores, and the last task merges the parts. If a task was killed, submit the same
# line again: finished work is kept.
#
#   sbatch --array=0-63 slurm/prepare_data.sh laion /data/laion400m s3://bucket/laion --min-side 200
#
# Settings of your cluster; change them here or on sbatch's command line:
#SBATCH --job-name=prepare_data
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=prepare_data_%A_%a.log
set -euo pipefail

# Change these here or in the environment:
REPO=${REPO:-${SLURM_SUBMIT_DIR:-.}}          # clone of blip_scale
PYTHON=${PYTHON:-$REPO/.venv/bin/python}      # or "apptainer exec --nv blip_scale.sif python"
SRUN_ARGS=${SRUN_ARGS:-}                      # for pyxis: "--container-image=blip_scale.sqsh ..."
SCRATCH=${SCRATCH:-${TMPDIR:-/tmp}}           # shards are written here before upload
# For a bucket: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if it isn't Amazon's, S3_ENDPOINT_URL.

if [ "$#" -lt 3 ]; then
    echo "usage: sbatch [--array=0-N] slurm/prepare_data.sh SOURCE IN OUT [options]" >&2
    exit 2
fi
first=${SLURM_ARRAY_TASK_MIN:-0}
part=$((${SLURM_ARRAY_TASK_ID:-0} - first))
parts=${SLURM_ARRAY_TASK_COUNT:-1}

# Each process decodes on one core. OpenMP threads inside it would only compete for cores.
export OMP_NUM_THREADS=1
read -ra python <<<"$PYTHON"
launcher=()
if [ -n "$SRUN_ARGS" ]; then
    read -ra srun_args <<<"$SRUN_ARGS"
    launcher=(srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-$(nproc)}" "${srun_args[@]}")
fi
exec "${launcher[@]}" "${python[@]}" "$REPO/tools/prepare_data.py" "$@" \
    --shard "$part/$parts" --workers "${SLURM_CPUS_PER_TASK:-$(nproc)}" --scratch "$SCRATCH"
