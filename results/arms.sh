# The arms of a results folder, by documented commands only. results/<set>/run.sh says what is particular to its set and
# sources this:
#   SET                     the folder below results/
#   prepare U               a function that writes $RUNS/U/data/train and $RUNS/U/data/test
#   RECOGNIZER, GENERATOR   all flags of every train_recognizer.py and train_diffusion.py
#   SAMPLER                 flags of every sample_scoremix.py (default: none)
#   MIXES                   mixes for every class, where an arm does not say otherwise (default: mine_pairs.py's, 5). All
#                           four are kept in results/SET/settings, and refused if the rows there have others
#   SPEED                   flags of both trainings that say how a network is computed, as "--precision bf16 --compile"
#                           (default: none). No setting: configs/ keeps them with all other arguments of every run,
#                           and the table says which networks had which
#   FOLDS, SEEDS, ARMS      the rows to have: each FOLD-SEED-ARM is a file in rows/, and not run again. Without SEEDS and
#                           ARMS those of plan.md, in its order: the five main arms on five seeds, the others on three
#   GENERATORS              fold: a generator and a mining recogniser a fold (U is the fold), for all its seeds
#                           seed: every seed has its own (U is the seed), so the spread of the rows covers them
#   DEVELOPMENT             why rows of this set are no evidence, for the head of its table (default: they are)
#   VALIDATION              a name: a fifth of the training classes stands for the test classes, which are not looked
#                           at; the rows go to results/SET/validation/NAME. For settings, given by the variables above.
# results/SET/models/U/ holds run directories that are there already, a generator as a rule: they are copied, and not
# trained again. A stop costs no more than what was running, an arm that fails stops no other. JOBS=2 runs two at once
# with one thread each (a generator that has nothing beside it takes both), RUNS moves the working files.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SET+=${VALIDATION:+/validation/$VALIDATION}
export PY=${PY:-python3} RUNS=${RUNS:-runs/$SET} JOBS=${JOBS:-2} SAMPLER=${SAMPLER-} MIXES=${MIXES-} SPEED=${SPEED-}
export SET RECOGNIZER GENERATOR GENERATORS
export DATA=${VALIDATION:+validation}; DATA=${DATA:-data}
main="real far close random reproduction"
groups=("${SEEDS:-0 1 2 3 4}/${ARMS:-$main}")
[ -n "${SEEDS-}${ARMS-}${VALIDATION-}" ] || groups+=(
  "0 1 2/auggen auggen-double larger mixup"
  "0 1 2/condition-far condition-close triplet half double quadruple backbone remined continued heun32"
)
read -ra folds <<< "$FOLDS"
mkdir -p "results/$SET"/{rows,audit,pairs,alignment,costs,configs} "$RUNS"
exec 9> "$RUNS/.lock"  # the jobs inherit it: they may outlive this script
flock -n 9 || { echo "run.sh: another one, or a job that it started, is at work in $RUNS; wait for it" >&2; exit 2; }
settings="RECOGNIZER $RECOGNIZER
GENERATOR $GENERATOR${SAMPLER:+
SAMPLER $SAMPLER}${MIXES:+
MIXES $MIXES}
GENERATORS $GENERATORS${DEVELOPMENT:+
DEVELOPMENT $DEVELOPMENT}${VALIDATION:+
VALIDATION $VALIDATION}"
[ -e "results/$SET/settings" ] || echo "$settings" > "results/$SET/settings"
if [ "$settings" != "$(cat "results/$SET/settings")" ]; then
  echo "run.sh: RECOGNIZER, GENERATOR, SAMPLER or MIXES are not those in results/$SET/settings, which its rows were run" \
    "with; leave them out, or give the rows a folder of their own with VALIDATION=NAME" >&2
  exit 2
fi

need() {  # FILE COMMAND...: run the command unless the file is there
  [ -e "$1" ] || "${@:2}"
}

keep() {  # RUN STAGE NAME: what a run cost, and how it was run
  cp "$1/config.json" "results/$SET/configs/$2-$3.json"
  cp "$1/cost.json" "results/$SET/costs/$2-$3.json"
}

own() {  # U: the seed of its generator and mining recogniser
  if [ "$GENERATORS" = seed ]; then echo "$1"; else echo 0; fi
}

recognizer() {  # U SEED ARM: train $RUNS/U/ARM-SEED; the arm far@2500 is far with 2,500 steps
  local D=$RUNS/$1 arm=${3%@*} data=("$RUNS/$1/$DATA/train") flags=()
  case $arm in
    real) ;;
    larger) flags=(--arch medium) ;;
    mixup) flags=(--mixup 0.2) ;;
    continued) data+=("$D/far") flags=(--init "$D/real-$(own "$1")") ;;
    *) data+=("$D/$arm") ;;
  esac
  [ "$arm" = "$3" ] || flags+=(--steps "${3#*@}")
  need "$D/$3-$2/model.pt" $PY train_recognizer.py --data "${data[@]}" $RECOGNIZER --seed "$2" --compile $SPEED \
    "${flags[@]}" --out "$D/$3-$2"
}

