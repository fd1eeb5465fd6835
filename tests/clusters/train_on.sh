#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Trains 3 steps on 4 ranks of two hosts, goes on for 3 more on 3 ranks (2 on torchrun's hosts), and compares with one rank that was not interrupted.
#
#   train_on.sh slurm|torchrun PATH-OF-TRAIN_LM PYTHON
set -euo pipefail
kind=$1 train=$2 python=$3
if [ "${RESHARD_CLUSTER_TESTS:-}" != 1 ]; then
  echo "skipped: starts daemons and needs root; set RESHARD_CLUSTER_TESTS=1"
  exit 77
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cluster=$here/../../scripts/cluster
work=$(mktemp -d "${TMPDIR:-/tmp}/cluster-test-XXXXXX")
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1
job=("$train" --checkpoint "$work/checkpoints" --device cpu)

"$train" --checkpoint "$work/none" --device cpu --steps 6 --log "$work/alone.jsonl"
case $kind in
  slurm)
    run() { # ranks arguments...
      local ranks=$1
      shift
      echo "srun -N2 -n$ranks train_lm $*"
      "$cluster" slurm srun -N2 -n"$ranks" "${job[@]}" "$@"
    }
    again=3
    ;;
  torchrun)
    torchrun=$(dirname "$python")/torchrun
    [ -x "$torchrun" ] || { echo "skipped: no torchrun at $torchrun"; exit 77; }
    run() {
      local each=$(($1 / 2))
      shift
      echo "torchrun --nnodes 2 --nproc-per-node $each train_lm $*"
      # As docs/clusters.md has it.
      "$cluster" hosts bash -c 'torchrun=$1 each=$2; shift 2
        export GLOO_SOCKET_IFNAME=$IFNAME
        [ "$HOST" = 0 ] && is_host=true || is_host=false
        exec "$torchrun" --no-python --nnodes 2 --nproc-per-node "$each" --rdzv-id job --rdzv-backend c10d \
          --rdzv-endpoint "$FIRST_ADDR:29400" --rdzv-conf "is_host=$is_host" --local-addr "$HOST_ADDR" -- "$@"' \
        _ "$torchrun" "$each" "${job[@]}" "$@"
    }
    again=2
    ;;
esac
run 4 --steps 3 --save-every 3 --log "$work/log.jsonl"
run "$again" --resume --steps 6 --log "$work/log.jsonl"

# {"step": n, "loss": x} a line
awk -F'[:,}]' -v wanted=6 '
  FNR == NR { alone[$2 + 0] = $4; next }
  { d = $4 - alone[$2 + 0]; if (d < 0) d = -d; if (d > largest) largest = d; steps++ }
  END {
    printf "%d steps, largest difference of the loss to one rank alone: %.1e\n", steps, largest
    exit !(steps == wanted && largest < 1e-4)
  }' "$work/alone.jsonl" "$work/log.jsonl"
