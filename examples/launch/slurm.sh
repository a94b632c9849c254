#!/bin/bash
# One run on several nodes of a SLURM cluster, one launcher a node and one process a GPU:
#
#   sbatch --nodes 8 examples/launch/slurm.sh my.yaml [OPTION ...]
#
# Options are those of `asyppo train`. The output directory of the configuration has to be one that all nodes share. A
# job that is put back into the queue goes on from its last checkpoint, and so does one whose process died.
#SBATCH --job-name=asyppo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

config=${1:?usage: sbatch [--nodes N] slurm.sh CONFIG [OPTION ...]}
shift

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 8))

# Weights are sharded within a node and replicated across nodes.
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc-per-node 8 \
  --rdzv-backend c10d \
  --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-endpoint "$first_node:29500" \
  --max-restarts 3 \
  -m asyppo train \
  --config "$config" \
  --run_name "job-$SLURM_JOB_ID" \
  --resume true \
  --distributed.replicate "$SLURM_NNODES" \
  "$@"
