#!/usr/bin/env bash
# The rows of results/omniglot/table.md, by documented commands only (`make results-omniglot`): 964 characters with 20
# images each to train, the 659 of the evaluation set to test. OMNIGLOT=DIR reads DIR/images_background and
# DIR/images_evaluation; without it torchvision fetches them. ../arms.sh says how rows are run.
SET=omniglot GENERATORS=fold FOLDS=0 SEEDS=${SEEDS:-0 1 2 3 4} ARMS=${ARMS:-real far close random reproduction}
RECOGNIZER=${RECOGNIZER:---size 32 --no-flip --steps 30000}
GENERATOR=${GENERATOR:---size 32 --no-flip --steps 30000}

prepare() {
  need "$RUNS/$1/data/split.json" \
    $PY prepare_data.py omniglot ${OMNIGLOT:+"$OMNIGLOT"} --size 32 --out "$RUNS/$1/data"
}
. "$(dirname "$0")/../arms.sh"
