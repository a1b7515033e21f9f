#!/usr/bin/env bash
# The rows of results/omniglot/table.md, by documented commands only (`make results-omniglot`): Omniglot's 964 background
# characters with 20 images each to train, the 659 of the evaluation set to test, five images of each (all pairs of the
# 13,180 would be 87 million). OMNIGLOT=DIR reads DIR/images_background and DIR/images_evaluation; without it torchvision
# fetches them. ../arms.sh says how rows are run.
SET=omniglot GENERATORS=fold FOLDS=0
RECOGNIZER=${RECOGNIZER:---size 32 --no-flip --steps 30000}
GENERATOR=${GENERATOR:---size 32 --no-flip --steps 30000}
SAMPLER=${SAMPLER---guidance 2 --correlation 0.9} MIXES=${MIXES-1}

prepare() {
  need "$RUNS/all/split.json" $PY prepare_data.py omniglot ${OMNIGLOT:+"$OMNIGLOT"} --size 32 --out "$RUNS/all"
  need "$RUNS/five/split.json" \
    $PY prepare_data.py omniglot ${OMNIGLOT:+"$OMNIGLOT"} --per-class 5 --size 32 --out "$RUNS/five"
  mkdir -p "$RUNS/$1/data"
  ln -sfn ../../all/train "$RUNS/$1/data/train"
  ln -sfn ../../five/test "$RUNS/$1/data/test"
}
. "$(dirname "$0")/../arms.sh"
