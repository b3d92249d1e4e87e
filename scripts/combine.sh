#!/usr/bin/env bash
# The runs of docs/combine.md: a pruned network, and low rank, few bits and shared kernels on top of it.
#
#   DATA=DIR OUT=outputs/combine bash scripts/combine.sh resnet20   # 2 hours on one core
#   DATA=DIR OUT=outputs/combine bash scripts/combine.sh resnet56
#   OUT=outputs/combine bash scripts/combine.sh timed               # nothing beside it
#
# DATA: CIFAR-10 as a folder of images, train/CLASS/* and test/CLASS/*. Runs that are done are passed
# over, one that was cut off goes on after its last epoch.
set -euo pipefail
export OMP_NUM_THREADS=1
OUT=${OUT:-outputs/combine}
# What preset=best was when these runs were made.
PRUNE=(criterion=gm schedule=fade optimizer=finetune method=distillation)
WORDS="dataset=image_folder dataset.root=${DATA:-data} dataset.image_size=32 dataset.validation=0.1 seed=0"

train() { # a run: its name, then its words
  # shellcheck disable=SC2086
  fpgm-train $WORDS "hydra.run.dir=$OUT/$1" "${@:2}"
}

further() { # a run that trains a compact network on, beside its dense one: name, from, dense, methods
  train "$1" arch=compact "pretrained=$OUT/$2" rate=0 optimizer=finetune epochs=3 \
    "method=$4" "method.distillation.teacher=$OUT/$3"
}

low_rank() { # name of the run, way
  [ -e "$OUT/$1/$2/low_rank.json" ] || fpgm-compress "$OUT/$1" --decompose "$2" --macs-target 0.7
}

resnet20() {
  train dense rate=0 epochs=15 optimizer=fast
  train pruned "pretrained=$OUT/dense" macs_target=0.5 residual=inner align=8 \
    "${PRUNE[@]}" epochs=3
  further pruned_more pruned dense '[distillation]'
  low_rank pruned tai
  low_rank pruned zhang
  further pruned_zhang pruned/zhang dense '[distillation]'
  further pruned_inq pruned dense '[inq,distillation]'
  further pruned_ttq pruned dense '[ttq,distillation]'
  further pruned_shared pruned dense '[shared_kernels,distillation]'
  further pruned_zhang_inq pruned_zhang dense '[inq,distillation]'
}

resnet56() {
  train dense56 arch=resnet56 rate=0 epochs=5 optimizer=fast
  train pruned56 arch=resnet56 "pretrained=$OUT/dense56" macs_target=0.5 residual=shared align=16 \
    "${PRUNE[@]}" epochs=3
  further pruned56_more pruned56 dense56 '[distillation]'
  low_rank pruned56 zhang
  further pruned56_inq pruned56 dense56 '[inq,distillation]'
  further pruned56_zhang pruned56/zhang dense56 '[distillation]'
  further pruned56_shared pruned56 dense56 '[shared_kernels,distillation]'
  further pruned56_zhang_inq pruned56_zhang dense56 '[inq,distillation]'
}

timed() { # runs whose kernels multiply other shapes
  for run in dense dense56 pruned pruned_zhang pruned_zhang_inq pruned56 pruned56_zhang pruned56_zhang_inq; do
    [ ! -e "$OUT/$run/compact.pt" ] ||
      fpgm-latency "$OUT/$run" --int8 --runtimes onnxruntime,openvino --batch 1,128 --threads 1
  done
}

"$1"
