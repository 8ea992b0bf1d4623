#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than nine minutes. What fails does not stop the rest.
#
#   benchmarks/gpu.sh [--device cuda|cpu] [--tiny] [--out DIR] [--pack DIR] [--parts "tests rapid graphs stages training"]
#
#   tests     tests/test_cuda.py: exactness, cache and attention on CUDA, in float32 and bfloat16
#   rapid     RAPID at 120k, 32k and 64k tokens: an 8B-shaped target with random weights, acceptance forced to 0.77
#   graphs    the same tests and rows for steps that are recorded as CUDA graphs (SPECRAG_CUDA_GRAPHS=1)
#   stages    Speculative RAG and the span reader: latency of each stage
#   training  a training step of the drafter: tokens per second
#
# DIR (by default $OUT, else build/gpu) receives gpu.log, JSON per part, and table.md with the card's name.
# --tiny takes tiny shapes, to try the whole out on a CPU, where each part may take five times as long.
# --pack: what benchmarks/gpu_pack.sh made (by default .gpu, where it is there): missing packages, tokenizers and, where
# they were carried, weights. Models whose weights are not there get random ones of the same shape: their times hold,
# their texts mean nothing, and the table says so.
# --keep FILE puts one part of the weights, or a large wheel, aside for a later call on the same machine, and does
# nothing else.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1

{ # read whole before it runs, so that an edit meanwhile does no harm
device=cuda tiny="" out=${OUT:-build/gpu} pack=.gpu parts="tests rapid graphs stages training"
python=${PYTHON:-python3} work=${WORK:-/tmp/specrag-gpu}
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift ;;
        --tiny) tiny=1 ;;
        --out) out=$2; shift ;;
        --pack) pack=$2; shift ;;
        --parts) parts=$2; shift ;;
        --keep) mkdir -p "$work/parts" && cp "$2" "$work/parts/" && ls -l "$work/parts"; exit ;;
        -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit ;;
        *) echo "unknown option $1: benchmarks/gpu.sh --help lists them" >&2; exit 2 ;;
    esac
    shift
done
case $device in cuda | cpu) ;; *) echo "--device must be cuda or cpu, got $device" >&2; exit 2 ;; esac
for part in $parts; do
    case $part in
        tests | rapid | graphs | stages | training) ;;
        *) echo "unknown part $part: expected tests, rapid, graphs, stages or training" >&2; exit 2 ;;
    esac
done
slow=1
[ "$device" = cpu ] && slow=5 && export CUDA_VISIBLE_DEVICES=""
mkdir -p "$out" "$work"
out=$(cd "$out" && pwd)
began=$SECONDS
export PYTHONPATH="$PWD/core:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1
unset SPECRAG_CUDA_GRAPHS

# --- what is missing on this machine -----------------------------------------------------------------
wheels=$(ls "$pack"/wheels/*.whl "$work"/parts/*.whl 2> /dev/null)
if [ -n "$wheels" ]; then
    # shellcheck disable=SC2086 # one word per wheel: their names have no spaces
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" \
        $wheels || exit 1
    export PYTHONPATH="$work/site:$PYTHONPATH"
fi
"$python" - << 'END' || exit 1
import importlib.util, sys
needed = "torch transformers tokenizers safetensors numpy faiss httpx jinja2 platformdirs filelock regex rich typer pytest peft"
if lacking := [name for name in (*needed.split(), "accelerate") if importlib.util.find_spec(name) is None]:
    sys.exit(f"missing here: {', '.join(lacking)}. Carry their wheels: benchmarks/gpu_pack.sh --wheels 'NAME ...'")
import torch, transformers
print("Python", sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__)
END
cache=$("$python" benchmarks/gpu_models.py --pack "$pack" --work "$work" --device "$device") || exit 1
export XDG_CACHE_HOME=$cache
cat "$cache/models.txt"

# --- the parts ---------------------------------------------------------------------------------------
: > "$out/status.txt"
: > "$out/gpu.log"
run() { # name, seconds, command...
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    echo "== $name (at most $limit s)" | tee -a "$out/gpu.log"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$out/gpu.log"
    code=${PIPESTATUS[0]}
    case $code in
        0) echo "$name: passed, $((SECONDS - start)) s" ;;
        124 | 137) echo "$name: STOPPED after $limit s; what it wrote before counts" ;;
        *) echo "$name: FAILED with $code, $((SECONDS - start)) s" ;;
    esac >> "$out/status.txt"
}
wants() { case " $parts " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

if wants tests; then
    tests=tests/test_cuda.py
    [ "$device" = cpu ] && tests="$tests tests/test_cache_and_attention.py"
    # shellcheck disable=SC2086 # two files are two arguments
    run tests "${TESTS_SECONDS:-$((60 * slow))}" "$python" -m pytest -q -p no:cacheprovider -c /dev/null --rootdir="$PWD" $tests
fi
if [ -n "$tiny" ]; then
    size=(--shape tiny --prompts 1 --tokens 16 --lengths 2048)
else
    size=(--shape 8b --prompts 2 --tokens 48 --lengths 120000 32768)
fi
if wants rapid; then
    rows=("generate" "plain (ours)" "none, 5" "rapid, 5" "rapid, 10" "none, sparse, 5" "rapid, auto")
    run rapid "${RAPID_SECONDS:-$((160 * slow))}" "$python" benchmarks/rapid_decoding.py "${size[@]}" $((tiny ? 1024 : 65536)) \
        --acceptance 0.77 --rows "${rows[@]}" --json "$out/rapid.json"
fi
if wants graphs; then
    run graph-tests "${GRAPH_TESTS_SECONDS:-$((70 * slow))}" \
        "$python" -m pytest -q -x -p no:cacheprovider -c /dev/null --rootdir="$PWD" tests/test_cuda_graphs.py
    rows=("plain, no graphs" "plain (ours)" "none, 5" "rapid, 5" "none, sparse, 5" "rapid, auto")
    SPECRAG_CUDA_GRAPHS=1 run graphs "${GRAPHS_SECONDS:-$((85 * slow))}" "$python" benchmarks/rapid_decoding.py "${size[@]}" \
        --acceptance 0.77 --rows "${rows[@]}" --json "$out/graphs.json"
fi
if wants stages; then
    run stages "${STAGES_SECONDS:-$((70 * slow))}" "$python" benchmarks/gpu_stages.py --json "$out/stages.json" \
        ${tiny:+--questions 2 --warm-up 1 --max-rationale-tokens 8}
fi
if wants training; then
    run training "${TRAINING_SECONDS:-$((50 * slow))}" "$python" benchmarks/gpu_training.py \
        ${tiny:+--steps 3 --batch 2 --precision float32} --json "$out/training.json"
fi

# --- the end -----------------------------------------------------------------------------------------
"$python" benchmarks/gpu_table.py "$out" "$cache/models.txt" | tee "$out/table.md"
echo "whole: $((SECONDS - began)) s; results in $out"
! grep -q -E 'FAILED|STOPPED' "$out/status.txt"
exit
}
