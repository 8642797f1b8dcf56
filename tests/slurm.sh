#!/usr/bin/env bash
# Decomposes the fixture model as a Slurm array job on a one-node cluster of its own, assembles the parts, and compares
# every file with what one undivided run writes; then trains it by two tasks of one step. Needs root on Debian or Ubuntu; installs Slurm where it is missing.
#
#   tests/slurm.sh [SVDHUB]    (default: target/release/svdhub)
set -euo pipefail
cd "$(dirname "$0")/.."
svdhub=$(realpath "${1:-target/release/svdhub}")
parts=4

if [ "$(id -u)" -ne 0 ]; then
  echo "tests/slurm.sh starts the daemons of a cluster and needs root" >&2
  exit 1
fi
# Slurm's plugin for PMIx, by which tasks find each other, looks for a name that only the -dev package has
mpi=(openmpi-bin libpmix-dev)
if ! command -v slurmctld >/dev/null || ! command -v slurmd >/dev/null || ! command -v munged >/dev/null ||
  ! dpkg-query -s "${mpi[@]}" >/dev/null 2>&1; then
  echo "Installing slurmctld, slurmd, slurm-client, munge, ${mpi[*]} with apt-get"
  # no daemon may start by itself: this script starts its own. A policy that is there already stays
  policy=/usr/sbin/policy-rc.d
  if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge "${mpi[@]}" >/dev/null
  if [ -n "$(trap -p EXIT)" ]; then
    rm -f "$policy"
    trap - EXIT
  fi
fi

work=$(mktemp -d)
# munged trusts no path that others can write to
chmod 755 "$work"
pids=()
stop() {
  status=$?
  [ "$status" -eq 0 ] || tail -n 20 "$work"/*.log "$work"/job-*.out >&2 2>/dev/null || true
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
    kill "${pids[i]}" 2>/dev/null || true
    wait "${pids[i]}" 2>/dev/null || true
  done
  rm -rf "$work"
  exit "$status"
}
trap stop EXIT
trap 'exit 130' INT TERM

# ports that nobody listens on
free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 20000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}
mkdir -m 755 "$work/munge"
mkdir "$work/state" "$work/spool"
dd if=/dev/urandom of="$work/munge/key" bs=128 count=1 status=none
chmod 600 "$work/munge/key"
socket=$work/munge/socket
host=$(hostname -s)
cat >"$work/slurm.conf" <<CONF
ClusterName=svdhub-test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$socket
CredType=cred/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
# a container has neither systemd nor control groups of its own
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=10 State=UP
CONF
export SLURM_CONF=$work/slurm.conf

start() {
  local name=$1
  shift
  "$@" >"$work/$name.log" 2>&1 &
  pids+=($!)
}
start munged munged --foreground --force --key-file="$work/munge/key" --socket="$socket" \
  --pid-file="$work/munge/pid" --log-file="$work/munge/log" --seed-file="$work/munge/seed"
for _ in $(seq 50); do [ -S "$socket" ] && break; sleep 0.1; done
start slurmctld slurmctld -D -f "$SLURM_CONF"
start slurmd slurmd -D -f "$SLURM_CONF" -N "$host"
for _ in $(seq 100); do
  [ "$(sinfo -h -o %T 2>/dev/null)" = idle ] && break
  sleep 0.3
done
sinfo
if [ "$(sinfo -h -o %T)" != idle ]; then
  echo "the node did not come up" >&2
  exit 1
fi

cat >"$work/job.sh" <<'JOB'
#!/bin/sh
exec "$SVDHUB" decompose "$MODEL" --part "$SLURM_ARRAY_TASK_ID/$PARTS" --out "$WORK/part-$SLURM_ARRAY_TASK_ID" \
  --shard-size 1MB --threads 1
JOB
export SVDHUB=$svdhub WORK=$work PARTS=$parts MODEL=$PWD/fixtures/shakespeare-1m
timeout 300 sbatch --wait --array=1-$parts --output="$work/job-%a.out" "$work/job.sh"
cat "$work"/job-*.out

"$svdhub" assemble "$work"/part-* --out "$work/assembled"
"$svdhub" decompose "$MODEL" --out "$work/whole" --shard-size 1MB
# all but the times in the report
diff -r --exclude=.svdhub --exclude=report.json "$work/whole" "$work/assembled"
"$svdhub" verify "$work/assembled" --against "$MODEL"
echo "$parts parts, computed by Slurm: every file is what an undivided run writes"

# over the MPI that Slurm's PMIx starts
train=(train "$work/whole" --data fixtures/eighty-train.txt --steps 4 --batch 4 --length 64 --json)
"$svdhub" "${train[@]}" --out "$work/alone" >"$work/alone.json"
timeout 120 srun --mpi=pmix --ntasks=2 "$svdhub" "${train[@]}" --out "$work/together" --parallel >"$work/together.json"
python3 - "$work/alone.json" "$work/together.json" <<'PYTHON'
import json, sys

alone, together = (json.load(open(path)) for path in sys.argv[1:])
assert together["processes"] == 2, together["processes"]
for one, two in zip(alone["losses"], together["losses"], strict=True):
    assert abs(one - two) < 1e-5 * one, (one, two)
PYTHON
echo "two tasks, started by srun: the losses are those of one process"
