#!/usr/bin/env bash
# The rows of results/omniglot-5/table.md, by documented commands only (`make results-omniglot-5`): five images of each of
# Omniglot's characters, to train and to test, so the test set is that of ../omniglot. Every seed has its own generator,
# mining recogniser and mixes. OMNIGLOT=DIR as there. ../arms.sh says how rows are run, ../plan.md
# why with these settings.
SET=omniglot-5 GENERATORS=seed FOLDS=0
RECOGNIZER=${RECOGNIZER:---size 32 --no-flip --steps 20000}
GENERATOR=${GENERATOR:---size 32 --no-flip --steps 20000}
SAMPLER=${SAMPLER---guidance 2 --correlation 0.9} MIXES=${MIXES-1}

prepare() {  # one data set for all seeds
  need "$RUNS/five/split.json" \
    $PY prepare_data.py omniglot ${OMNIGLOT:+"$OMNIGLOT"} --per-class 5 --size 32 --out "$RUNS/five"
  mkdir -p "$RUNS/$1"
  ln -sfn ../five "$RUNS/$1/data"
}
. "$(dirname "$0")/../arms.sh"
