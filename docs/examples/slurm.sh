#!/usr/bin/env bash
# Train on several machines under Slurm. From a checkout that all of them see, with its .venv:
#
#     sbatch docs/examples/slurm.sh --data data --model gpt2-medium
#
# The arguments are those of fastgpt2.train. The run is in runs/JOBID. A requeued job keeps its number and so resumes.

#SBATCH --job-name=fastgpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120

set -u

# After SIGTERM torchrun waits this many seconds for the checkpoint, then kills its processes. Its default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a machine need different ports

# One torchrun a machine; it starts one process a GPU.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 .venv/bin/torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 10 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:$port" \
    -m fastgpt2.train --out "runs/$SLURM_JOB_ID" --resume auto "$@" &
step=$!

# Slurm sends SIGTERM to this script alone, 120 seconds before the time limit. srun passes it on to every torchrun.
stopped=
trap 'stopped=1; kill -TERM "$step"' TERM

wait "$step"
status=$?
if [ "$stopped" ]; then # the signal interrupted the first wait
    wait "$step"
    status=$?
    [ "$status" -eq 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
