#!/bin/bash
# The pipeline on the nodes of a Slurm job: Ray is started across them, `unroll repro --ray` runs on the first one.
#
#   sbatch --nodes 4 --gpus-per-node 8 cluster/slurm.sh report@gpu
#
# Submit from the project's folder, which lies on storage that all nodes share, with its .venv. Settings, as variables:
#   UNROLL_PROFILE    profile of cluster/profiles.yaml      (cluster, or cluster_cpu on nodes without GPU)
#   UNROLL_VENV       virtual environment                   (.venv)
#   UNROLL_HEAD_IP    the first node's address that the others reach, if it has several
#
# Two minutes before the time limit, or when the job is preempted, trainings save; the job is queued again and goes on.
#SBATCH --job-name=unroll
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail
umask 077

cd "$SLURM_SUBMIT_DIR"
. "${UNROLL_VENV:-.venv}/bin/activate"
gpus=${SLURM_GPUS_ON_NODE:-0}
cpus=${SLURM_CPUS_PER_TASK:-1}
if [ "$gpus" = 0 ]; then default_profile=cluster_cpu; else default_profile=cluster; fi
export UNROLL_PROFILE=${UNROLL_PROFILE:-$default_profile}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
ip=${UNROLL_HEAD_IP:-$(srun --overlap --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}')}
port=$((20000 + SLURM_JOB_ID % 20000))          # several jobs may share a node
temporary=/tmp/ray-$SLURM_JOB_ID

# A token of this job alone: other users of the nodes can reach the ports, and nothing behind them.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/.dvc/tmp/ray-token-$SLURM_JOB_ID"
mkdir -p .dvc/tmp
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"

steps=()
finish() {
    kill -TERM "${steps[@]}" 2>/dev/null || true
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap finish EXIT
asked='' run=''
trap 'asked=yes again=yes; [ -z "$run" ] || kill -TERM "$run"' TERM

start_ray() {                                   # start_ray NODE ARGUMENTS...: Ray on one node, until the job ends
    local node=$1
    shift
    srun --overlap --nodes=1 --ntasks=1 -w "$node" ray start --block --disable-usage-stats \
        --num-cpus "$cpus" --num-gpus "$gpus" --temp-dir "$temporary" "$@" &
    steps+=($!)
}

# Ray's own client has a port of its own, if it is installed at all (ray[client]).
client=$(python -c 'import importlib.util; print("--ray-client-server-port" if importlib.util.find_spec("grpc") else "")')
start_ray "$head" --head --node-ip-address "$ip" --port "$port" --dashboard-host 127.0.0.1 \
    --dashboard-port $((port + 1)) ${client:+"$client" $((port + 2))}
export RAY_ADDRESS=$ip:$port
for _ in $(seq 120); do
    ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1 && break
    kill -0 "${steps[0]}" || { echo "Ray's head did not start on $head" >&2; exit 1; }
    sleep 1
done
for node in "${nodes[@]:1}"; do
    start_ray "$node" --address "$RAY_ADDRESS"
done

python -m unroll repro --ray "$@" &
run=$!
[ -z "$asked" ] || kill -TERM "$run"            # asked while Ray was starting
code=0 again=yes
while [ -n "$again" ]; do                       # a signal ends `wait`, not what it waits for
    again='' status=0
    wait "$run" || status=$?
    [ "$status" = 127 ] || code=$status         # 127: its end was seen before
done

# 75: it has saved and wants to go on. A job that was cancelled is no longer running, and stays cancelled.
if [ "$code" = 75 ] && [ -n "$asked" ] && scontrol show job -o "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