miner() {  # U SEED ARM: the same to mine pairs with; its row may be finished, with another run's cost and config
  recognizer "$@"
  need "results/$SET/costs/train_recognizer-$1-$2-$3.json" keep "$RUNS/$1/$3-$2" train_recognizer "$1-$2-$3"
}

images() {  # U ARM: mine, sample and audit the images of an arm, if it has any
  local D=$RUNS/$1 arm=$2 seed=$(own "$1") classes count miner G mine sample double=10 train=() sampler=$SAMPLER
  classes=$(find "$D/$DATA/train/" -mindepth 1 -maxdepth 1 | wc -l)
  count=$((classes * ${MIXES:-5}))
  [[ $SAMPLER != *--guidance* ]] || double=8  # of AugGen's images each costs 2 evaluations a step then, of ours 3
  miner=$D/real-$seed mine=(--seed "$seed" ${MIXES:+--count $count})
  sample=(--seed "$seed" --data "$D/data/train")  # all, which a kept generator knows in a validation too
  case $arm in
    real | larger | mixup) return 0 ;;
    far) ;;
    random | close) mine+=(--strategy "$arm") ;;
    # reproductions are as many images, and join a real class, so they need not be alike
    reproduction) mine=(--seed "$seed" --order 1) sample+=(--per-class $((count / classes * 5)) --correlation 0) ;;
    auggen) mine+=(--strategy random) sample+=(--mix condition --weights 0.7 0.7) ;;
    auggen-double) mine+=(--strategy random) sample+=(--mix condition --weights 0.7 0.7 --per-class $double) ;;
    triplet) mine+=(--order 3) ;;
    condition-far) mine+=(--space condition --generator "$D/generator") ;;
    condition-close) mine+=(--space condition --generator "$D/generator" --strategy close) ;;
    half) mine+=(--count $((count / 2))) ;;
    double) mine+=(--count $((count * 2))) ;;
    triple) mine+=(--count $((count * 3))) ;;
    quadruple) mine+=(--count $((count * 4))) ;;
    backbone) miner "$1" "$seed" larger; miner=$D/larger-$seed ;;
    remined) images "$1" far; miner "$1" "$seed" far; miner=$D/far-$seed ;;
    ddpm25) sample+=(--steps 25) ;;
    dpm6) sample+=(--solver dpm++ --steps 6) ;;
    heun32) sample+=(--solver heun --steps 32) ;;
    dirichlet) sample+=(--dirichlet 2) ;;
    window) sample+=(--window 0.5 1e9) ;;
    many) sample+=(--per-class 20) ;;
    started) sampler="--guidance 3 --start 3" ;;  # and nothing else of the set's own
    unstarted) sampler="--guidance 2" ;;  # likewise
    autoguided)  # wants GENERATOR with --keep-every 500, as in orl/run.sh
      sample+=(--guide "$D/generator/model-500.pt" --autoguidance 1.5) ;;
    frozen) train=(--conditions frozen --recognizer "$D/real-$seed") ;;
    aligned) train=(--align 0.1 --recognizer "$D/real-$seed") ;;
    *) echo "run.sh: there is no arm $arm" >&2; exit 2 ;;
  esac
  miner "$1" "$seed" real
  [[ $arm == condition-* ]] || mine+=(--recognizer "$miner" --data "$D/$DATA/train")
  G=$D/generator${train:+-$arm}
  need "$G/model.pt" $PY train_diffusion.py --data "$D/$DATA/train" $GENERATOR --seed "$seed" $SPEED "${train[@]}" \
    --out "$G"
  need "$D/$arm.csv" $PY mine_pairs.py "${mine[@]}" --out "$D/$arm.csv"
  need "$D/$arm/manifest.csv" \
    $PY sample_scoremix.py --generator "$G" --pairs "$D/$arm.csv" $sampler "${sample[@]}" --out "$D/$arm"
  need "$D/audit-$arm/audit.json" $PY audit.py --recognizer "$D/real-$seed" --data "$D/$DATA/train" --mixed "$D/$arm" \
    --out "$D/audit-$arm"
  # records that are there belong to rows that stand, perhaps of another generator, which nobody kept
  need "results/$SET/costs/train_diffusion-$1-$(basename "$G").json" keep "$G" train_diffusion "$1-$(basename "$G")"
  if [ ! -e "results/$SET/audit/$1-$arm.json" ]; then
    cp "$D/$arm.json" "results/$SET/pairs/$1-$arm.json"
    keep "$D/$arm" sample_scoremix "$1-$arm"
    keep "$D/audit-$arm" audit "$1-$arm"
    cp "$D/audit-$arm/audit.json" "results/$SET/audit/$1-$arm.json"
  fi
}

