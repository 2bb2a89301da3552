#!/usr/bin/env bash
# Body of every training job: the scripts beside this one source it, with settings as arguments.
# RECIPE is a name or a file.
set -euo pipefail

# Settings of a site, to be changed here or in the environment (sbatch passes it on):
REPO=${REPO:-$SLURM_SUBMIT_DIR}                    # clone of blip_scale, on a disk of all nodes
PYTHON=${PYTHON:-$REPO/.venv/bin/python}           # its virtual environment
TRAIN=${TRAIN:-$PYTHON $REPO/blip_scale/train.py}  # in a container, with PYTHON=python3 of the host:
                                                   # "apptainer exec --nv blip.sif python .../train.py"
OUTPUT_DIR=${OUTPUT_DIR:-$REPO/runs/$SLURM_JOB_NAME}  # a job that finds a run here resumes it
DEEPSPEED=${DEEPSPEED:-$REPO/ds_configs/zero3.json}
# For a bucket: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if it isn't Amazon's, S3_ENDPOINT_URL.
# NCCL finds InfiniBand and the right network by itself. If it doesn't, name them here:
#   export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5     and check with NCCL_DEBUG=INFO
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}       # a rank and its loaders share the node's cores

# The rendezvous is on the first node, at a port of this job and attempt.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(scontrol show node "${nodes[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((10000 + (SLURM_JOB_ID * 10 + ${SLURM_RESTART_COUNT:-0}) % 20000))
export MASTER_ADDR MASTER_PORT

# srun starts one task for each GPU, without a launcher in between. So signals reach each rank, each
# rank has its log, and each exit code counts. Every rank sees all GPUs of its node and takes that of
# its local rank, so --gpus-per-task must not be set.
#
# A rank that dies ends the others a minute later. Don't set --kill-on-bad-exit=1: when all ranks
# refuse a recipe or stop on request, it would kill the slower ones. Exit code 143 would then hide
# theirs, and the last words of a rank that knows the cause might be lost.
export SLURM_KILL_BAD_EXIT=0 SLURM_WAIT=${SLURM_WAIT:-60}
mkdir -p "$OUTPUT_DIR/logs"
read -ra command <<<"$TRAIN"
code=0
trap : TERM # at the time limit SLURM ends ranks and script, but the last line must still run
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --open-mode=append --output="$OUTPUT_DIR/logs/task_%t.log" \
    "${command[@]}" --recipe "$RECIPE" --deepspeed "$DEEPSPEED" output_dir="$OUTPUT_DIR" "$@" &
wait $! || code=$?

# Requeue the job after exit code 75 and after failures, or stop it.
exec "$PYTHON" "$REPO/slurm/requeue.py" "$code" "$OUTPUT_DIR" --seconds "$SECONDS"
