#!/usr/bin/env bash
# What every training job does inside its allocation: the scripts beside this one source it, with
# settings as arguments. RECIPE is a name or a file.
set -euo pipefail

# What a site changes, here or in the environment (sbatch passes it on):
REPO=${REPO:-$SLURM_SUBMIT_DIR}                    # clone of blip_scale, on a disk of all nodes
PYTHON=${PYTHON:-$REPO/.venv/bin/python}           # its virtual environment
TRAIN=${TRAIN:-$PYTHON $REPO/blip_scale/train.py}  # in a container, with PYTHON=python3 of the host:
                                                   # "apptainer exec --nv blip.sif python .../train.py"
OUTPUT_DIR=${OUTPUT_DIR:-$REPO/runs/$SLURM_JOB_NAME}  # a job that finds a run here goes on with it
DEEPSPEED=${DEEPSPEED:-$REPO/ds_configs/zero3.json}
# For a bucket: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if it isn't Amazon's, S3_ENDPOINT_URL.
# NCCL finds InfiniBand and the right network by itself. Where it does not, say so here:
#   export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5     and look with NCCL_DEBUG=INFO
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}       # a rank and its loaders share the node's cores

# Ranks meet at the first node, at a port of this job and attempt.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(scontrol show node "${nodes[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((10000 + (SLURM_JOB_ID * 10 + ${SLURM_RESTART_COUNT:-0}) % 20000))
export MASTER_ADDR MASTER_PORT

# One task a GPU, and no launcher between srun and the ranks: signals reach each rank, each has its
# own log, and each exit code counts. Every rank sees all GPUs of its node and takes the one of its
# local rank, so no --gpus-per-task.
#
# A rank that dies brings the others down a minute later. Not at once (--kill-on-bad-exit=1): when
# all refuse a recipe or stop on request, those that are a moment later would be killed, and 143
# would hide what they had to say; so would the cause of a failure in another rank's last words.
export SLURM_KILL_BAD_EXIT=0 SLURM_WAIT=${SLURM_WAIT:-60}
mkdir -p "$OUTPUT_DIR/logs"
read -ra command <<<"$TRAIN"
code=0
trap : TERM # past the time limit SLURM ends ranks and script; the last line is still wanted then
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --open-mode=append --output="$OUTPUT_DIR/logs/task_%t.log" \
    "${command[@]}" --recipe "$RECIPE" --deepspeed "$DEEPSPEED" output_dir="$OUTPUT_DIR" "$@" &
wait $! || code=$?

# Again, or enough? 75 and failures go back into the queue.
exec "$PYTHON" "$REPO/slurm/requeue.py" "$code" "$OUTPUT_DIR" --seconds "$SECONDS"