unit() {  # U ARM...: what the rows of these arms of a fold (or a seed) need
  local D=$RUNS/$1 arm kept run failed=0
  for kept in "results/$SET/models/$1"/*/; do
    run=$D/$(basename "$kept")
    [ ! -d "$kept" ] || [ -e "$run" ] || { rm -rf "$run.part"; cp -r "$kept" "$run.part"; mv "$run.part" "$run"; }
  done
  for arm in "${@:2}"; do
    arm=${arm/continued/far}
    bash -euo pipefail -c 'images "$@"' images "$1" "${arm%@*}" || failed=1  # in a shell of its own, where -e holds
  done
  # a generator that was brought to a validation may know more classes than are trained on there
  if [ "$DATA" = data ] && [ -e "$D/generator/model.pt" ] && [ -e "$D/real-$(own "$1")/model.pt" ]; then
    need "$D/alignment/alignment.json" $PY alignment.py --generator "$D/generator" --recognizer "$D/real-$(own "$1")" \
      --data "$D/$DATA/train" --out "$D/alignment"
    if [ ! -e "results/$SET/alignment/$1.json" ]; then
      keep "$D/alignment" alignment "$1"
      cp "$D/alignment/alignment.json" "results/$SET/alignment/$1.json"
    fi
  fi
  return $failed
}

row() {  # U FOLD SEED ARM: retrain and evaluate
  local D=$RUNS/$1 row=results/$SET/rows/$2-$3-$4
  [ ! -e "$row.json" ] || return 0
  recognizer "$1" "$3" "$4"
  keep "$D/$4-$3" train_recognizer "$1-$3-$4"
  need "$D/report-$4-$3/results.json" \
    $PY evaluate.py --model "$D/$4-$3" --data "$D/$DATA/test" --out "$D/report-$4-$3"
  keep "$D/report-$4-$3" evaluate "$2-$3-$4"
  cp "$D/$4-$3/log.jsonl" "$row.jsonl"
  cp "$D/report-$4-$3/draws.npz" "$row.npz"
  cp "$D/report-$4-$3/results.json" "$row.json.part"
  mv "$row.json.part" "$row.json"  # the last one: it says that the row is whole
}

pictures() {  # U SEED: mixes, reproductions, the mixes nearest to a training image; the ROC of the five main arms
  local D=$RUNS/$1 runs=() arm
  [ -e "$D/audit-far/audit.json" ] || return 0
  cp "$D/far/preview.png" "results/$SET/mixes.png"
  cp "$D/audit-far/nearest.png" "results/$SET/nearest.png"
  [ ! -e "$D/started/preview.png" ] || cp "$D/started/preview.png" "results/$SET/started.png"
  cp "$(find "$D/generator" -name 'samples-*.png' | sort -V | tail -n 1)" "results/$SET/samples.png"
  for arm in real far random close reproduction; do
    [ -e "$D/$arm-$2/model.pt" ] || return 0
    runs+=("$D/$arm-$2")
  done
  need "$D/report/results.json" $PY evaluate.py --model "${runs[@]}" --data "$D/$DATA/test" --out "$D/report"
  cp "$D/report/roc.png" "results/$SET/roc.png"
}
export -f need keep own recognizer miner images unit row

failed=0
for group in "${groups[@]}"; do
  read -ra seeds <<< "${group%/*}"; read -ra arms <<< "${group#*/}"
  todo=() threads=1
  # all seeds of an arm before the next arm: it takes three for a verdict
  for a in "${arms[@]}"; do for s in "${seeds[@]}"; do for f in "${folds[@]}"; do
    u=$f; [ "$GENERATORS" = fold ] || u=$s
    [ -e "results/$SET/rows/$f-$s-$a.json" ] || todo+=("$u $f $s $a")
  done; done; done
  [ ${#todo[@]} -gt 0 ] || continue
  units=$(printf '%s\n' "${todo[@]}" | cut -d' ' -f1 | sort -un)
  for u in $units; do
    prepare "$u"
    [ "$DATA" = data ] || need "$RUNS/$u/$DATA/split.json" \
      $PY prepare_data.py folder "$RUNS/$u/data/train" --test-classes 0.2 --seed 1 --out "$RUNS/$u/$DATA"
  done
  [ "$(wc -w <<< "$units")" -gt 1 ] || threads=$JOBS  # one unit alone has all the threads
  printf '%s\n' "${todo[@]}" | awk '!n[$1, $4]++ {a[$1] = a[$1] " " $4} END {for (u in a) print u a[u]}' | sort -n |
    xargs -P "$JOBS" -L 1 env OMP_NUM_THREADS="$threads" bash -euo pipefail -c 'unit "$@"' unit || failed=1
  printf '%s\n' "${todo[@]}" |
    xargs -P "$JOBS" -L 1 env OMP_NUM_THREADS=1 bash -euo pipefail -c 'row "$@"' row || failed=1
done
pictures "${folds[0]}" 0  # of the first fold and seed
$PY results/tables.py "results/$SET"
if [ $failed = 1 ]; then
  echo "run.sh: not every row could be run; the reasons stand above, and the same command goes on" >&2
  exit 1
fi
