#!/bin/bash
# Everything that needs a CUDA device, in parts.
set -u
usage() {
    cat <<'USAGE'
usage: benchmarks/on_gpu.sh [-o FOLDER] [PART ...]

Takes the numbers that need a CUDA device, and compares them with what was aimed at. Without a PART: all of them, the
checks first. Each part can run on a machine of its own.

  checks         kernels against float64; vision side and engine against the reference
  memcheck       the kernels under compute-sanitizer, if it is installed
  kernels        timings of the kernels; how often routing in bfloat16 differs from float64
  vision         ViT-300M and -6B: tiles/s, images/s, latency, against LMDeploy's; the hand-over to the engine
  placement      8B: vision side and engine in two processes, under MPS, in one
  llm-8B, llm-30B-A3B, llm-38B
                 the paper's Table 4: first-token throughput of the language model alone, by token compression
  image-8B       the same from images to first token, vision side included
  baselines-8B   image-8B against LMDeploy without the plugin; writes 18 GB of random weights to a scratch folder
  soak           2000 requests with cancels: every answer right, nothing grows
  bench-check    stores the ratios that `make bench-check` compares with, and compares once

  -o FOLDER      for the results (default: benchmarks/results): DATE-DEVICE-WHAT.json, and .png of first-token throughput

Environment:
  PYTHON         the interpreter (default: .venv/bin/python, else python3)
  PROMPTS        requests of a cell in llm, image and baselines parts (default 2000, as in the paper), and at most so
                 many in placement (default 256). For a limit of ten minutes a command on an H200: 384 for 8B and
                 30B-A3B, 96 for 38B and placement; or one TEXT_TOKENS at a time.
  TEXT_TOKENS    of the llm parts (default: '64 512')
  SERVER         more arguments of `lmdeploy serve api_server` in the first-token parts, such as '--tp 2'
  TMPDIR         where the scratch folder is made
  VICO_TEST_DEVICE=cpu
                 tries the script itself without a GPU, with tiny checkpoints and few requests

Every step prints its time. One that fails does not stop the others; the exit status says whether one did.
USAGE
}

parts=(checks memcheck kernels vision placement llm-8B llm-30B-A3B llm-38B image-8B baselines-8B soak bench-check)
results= chosen=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        -o) results=${2:?-o needs a folder} && shift ;;
        *)
            [[ " ${parts[*]} " == *" $1 "* ]] || { echo "$0: no part $1; --help lists them" >&2 && exit 2; }
            chosen+=("$1")
            ;;
    esac
    shift
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${parts[@]}")
results=$(realpath -m "${results:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
export VICO_TEST_DEVICE=${VICO_TEST_DEVICE:-cuda} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
on_gpu() { [ "$VICO_TEST_DEVICE" = cuda ]; }
name=$("$python" -c 'import re, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
print(re.sub("[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")))') || exit
if on_gpu && [ "$name" = cpu ]; then
    echo "$0: there is no CUDA device; VICO_TEST_DEVICE=cpu tries the script without one" >&2
    exit 2
fi
mkdir -p "$results" || exit
scratch=$(mktemp -d) || exit
trap 'rm -rf "$scratch"' EXIT
prefix=$results/$(date +%Y-%m-%d)-$name
failed=()

if on_gpu; then
    prompts=${PROMPTS:-2000} text=${TEXT_TOKENS:-64 512} clients=32 tiles=10 images='0 0.5 0.75'
    widths='1024 3200' vits='300M 6B' flips=32 handovers=60 soak=2000 check=()
else
    prompts=${PROMPTS:-6} text=${TEXT_TOKENS:-64} clients=3 tiles=3 images='0 0.75'
    widths=256 vits=tiny flips=1 handovers=3 soak=24 check=(--like tiny --cases digests --turns 2)
fi
least() { echo $(($1 < $2 ? $1 : $2)); }

step() {
    local title=$1 began=$SECONDS
    shift
    echo "==> $title"
    if "$@"; then
        echo "==> $title: done in $((SECONDS - began)) s"
    else
        failed+=("$title")
        echo "==> $title: FAILED after $((SECONDS - began)) s"
    fi
}

# checkpoint MODEL [--weights]: its directory, made when first asked for; a tiny one of the same kind without a GPU.
checkpoint() {
    local directory=$scratch/$1${2:-} kind=()
    if ! on_gpu; then
        case $1 in 30B*) kind=(--llm moe) ;; 38B) kind=(--vit rms_norm) ;; esac
        "$python" -m lmdeploy_vico.cli tiny "$directory" "${kind[@]}" >/dev/null
    elif [ ! -e "$directory/config.json" ]; then
        "$python" -m lmdeploy_vico.cli tiny "$directory" --like "$1" "${@:2}" >/dev/null
    fi && model=$directory
}

