#!/usr/bin/env bash
# Every row of results/orl/table.md, by documented commands only; `make results-orl` calls it.
#
# A row whose file is in rows/ is not run again, and a stop costs no more than the row that was running. FOLDS, SEEDS and
# ARMS choose rows, JOBS=2 runs two at once with one thread each (faster than one with two), RUNS moves the working files.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PY=${PY:-python3} RUNS=${RUNS:-runs/orl} ROWS=results/orl/rows OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
read -ra folds <<< "${FOLDS:-0 1 2 3}"; read -ra seeds <<< "${SEEDS:-0 1 2 3 4}"
read -ra arms <<< "${ARMS:-real far random close reproduction}"
mkdir -p "$ROWS" "$RUNS"

fold() {  # FOLD: split, mining recogniser, generator, and the four mixed folders of a fold
  local D=$RUNS/$1
  $PY prepare_data.py orl --fold "$1" --size 32 --out "$D/data"
  $PY train_recognizer.py --data "$D/data/train" --size 32 --compile --out "$D/real-0"
  $PY train_diffusion.py --data "$D/data/train" --size 32 --out "$D/generator"
  for arm in far random close reproduction; do
    case $arm in
      far) mine=(--strategy distant) sample=() ;;
      random | close) mine=(--strategy $arm) sample=() ;;
      reproduction) mine=(--order 1) sample=(--per-class 25) ;;  # as many images as the 150 mixes of 5
    esac
    $PY mine_pairs.py --recognizer "$D/real-0" --data "$D/data/train" "${mine[@]}" --out "$D/$arm.csv"
    $PY sample_scoremix.py --generator "$D/generator" --pairs "$D/$arm.csv" "${sample[@]}" --out "$D/$arm"
    $PY audit.py --recognizer "$D/real-0" --data "$D/data/train" --mixed "$D/$arm" --out "$D/audit-$arm"
  done
}

row() {  # FOLD SEED ARM: retrain and evaluate
  local D=$RUNS/$1 row=$ROWS/$1-$2-$3
  [ -e "$row.json" ] && return
  local data=("$D/data/train")
  [ "$3" = real ] || data+=("$D/$3")
  $PY train_recognizer.py --data "${data[@]}" --size 32 --seed "$2" --compile --out "$D/$3-$2"
  $PY evaluate.py --model "$D/$3-$2" --data "$D/data/test" --out "$D/report-$3-$2"
  cp "$D/$3-$2/log.jsonl" "$row.jsonl"
  cp "$D/report-$3-$2/draws.npz" "$row.npz"
  cp "$D/report-$3-$2/results.json" "$row.json"  # the last one: it says that the row is whole
}
export -f fold row

todo=()
for s in "${seeds[@]}"; do for f in "${folds[@]}"; do for a in "${arms[@]}"; do
  [ -e "$ROWS/$f-$s-$a.json" ] || todo+=("$f $s $a")
done; done; done
needed=$(printf '%s\n' "${todo[@]}" | cut -d' ' -f1 -s | sort -u)
[ -z "$needed" ] || printf '%s\n' $needed | xargs -P "${JOBS:-2}" -I{} bash -euo pipefail -c 'fold {}'
[ -z "$needed" ] || printf '%s\n' "${todo[@]}" | xargs -P "${JOBS:-2}" -I{} bash -euo pipefail -c 'row {}'
$PY results/tables.py results/orl
