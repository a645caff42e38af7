#!/usr/bin/env bash
# The runs behind docs/results.md: bash docs/results.sh FOLDER [extra arguments of `sarjax train`].
# FOLDER keeps the runs; what is done is skipped, what was cut off goes on. On two cores without an accelerator add
# `--preset cpu`; on one add nothing. Records: `sarjax data build ombria --source OMBRIA` beforehand.
set -euo pipefail
folder=$1
shift
for seed in 0 1 2; do
    for recipe in ombria_s1 ombria_s2 ombria_s1_plain; do
        run=$folder/$recipe-$seed
        sarjax train "$recipe" --workdir "$run" --seed "$seed" --evaluate-every 131 --log-every 100 "$@"
        [ -e "$run/eval/val-best.json" ] || sarjax eval "$run" --split val
        # One look at the test split a run.
        [ -e "$run/eval/test-best.json" ] || sarjax eval "$run" --split test
    done
done
