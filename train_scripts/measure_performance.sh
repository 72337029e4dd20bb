#!/usr/bin/env bash
# The tables of results/performance.md, about half an hour on two CPU cores: tables on standard output, JSON and plots in
# results/performance/. Give names of parts to run those alone.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
out=results/performance
mkdir -p "$out"

run() { # name, then the arguments of benchmark.py
    local name=$1
    shift
    [[ ${#parts[@]} -gt 0 && " ${parts[*]} " != *" $name "* ]] && return
    echo
    echo "## $name"
    "$PYTHON" train_scripts/benchmark.py "$@" --json "$out/$name.json"
}

parts=("$@")
both="--layout nchw channels_last"
run resnet50_inference dg_resnet50 dg_resnet50:sparse --batch-size 8 32 $both --rounds 7
run resnet50_training dg_resnet50 --mode training --batch-size 8 32 $both --rounds 5
run sparse dg_resnet50:sparse dg_resnet101:sparse --removed 0.5 --batch-size 1 8 32 $both --rounds 7
run mobilenetv2_inference dg_mobilenetv2_100 --batch-size 8 32 $both --rounds 7
run mobilenetv2_training dg_mobilenetv2_100 --mode training --batch-size 8 32 $both --rounds 5
run sweep dg_resnet50 --sweep --batch-size 1 8 $both --rounds 5 --plot "$out/sweep.png"
run memory_resnet50 dg_resnet50 --memory --mode training --batch-size 8 32
run memory_others dg_resnet101 dg_mobilenetv2_100 --memory --mode training --batch-size 8
run resnet101_inference dg_resnet101 --batch-size 8 32 $both --rounds 5
run resnet101_training dg_resnet101 --mode training --batch-size 8 $both --rounds 5
run aggregation dg_resnet50 dg_resnet101 --aggregation --batch-size 8 $both --rounds 9 --plot "$out/aggregation.png"
run compiled_inference dg_resnet50 --compile --batch-size 8 --rounds 7
run compiled_training dg_resnet50 --compile --mode training --batch-size 8 --rounds 5
run bfloat16 dg_resnet50 --dtype bfloat16 --batch-size 8 --layout channels_last --rounds 7
