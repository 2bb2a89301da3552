#!/usr/bin/env bash
# Common part of all training jobs. The other scripts in this folder source it, with settings of the
# recipe as arguments. RECIPE is the name of a recipe or a file.
set -euo pipefail

# Settings of your cluster; change them here or in the environment (sbatch passes it on):
REPO=${REPO:-$SLURM_SUBMIT_DIR}                    # clone of blip_scale, on a shared disk
PYTHON=${PYTHON:-$REPO/.venv/bin/python}           # its virtual environment; with TRAIN, any
                                                   # Python 3.9 of the host
TRAIN=${TRAIN:-$PYTHON $REPO/blip_scale/train.py}  # command of a rank; docs/cluster.md has containers
OUTPUT_DIR=${OUTPUT_DIR:-$REPO/runs/$SLURM_JOB_NAME}  # a job that finds a run here resumes it
DEEPSPEED=${DEEPSPEED:-$REPO/ds_configs/zero3.json}
# For a bucket: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if it isn't Amazon's, S3_ENDPOINT_URL.
# NCCL detects InfiniBand and the network. If it chooses wrongly, name them here:
#   export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5     and check with NCCL_DEBUG=INFO
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}       # a rank and its loaders share the node's cores

# Nodes, restarts and arguments of srun: slurm/run_ranks.py lists SPARE_NODES, MIN_NODES, NODE_CHECK,
# MAX_FAILURES, FAILURE_WAIT, SLURM_WAIT and SRUN_ARGS.

# run_ranks.py ends the other ranks 15 s after a failure. Don't set --kill-on-bad-exit=1: when all ranks
# refuse a recipe or stop on request, it would kill the slower ones. Their exit codes would become 143,
# and the error message of the rank that knows the cause might be lost.
export SLURM_KILL_BAD_EXIT=0 SLURM_WAIT=${SLURM_WAIT:-60} FAILURE_WAIT=${FAILURE_WAIT:-15}
mkdir -p "$OUTPUT_DIR/logs"
read -ra command <<<"$TRAIN"
# Block SIGUSR1 until run_ranks.py has its handler, because by default it kills the job. With coreutils
# older than 8.31, ignore it instead.
trap '' USR1
waiting=(env --block-signal=USR1)
"${waiting[@]}" true 2>/dev/null || waiting=()
# Every rank sees all GPUs of its node and uses the GPU of its local rank. Don't set --gpus-per-task.
exec "${waiting[@]}" "$PYTHON" "$REPO/slurm/run_ranks.py" "$OUTPUT_DIR" \
    "${command[@]}" --recipe "$RECIPE" --deepspeed "$DEEPSPEED" output_dir="$OUTPUT_DIR" "$@"