# first_token WHAT MODE [OPTION ...]: measures $model.
first_token() {
    local what=$1 mode=$2
    shift 2
    # shellcheck disable=SC2086  # lists of words
    "$python" -m lmdeploy_vico.cli bench --model "$model" --mode "$mode" --num-prompts "$prompts" \
        --max-concurrency $clients --tiles $tiles --count-prefills "$@" \
        --output-file "$prefix-$what.json" --plot "$prefix-$what.png" ${SERVER:+-- $SERVER}
}

part_checks() {
    step 'kernels against float64' "$python" -m pytest -q tests/kernels
    step 'vision side and engine' "$python" -m pytest -q -m gpu tests/gpu
}

part_memcheck() {
    if on_gpu && command -v compute-sanitizer >/dev/null; then
        # Without PyTorch's cache every tensor is an allocation of its own, so that a wrong access meets no neighbour's.
        step 'memory checker' env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
            "$python" -m pytest -q tests/kernels -k 'triton and (sizes_of_models or heads or extreme or many)'
    else
        echo '==> memory checker: skipped, it needs a CUDA device and compute-sanitizer'
    fi
}

part_kernels() {
    step 'kernel timings' "$python" -m pytest -q benchmarks/kernels.py -o python_files=kernels.py \
        --benchmark-columns=median,iqr,rounds --benchmark-json="$prefix-kernels.json"
    for width in $widths; do
        step "routing flips, D = $width" "$python" benchmarks/routing_flips.py --width "$width" --prompts "$flips" \
            --output "$prefix-routing-flips-$width.json"
    done
}

part_vision() {
    local many
    for vit in $vits; do
        case $vit in
            300M) many=(--images 64 --latencies 100 --seconds 3) ;;
            6B) many=(--images 8 --latencies 10 --seconds 3) ;;
            *) many=(--images 2 --latencies 3 --seconds 0.5 --parts preparation stage latency) ;;
        esac
        step "vision side, ViT $vit" "$python" -m benchmarks.vision --like "$vit" --device "$VICO_TEST_DEVICE" \
            "${many[@]}" --output "$prefix-vision-$vit.json"
    done
    step 'hand-over to the engine' "$python" -m benchmarks.handover --rounds $handovers --output "$prefix-handover.json"
}

part_placement() {
    local repeats=2
    on_gpu || repeats=1
    step '8B: config and tokenizer' checkpoint 8B
    step '8B: placement' env LMDEPLOY_VICO_DUMMY_WEIGHTS=1 "$python" -m benchmarks.placement --model "$model" \
        --num-prompts "$(least "$prompts" 256)" --max-concurrency $clients --tiles $tiles --repeats $repeats \
        --output "$prefix-placement.json"
}

# part_llm MODEL, part_image MODEL, part_baselines MODEL
part_llm() {
    local what=llm-$1 words
    [ -z "${TEXT_TOKENS:-}" ] || what+=-${TEXT_TOKENS// /-}
    read -ra words <<<"$text"
    step "$1: config and tokenizer" checkpoint "$1"
    LMDEPLOY_VICO_DUMMY_WEIGHTS=1 step "$1: language model alone" first_token "$what" llm --text-tokens "${words[@]}" \
        --token-compression 0 0.25 0.5 0.75
}

part_image() {
    local shares
    read -ra shares <<<"$images"
    step "$1: config and tokenizer" checkpoint "$1"
    LMDEPLOY_VICO_DUMMY_WEIGHTS=1 step "$1: images" first_token "image-$1" image --text-tokens 64 \
        --token-compression "${shares[@]}"
}

part_baselines() {
    step "$1: random weights" checkpoint "$1" --weights
    step "$1: images, against LMDeploy" first_token "baselines-$1" image --text-tokens 64 --token-compression 0 0.75 \
        --baseline lmdeploy-flash lmdeploy-internvl --servers in-turn
    rm -rf "$model"
}

part_soak() {
    step 'soak' "$python" benchmarks/soak.py --requests $soak --output-file "$prefix-soak.json"
}

part_bench_check() {
    step 'ratios to compare with' "$python" -m benchmarks.check --update --baseline "$prefix-check.json" "${check[@]}"
    step 'the same again' "$python" -m benchmarks.check --baseline "$prefix-check.json" "${check[@]}"
}

for part in "${chosen[@]}"; do
    model=
    case $part in
        llm-* | image-* | baselines-*) "part_${part%%-*}" "${part#*-}" ;;
        *) "part_${part//-/_}" ;;
    esac
done
"$python" -m benchmarks.targets "$results"
if [ ${#failed[@]} -gt 0 ]; then
    printf '==> failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "==> all done in $SECONDS s; results in $results"
