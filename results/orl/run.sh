#!/usr/bin/env bash
# The rows of results/orl/table.md, by documented commands only: of the five main arms with seeds 0 to 4 as it stands
# (`make results-orl`), of any other arm with FOLDS, SEEDS and ARMS; ../arms.sh says how rows are run and which arms
# there are.
#   ARMS="ddpm25 heun32" SEEDS="0 1" results/orl/run.sh            # other samplers
#   ARMS="real@1250 far@1250" SEEDS=0 results/orl/run.sh           # another number of steps
# The rows of steps-25/ were run by this script at commit ac88ece, where the sampler took 25 steps and the recogniser that
# mined had 2,500 steps.
SET=orl GENERATORS=fold DEVELOPMENT="the defaults were found on these people, which favours far pairs"
RECOGNIZER=${RECOGNIZER:---size 32} GENERATOR=${GENERATOR:---size 32 --keep-every 500}
FOLDS=${FOLDS:-0 1 2 3} SEEDS=${SEEDS:-0 1 2 3 4} ARMS=${ARMS:-real far random close reproduction}

prepare() {
  need "$RUNS/$1/data/split.json" $PY prepare_data.py orl ${ORL:+"$ORL"} --fold "$1" --size 32 --out "$RUNS/$1/data"
}
. "$(dirname "$0")/../arms.sh"
