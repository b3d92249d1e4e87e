#!/usr/bin/env bash
# What is to be shown on a GPU, in pieces that end LIMIT seconds after they began, and go on where they
# stood when they are called again:
#
#   bash scripts/gpu.sh                    # all of them, one after the other
#   bash scripts/gpu.sh tests              # or one: tests bench graphs table1 worth report
#   DATA=DIR OUT=DIR LIMIT=540 JOBS=6 bash scripts/gpu.sh table1
#
# DATA: CIFAR-10 as a folder of images, train/CLASS/* and test/CLASS/* (without it, CIFAR-10 is
# downloaded); OUT: where runs and reports go; JOBS: runs side by side on the one GPU, each of which
# takes a small part of it. A piece that was cut off is started again by the same command: runs that
# are done are passed over, the others go on after their last epoch. DEVICE=cpu tries the script.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 HYDRA_FULL_ERROR=0
OUT=${OUT:-outputs/gpu} LIMIT=${LIMIT:-540} JOBS=${JOBS:-6} DEVICE=${DEVICE:-cuda} SEEDS=${SEEDS:-0,1,2}
EXTRA=${EXTRA:-}  # more words for every run
mkdir -p "$OUT"
images=()
[ -z "${DATA:-}" ] || images=(dataset=image_folder "dataset.root=$DATA" dataset.image_size=32)

within() { # a command, until the piece's time is over; what fails or is cut off stops nothing else
  left=$((END - $(date +%s)))
  [ "$left" -gt 0 ] || return 0
  timeout "$left" "$@" || echo "ended with status $?: $*"
}
export -f within

side_by_side() { # a line of words for each sweep, from stdin
  xargs -P "$JOBS" -I{} bash -c 'within python -m fpgm.cli --multirun {}'
}

words() { echo "${images[*]} device=$DEVICE $EXTRA"; }

tests() { within python -m pytest -q tests/gpu tests/training/test_gpu.py 2>&1 | tee "$OUT/tests.txt"; }

bench() {
  for arch in resnet20 resnet56; do
    within python scripts/bench_training.py "arch=$arch" "device=$DEVICE" images=50000 \
      workers=8 repeats=3 2>&1 | tee "$OUT/bench_$arch.txt"
  done
}

graphs() { # CUDA graphs, and nccl once
  within python -m fpgm.cli $(words) epochs=3 compile=true "hydra.run.dir=$OUT/graphs"
  within torchrun --nproc_per_node=1 -m fpgm.cli $(words) epochs=3 "hydra.run.dir=$OUT/nccl"
}

table1() { # gm and the baseline, 200 epochs; a run a process, in the order of the seeds
  for seed in ${SEEDS//,/ }; do
    for arch in resnet20 resnet56; do
      for part in "rate=0" "rate=0.4 criterion=gm pretrained=null"; do
        echo "experiment=fpgm_table1 arch=$arch seed=$seed $part $(words) hydra.sweep.dir=$OUT/fpgm_table1"
      done
    done
  done | side_by_side
}

worth() { # each seed's baseline first, in the same sweep
  for seed in ${SEEDS//,/ }; do
    echo "experiment=worth_full seed=$seed $(words) hydra.sweep.dir=$OUT/worth"
  done | side_by_side
}

report() {
  for grid in fpgm_table1 worth; do
    [ ! -d "$OUT/$grid" ] || python -m fpgm.report "$OUT/$grid"
  done
}

for piece in "${@:-tests bench graphs table1 worth report}"; do
  for name in $piece; do
    echo "== $name"
    END=$(($(date +%s) + LIMIT))
    export END
    "$name"
  done
done
