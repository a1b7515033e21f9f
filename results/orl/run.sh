#!/usr/bin/env bash
# The rows of results/orl/table.md, by documented commands only: of the five main arms with seeds 0 to 4 as it stands
# (`make results-orl`), of the others with the variables below. ../arms.sh says how rows are run; FOLDS, SEEDS and ARMS
# choose them.
#   ARMS="ddpm25 dpm6 heun32" SEEDS="0 1" results/orl/run.sh    # other samplers: more evaluations, the authors' method
#   A="auggen triplet condition-far condition-close continued mixup dirichlet window"
#   ARMS="${A// /@2500 }@2500" SEEDS=0 results/orl/run.sh      # other numbers of steps: real@1250, far@1250, ...
#   ARMS="autoguided@2500 frozen@2500 aligned@2500" FOLDS=0 SEEDS="0 1" results/orl/run.sh
SET=orl GENERATORS=fold RECOGNIZER="--size 32" GENERATOR="--size 32 --keep-every 500"
FOLDS=${FOLDS:-0 1 2 3} SEEDS=${SEEDS:-0 1 2 3 4} ARMS=${ARMS:-real far random close reproduction}

prepare() {
  need "$RUNS/$1/data/split.json" $PY prepare_data.py orl ${ORL:+"$ORL"} --fold "$1" --size 32 --out "$RUNS/$1/data"
}
. "$(dirname "$0")/../arms.sh"
