#!/usr/bin/env bash
# A Slurm cluster of two nodes that are both this machine, for tests: cluster.sh up DIR, cluster.sh down DIR. Everything lies in DIR; use it with
# SLURM_CONF=DIR/slurm.conf. Needs root and Debian's packages: apt-get install slurm-wlm munge
set -euo pipefail
action=$1 dir=$2

stop() {  # at once: nothing of this cluster is needed again
    for name in slurmd-node1 slurmd-node2 slurmctld munged; do
        [ -s "$dir/$name.pid" ] && kill -9 "$(cat "$dir/$name.pid")" 2>/dev/null || true
    done
}

if [ "$action" = down ]; then
    export SLURM_CONF=$dir/slurm.conf
    timeout 10 scancel --user="$(id -un)" || true
    for _ in $(seq 100); do [ -z "$(timeout 10 squeue --noheader)" ] && break; sleep 0.2; done
    stop
    exit
fi

mkdir -p "$dir/state" "$dir/spool/node1" "$dir/spool/node2" "$dir/munge"
chmod 755 "$dir/munge"
head -c 128 /dev/urandom > "$dir/munge/key"
chmod 600 "$dir/munge/key"
# its own key and socket: a munge that runs already is left alone
munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" 2>/dev/null

port=$((20000 + $$ % 6000 * 3))  # several clusters may be up at the same time
cat > "$dir/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=localhost
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
KillWait=5
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
NodeName=node[1-2] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=2 RealMemory=2000
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=hi Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
CONF
export SLURM_CONF=$dir/slurm.conf
slurmctld
slurmd -N node1
slurmd -N node2
for _ in $(seq 100); do
    [ "$(sinfo --noheader --partition=main --state=idle --format=%D 2>/dev/null)" = 2 ] && exit
    sleep 0.2
done
echo "the cluster did not come up: see $dir/slurmctld.log and $dir/slurmd-node*.log" >&2
stop
exit 1
