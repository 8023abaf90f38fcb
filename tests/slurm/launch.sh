#!/usr/bin/env bash
# In the place of `python` in a job: note the node and its GPUs, hold a lock for each of them as long
# as the program lives, and become the program.
# usage: launch.sh FOLDER python ARGUMENTS
folder=$1
shift
note="$SLURMD_NODENAME ${CUDA_VISIBLE_DEVICES:-none}"
exec 9>"$folder/$SLURMD_NODENAME-${CUDA_VISIBLE_DEVICES:-none}.lock"
flock --nonblock 9 || note="$note CLASH"
echo "$note" >>"$folder/gpus"
exec "$@"
