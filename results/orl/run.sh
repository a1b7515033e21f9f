#!/usr/bin/env bash
# The rows of results/orl/table.md, by documented commands only: of the five main arms with seeds 0 to 4 as it stands
# (`make results-orl`), of the others with the variables below.
#
# A row whose file is in rows/ is not run again, and a stop costs no more than the row that was running. FOLDS, SEEDS
# and ARMS choose rows, JOBS=2 runs two at once with one thread each, RUNS moves the working files. The mining recogniser
# of these rows had 2,500 steps and their images 25 steps of DDPM, the defaults of the time.
#   ARMS="ddpm8 dpm6 heun32" SEEDS="0 1" results/orl/run.sh    # fewer evaluations, and the authors' method
#   A="auggen triplet condition-far condition-close continued mixup dirichlet window"
#   ARMS="${A// /@2500 }@2500" SEEDS=0 results/orl/run.sh      # other numbers of steps: real@1250, far@1250, ...
#   ARMS="autoguided@2500 frozen@2500 aligned@2500" FOLDS=0 SEEDS="0 1" results/orl/run.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
export PY=${PY:-python3} RUNS=${RUNS:-runs/orl} ROWS=results/orl/rows OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export ARMS=${ARMS:-real far random close reproduction}
read -ra folds <<< "${FOLDS:-0 1 2 3}"; read -ra seeds <<< "${SEEDS:-0 1 2 3 4}"; read -ra arms <<< "$ARMS"
mkdir -p "$ROWS" "$RUNS"

need() {  # FILE COMMAND...: run the command unless the file is there
  [ -e "$1" ] || "${@:2}"
}

fold() {  # FOLD: split, mining recogniser, generator, and the mixed folders of the arms
  local D=$RUNS/$1 mine sample train G
  need "$D/data/split.json" $PY prepare_data.py orl ${ORL:+"$ORL"} --fold "$1" --size 32 --out "$D/data"
  need "$D/mining/model.pt" \
    $PY train_recognizer.py --data "$D/data/train" --size 32 --compile --steps 2500 --out "$D/mining"
  need "$D/generator/model.pt" \
    $PY train_diffusion.py --data "$D/data/train" --size 32 --keep-every 500 --out "$D/generator"
  for arm in ${ARMS//continued/far}; do
    arm=${arm%@*}
    mine=(--recognizer "$D/mining" --data "$D/data/train") sample=(--steps 25) train=()
    case $arm in
      real | mixup) continue ;;  # no images of their own
      far) ;;
      random | close) mine+=(--strategy "$arm") ;;
      ddpm8) sample=() ;;
      dpm6) sample=(--solver dpm++ --steps 6) ;;
      heun32) sample=(--solver heun --steps 32) ;;
      reproduction) mine+=(--order 1) sample+=(--per-class 25) ;;  # as many images as 150 mixes of 5
      triplet) mine+=(--order 3) ;;
      condition-far) mine=(--space condition --generator "$D/generator") ;;
      condition-close) mine=(--space condition --generator "$D/generator" --strategy close) ;;
      dirichlet) sample+=(--dirichlet 2) ;;
      window) sample+=(--window 0.5 1e9) ;;
      autoguided) sample+=(--guide "$D/generator/model-500.pt" --autoguidance 1.5) ;;
      frozen) train=(--conditions frozen --recognizer "$D/mining") ;;
      aligned) train=(--align 0.1 --recognizer "$D/mining") ;;
      auggen) mine+=(--strategy random) sample+=(--mix condition --weights 0.7 0.7) ;;
      *) echo "run.sh: there is no arm $arm" >&2; exit 2 ;;
    esac
    G=$D/generator${train:+-$arm}
    need "$G/model.pt" $PY train_diffusion.py --data "$D/data/train" --size 32 "${train[@]}" --out "$G"
    need "$D/$arm.csv" $PY mine_pairs.py "${mine[@]}" --out "$D/$arm.csv"
    need "$D/$arm/manifest.csv" \
      $PY sample_scoremix.py --generator "$G" --pairs "$D/$arm.csv" "${sample[@]}" --out "$D/$arm"
    need "$D/audit-$arm/audit.json" \
      $PY audit.py --recognizer "$D/mining" --data "$D/data/train" --mixed "$D/$arm" --out "$D/audit-$arm"
    mkdir -p results/orl/audit && cp "$D/audit-$arm/audit.json" "results/orl/audit/$1-$arm.json"
  done
}

row() {  # FOLD SEED ARM: retrain and evaluate
  local D=$RUNS/$1 row=$ROWS/$1-$2-$3
  [ ! -e "$row.json" ] || return 0
  local data=("$D/data/train") train=()
  [[ $3 != *@* ]] || train=(--steps "${3#*@}")
  case ${3%@*} in
    real) ;;
    mixup) train+=(--mixup 0.2) ;;
    continued) data+=("$D/far") train+=(--init "$D/mining") ;;
    *) data+=("$D/${3%@*}") ;;
  esac
  need "$D/$3-$2/model.pt" \
    $PY train_recognizer.py --data "${data[@]}" --size 32 --seed "$2" --compile "${train[@]}" --out "$D/$3-$2"
  $PY evaluate.py --model "$D/$3-$2" --data "$D/data/test" --out "$D/report-$3-$2"
  cp "$D/$3-$2/log.jsonl" "$row.jsonl"
  cp "$D/report-$3-$2/draws.npz" "$row.npz"
  cp "$D/report-$3-$2/results.json" "$row.json"  # the last one: it says that the row is whole
}
export -f need fold row

todo=()
for s in "${seeds[@]}"; do for f in "${folds[@]}"; do for a in "${arms[@]}"; do
  [ -e "$ROWS/$f-$s-$a.json" ] || todo+=("$f $s $a")
done; done; done
if [ ${#todo[@]} -gt 0 ]; then
  printf '%s\n' "${todo[@]}" | cut -d' ' -f1 | sort -u | xargs -P "${JOBS:-2}" -I{} bash -euo pipefail -c 'fold {}'
  printf '%s\n' "${todo[@]}" | xargs -P "${JOBS:-2}" -I{} bash -euo pipefail -c 'row {}'
fi
$PY results/tables.py results/orl
