#!/usr/bin/env bash
# What a GPU is asked, the likeliest faults first, each part under a limit of its own. Logs and JSON go into a folder.
#
#   OUT=folder PYTHON=python3 tests/gpu.sh [--dry] [part | part+part ...]
#
# --dry: on a CPU, in Triton's interpreter, at tiny sizes, every path. Parts joined by + run at the same time. They are:
#   machine   card, driver, versions, commit
#   sampling  cooperative sampling alone: a hang is the likeliest fault
#   kernels   tests/kernels on the GPU
#   memcheck  compute-sanitizer on gather, restore and decoding
#   digits    the digits model's answers to 200 questions: are they the CPU's?
#   families  families of models by kernels, under the oracle; ones that fail can be named by FAMILIES="a b"
#   compiled  some of them, compiled
#   bench     every kernel beside what PyTorch has, and the ceilings of the card
#   graphs    decode steps, compiled, on a static cache, and as CUDA graphs
#   profile   where the host's time goes
#   model     LLaVA-1.5-7B, random weights, bf16, batch 8, eager
#   inductor  the same compiled
set -u
cd "$(dirname "$0")/.."
dry=; parts=()
for argument in "$@"; do
    if [ "$argument" = --dry ]; then dry=--dry; else parts+=("$argument"); fi
done
[ ${#parts[@]} -gt 0 ] || parts=(machine sampling kernels+memcheck+digits+families+compiled bench profile graphs model inductor)
OUT=${OUT:-build/gpu}; PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
if [ -n "$dry" ]; then export TRITON_INTERPRET=1; else export VLMREWRITE_TEST_DEVICE=cuda; fi

limit() { # seconds, name, command: its output goes to name.log, a line of what came of it to the table
    local seconds=$1 name=$2 begun=$SECONDS status; shift 2
    timeout -k 5 "$seconds" "$@" > "$OUT/$name.log" 2>&1; status=$?
    printf '%-16s exit %3d  %4d s of %d  %s\n' "$name" $status $((SECONDS - begun)) "$seconds" \
        "$(tail -n 1 "$OUT/$name.log" | tr '\r' '\n' | grep -v '^ *$' | tail -n 1 | cut -c 1-150)" | tee -a "$OUT/table.txt"
    return $status
}

together() { # each part in a process of its own
    local each=() failed=0 part
    for part in "$@"; do run "$part" & each+=($!); done
    for part in "${each[@]}"; do wait "$part" || failed=1; done
    return $failed
}

module() { # seconds, name, module and its arguments
    local seconds=$1 name=$2; shift 2
    limit "$seconds" "$name" "$PYTHON" -m "tests.gpu.$@" --json "$OUT/$name.json" $dry
}

run() {
    local tests
    case $1 in
        *+*) IFS=+ read -ra tests <<< "$1"; together "${tests[@]}" ;;
        machine)
            git rev-parse HEAD 2>/dev/null || echo "${COMMIT:-commit unknown}"
            nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no GPU"
            "$PYTHON" -c 'import platform, torch, transformers as t, triton
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__, "transformers", t.__version__)' ;;
        sampling) limit 60 sampling "$PYTHON" -m tests.gpu.sampling $dry ;;
        kernels)
            tests=(tests/kernels -n "${WORKERS:-8}" --dist worksteal --tb short -q -rfs -p no:cacheprovider -p no:benchmark)
            "$PYTHON" -c 'import pytest_timeout' 2>/dev/null && tests+=(--timeout 60)
            [ -n "$dry" ] && tests=(tests/kernels/test_gather.py -k "not gradients" -q)
            limit "${KERNELS:-150}" kernels "$PYTHON" -m pytest "${tests[@]}" ;;
        memcheck) limit 120 memcheck compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m pytest -q \
            -p no:benchmark tests/kernels/test_gather.py tests/kernels/test_decode.py -k "reference" ;;
        digits) together digits-eager digits-compiled ;;
        digits-eager) module 120 digits digits ;;
        digits-compiled) [ -n "$dry" ] || module 120 digits-compiled digits --backend inductor --recipes stride-half sts-64 ;;
        families) if [ -n "$dry" ]; then run families-0; else together families-0 families-1 families-2 families-3; fi ;;
        families-*) module 130 "$1" families --part "${1#*-}/4" --seconds 100 ${FAMILIES:+--names $FAMILIES} ;;
        compiled) module 130 compiled families --ways 2 --names llava qwen2_5_vl gemma3 --seconds 100 ;;
        bench) module "${BENCH:-150}" bench kernels --seconds $((${BENCH:-150} - 25)) ${AGAINST:+--against $AGAINST} ;;
        graphs) module "${GRAPHS:-150}" graphs graphs ;;
        profile) limit 90 profile "$PYTHON" -m tests.gpu.profile $dry ;;
        model) limit "${MODEL:-120}" model "${e2e[@]}" --backend eager --json "$OUT/model.json" ;;
        inductor) limit "${MODEL:-240}" inductor "${e2e[@]}" --backend inductor --json "$OUT/inductor.json" ;;
        *) echo "tests/gpu.sh: no part is called $1" >&2; return 2 ;;
    esac
}

e2e=("$PYTHON" examples/h100.py --model llava-1.5-7b --recipe sts-64 visor-cross --batch 8 --repeat 5 $dry)
failed=0
for part in "${parts[@]}"; do run "$part" || failed=1; done
exit $failed
