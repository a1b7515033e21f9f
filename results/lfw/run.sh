#!/usr/bin/env bash
# The rows of results/lfw/table.md, by documented commands only (`make results-lfw`): people with four images or more, 20
# of each at most, in grey, four fifths of the people to train, the others to test. LFW=DIR reads DIR/<name>/<image>,
# which here were the deep-funneled images; without it scikit-learn fetches the funneled ones. ../arms.sh says how rows
# are run, ../plan.md why with these settings.
# The rows of steps-10000/ were run by this script at commit dca7009, in fp32; all others so far in bf16, compiled, which
# SPEED= turns off (a CPU without AMX is slow in it). validation/steps asks people kept from training which steps each
# arm should have: VALIDATION=steps SEEDS=0 ARMS="real far real@10000 real@40000 far@10000 far@40000".
SET=lfw GENERATORS=fold FOLDS=0
RECOGNIZER=${RECOGNIZER:---size 64 --steps 20000} GENERATOR=${GENERATOR:---size 64 --patch 4 --steps 40000}
SAMPLER=${SAMPLER---guidance 3 --start 3} MIXES=${MIXES-1} SPEED=${SPEED---precision bf16 --compile}

prepare() {
  need "$RUNS/$1/data/split.json" \
    $PY prepare_data.py lfw ${LFW:+"$LFW"} --per-class 20 --size 64 --grey --out "$RUNS/$1/data"
}
. "$(dirname "$0")/../arms.sh"
