#!/usr/bin/env bash
# One training job on several nodes of a SLURM allocation: an accelerate launcher on each node, which
# meet at the first one. In a profile, for the rule train (2 nodes of 4 GPUs):
#   nodes: 2, tasks: 2, tasks_per_gpu: 0, mpi: srun, gpu: 8,
#   launch: "workflow/scripts/srun_accelerate.sh config/accelerate/ddp.yaml 4"
# usage: srun_accelerate.sh CONFIG GPUS_PER_NODE ARGUMENTS OF PYTHON
set -euo pipefail
config=$1 per_node=$2
shift 2
job=${SLURM_JOB_ID:?not inside a SLURM allocation}
# Snakemake takes the other SLURM variables out of the environment
read -r nodes list < <(squeue --noheader --jobs="$job" --format="%D %N")
head=$(scontrol show hostnames "$list" | head -n 1)
address=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
port=$((20000 + job % 20000))
export config per_node nodes address port
exec srun --jobid="$job" --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none \
    --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file "$config" --num_machines "$nodes" \
    --machine_rank "$SLURM_PROCID" --num_processes $((nodes * per_node)) \
    --main_process_ip "$address" --main_process_port "$port" "$@"' bash "$@"
