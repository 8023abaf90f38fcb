#!/usr/bin/env bash
# A SLURM cluster of several emulated nodes on this machine, for the tests; needs root, and Debian's
# slurm-wlm, slurm-client and munge. All its state lies in FOLDER.
#   cluster.sh up FOLDER [NODES] [GPUS A NODE] [CPUS A NODE]
#   cluster.sh down FOLDER
# A GPU is a device file that does nothing; jobs still get CUDA_VISIBLE_DEVICES of their own.
set -euo pipefail

action=${1:?up or down} folder=$(realpath -m "${2:?folder}")
nodes=${3:-2} gpus=${4:-2} cpus=${5:-4}
export SLURM_CONF="$folder/slurm.conf"

stop() { # by pid file, and wait
    local pid
    [ -s "$1" ] || return 0
    pid=$(cat "$1")
    kill "$pid" 2>/dev/null || return 0
    for _ in $(seq 100); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
}

if [ "$action" = down ]; then
    scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 50); do
        [ -n "$(squeue --noheader 2>/dev/null)" ] || break
        sleep 0.1
    done
    for file in "$folder"/run/slurmd-*.pid "$folder"/run/slurmctld.pid "$folder"/run/munged.pid; do
        stop "$file"
    done
    for name in slurm.conf gres.conf; do
        [ "$(readlink "/etc/slurm/$name")" != "$folder/$name" ] || rm "/etc/slurm/$name"
    done
    exit 0
fi

for program in munged slurmctld slurmd; do
    command -v "$program" >/dev/null || { echo "cluster.sh: $program is not installed" >&2; exit 3; }
done
mkdir -p "$folder"/{log,run,spool,state,dev}
chmod 755 "$folder"
host=$(hostname -s)
memory=${SLURM_TEST_MEMORY:-6000}
port=${SLURM_TEST_PORT:-17800}

(umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.sock" \
    --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" \
    --seed-file="$folder/run/munge.seed"

cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.sock
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
AccountingStorageType=accounting_storage/none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
# shared libraries are counted once, and jobs over their memory are killed
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=UsePss,OverMemoryKill
DefMemPerCPU=256
GresTypes=gpu
ReturnToService=1
KillWait=5
InactiveLimit=0
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=60
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
CONF
gres=""
: >"$folder/gres.conf"
if [ "$gpus" -gt 0 ]; then
    gres="Gres=gpu:fake:$gpus"
    for g in $(seq 0 $((gpus - 1))); do
        [ -e "$folder/dev/gpu$g" ] || mknod "$folder/dev/gpu$g" c 1 3 || touch "$folder/dev/gpu$g"
    done
    echo "NodeName=n[1-$nodes] Name=gpu Type=fake File=$folder/dev/gpu[0-$((gpus - 1))]" \
        >"$folder/gres.conf"
fi
for i in $(seq "$nodes"); do
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=$cpus" \
        "Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$memory $gres" \
        "State=UNKNOWN"
done >>"$folder/slurm.conf"
for name in cpu gpu; do
    default=NO
    [ "$name" != cpu ] || default=YES
    echo "PartitionName=$name Nodes=n[1-$nodes] Default=$default MaxTime=INFINITE DefaultTime=60" \
        "State=UP"
done >>"$folder/slurm.conf"

# Snakemake's jobs start without SLURM_CONF: the usual place must point here while the tests run
mkdir -p /etc/slurm
for name in slurm.conf gres.conf; do
    if [ -e "/etc/slurm/$name" ] && [ ! -L "/etc/slurm/$name" ]; then
        echo "cluster.sh: /etc/slurm/$name exists: this machine has a SLURM of its own" >&2
        exit 3
    fi
    ln -sfn "$folder/$name" "/etc/slurm/$name"
done
slurmctld -c
for i in $(seq "$nodes"); do slurmd -N "n$i"; done
for _ in $(seq 300); do
    [ "$(sinfo --noheader --Node --partition=cpu --format=%T 2>/dev/null | grep -c idle)" != "$nodes" ] ||
        exit 0
    sleep 0.1
done
echo "cluster.sh: the nodes did not come up, see $folder/log" >&2
exit 1
