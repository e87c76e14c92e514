#!/bin/bash
# Everything that needs a CUDA device, in parts.
set -u
usage() {
    cat <<'USAGE'
usage: benchmarks/on_gpu.sh [-o FOLDER] [PART ...]

Takes the numbers that need a CUDA device, and compares them with what was aimed at. Without a PART: all of them, the
checks first. Each part can run on a machine of its own, and is over within ten minutes on one H100 or H200: before it
starts it prints why, with the number of requests that this leaves for a cell.

  checks-kernels, checks-vision, checks-engine-dense, checks-engine-moe
                 kernels against float64; vision side and engine against the reference
  memcheck       the kernels under compute-sanitizer, if it is installed
  kernels        timings of the kernels
  flips          how often routing in bfloat16 differs from float64
  vision-300M, vision-6B
                 tiles/s, images/s and latency against LMDeploy's
  vit-speed-300M, vit-speed-6B
                 the switches that may make the ViT faster, on and off in turns
  handover       the ways to hand visual tokens to the engine
  placement, placement-mps
                 8B: vision side and engine in two processes, against one, or against two under MPS
  llm-8B-64, llm-8B-512, llm-30B-A3B-64, llm-30B-A3B-512, llm-38B-64, llm-38B-512
                 the paper's Table 4: first-token throughput of the language model alone, by token compression, with so
                 many text tokens; 38B needs more memory than an H100 has and is skipped there
  image-8B       the same from images to first token, vision side included
  baselines-8B-flash, baselines-8B-internvl
                 image-8B against LMDeploy without the plugin; writes 18 GB of random weights to a scratch folder
  soak           2000 requests with cancels: every answer right, nothing grows
  bench-check    stores the ratios that `make bench-check` compares with, and compares once

  -o FOLDER      for the results (default: benchmarks/results): DATE-DEVICE-WHAT.json, .png of first-token throughput,
                 and DATE-DEVICE-PART.log with all that was printed

Environment:
  PYTHON         the interpreter (default: .venv/bin/python, else python3); the plugin has to be installed for it
  LIMIT          seconds of a part (default 600; no limit without a GPU). A part that is not done by then, or when this
                 script is told to end (TERM), is ended and keeps what it has measured.
  PROMPTS        at most so many requests of a cell (default 2000, as in the paper, or what fits the limit)
  SERVER         more arguments of `lmdeploy serve api_server` in the first-token parts, such as '--tp 2'
  TMPDIR         where the scratch folder is made
  VICO_TEST_DEVICE=cpu
                 tries the script itself without a GPU, with tiny checkpoints and few requests

Every step prints its time. One that fails does not stop the others; the exit status says whether one did.
USAGE
}

parts=(checks-kernels checks-vision checks-engine-dense checks-engine-moe memcheck kernels flips vision-300M vision-6B
    vit-speed-300M vit-speed-6B handover placement placement-mps llm-8B-64 llm-8B-512 llm-30B-A3B-64 llm-30B-A3B-512
    llm-38B-64 llm-38B-512 image-8B baselines-8B-flash baselines-8B-internvl soak bench-check)
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
export VICO_TEST_DEVICE=${VICO_TEST_DEVICE:-cuda} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
on_gpu() { [ "$VICO_TEST_DEVICE" = cuda ]; }
# The CPU trial leaves a GPU alone that happens to be there.
on_gpu || export CUDA_VISIBLE_DEVICES=
about=$("$python" -c 'import re, torch
cuda = torch.cuda.is_available()
name = torch.cuda.get_device_name() if cuda else "cpu"
memory = torch.cuda.get_device_properties(0).total_memory // 2**30 if cuda else 0
print(re.sub("[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")), memory)') || exit
read -r name memory <<<"$about"
if on_gpu && [ "$name" = cpu ]; then
    echo "$0: there is no CUDA device; VICO_TEST_DEVICE=cpu tries the script without one" >&2
    exit 2
fi
if ! active=$("$python" -m lmdeploy_vico.cli env) || ! grep -q '^plugin *active' <<<"$active"; then
    echo "$0: the plugin is not active for $python: install it with pip, --target on PYTHONPATH will do." >&2
    echo "$active" >&2
    exit 2
fi
mkdir -p "$results" || exit
scratch=$(mktemp -d) || exit
trap 'rm -rf "$scratch"' EXIT
prefix=$results/$(date +%Y-%m-%d)-$name
[ ${#chosen[@]} -gt 1 ] && log=$prefix-on-gpu.log || log=$prefix-${chosen[0]}.log
failed=() ended= child=

if on_gpu; then
    most=${PROMPTS:-2000} limit=${LIMIT:-600} clients=32 tiles=10 flips=32 handovers=24 soak=2000 check=()
else
    most=${PROMPTS:-6} limit=${LIMIT:-} clients=3 tiles=3 flips=1 handovers=3 soak=24
    check=(--like tiny --cases digests --turns 2)
fi

say() { echo "$@" | tee -a "$log"; }

# run COMMAND ...: within what is left of the part's limit, so that it can write what it has; its output is kept as well.
run() {
    local status bounded=() out=$scratch/out
    if [ -n "$limit" ]; then
        # What started this script in the background has SIGINT ignored, and Python would ignore it, too.
        bounded=(env --default-signal=INT timeout -s INT -k 25 $((deadline - SECONDS > 1 ? deadline - SECONDS : 1)))
    else
        bounded=(env --default-signal=INT)
    fi
    [ -p "$out" ] || mkfifo "$out"
    tee -i -a "$log" <"$out" &
    local copying=$!
    "${bounded[@]}" "$@" >"$out" 2>&1 &
    child=$!
    wait "$child"
    status=$?
    # A signal to this script ends the waiting early, while the command still writes what it has.
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        status=$?
    done
    child=
    wait "$copying"
    return $status
}
end() {
    ended=1
    [ -z "$child" ] || kill -INT "$child" 2>/dev/null
}
trap end TERM INT HUP

# step TITLE FUNCTION-OR-COMMAND ...: whatever it runs goes through `run`.
step() {
    local title=$1 began=$SECONDS status
    shift
    [ -z "$ended" ] || return
    say "==> $title"
    if [ "$(type -t "$1")" = function ]; then "$@"; else run "$@"; fi
    status=$?
    case $status in
        0) say "==> $title: done in $((SECONDS - began)) s" ;;
        124 | 137)
            failed+=("$title")
            say "==> $title: CUT OFF after $((SECONDS - began)) s; what it has measured is kept"
            ;;
        *)
            failed+=("$title")
            say "==> $title: FAILED after $((SECONDS - began)) s"
            ;;
    esac
}

# checkpoint MODEL [--weights]: its directory, made when first asked for; a tiny one of the same kind without a GPU.
checkpoint() {
    local directory=$scratch/$1${2:-} kind=()
    if ! on_gpu; then
        case $1 in 30B*) kind=(--llm moe) ;; 38B) kind=(--vit rms_norm) ;; esac
        run "$python" -m lmdeploy_vico.cli tiny "$directory" "${kind[@]}"
    elif [ ! -e "$directory/config.json" ]; then
        run "$python" -m lmdeploy_vico.cli tiny "$directory" --like "$1" "${@:2}"
    fi && model=$directory
}

# first_token WHAT MODE [OPTION ...]: measures $model.
first_token() {
    local what=$1 mode=$2
    shift 2
    # shellcheck disable=SC2086  # a list of words
    run "$python" -m lmdeploy_vico.cli bench --model "$model" --mode "$mode" --num-prompts "$prompts" \
        --max-concurrency $clients --tiles $tiles "$@" \
        --output-file "$prefix-$what.json" --plot "$prefix-$what.png" ${SERVER:+-- $SERVER}
}

part_checks() {
    case $1 in
        # test_compiled.py compiles ahead of time, for which it needs no GPU.
        kernels) step 'kernels against float64' "$python" -m pytest -q tests/kernels --ignore tests/kernels/test_compiled.py ;;
        vision) step 'vision side' "$python" -m pytest -q -m gpu tests/gpu -k 'not engine' ;;
        engine-*) step "engine, ${1#engine-}" "$python" -m pytest -q -m gpu tests/gpu -k "engine and ${1#engine-}" ;;
    esac
}

part_memcheck() {
    if on_gpu && command -v compute-sanitizer >/dev/null; then
        # Without PyTorch's cache every tensor is an allocation of its own, so that a wrong access meets no neighbour's.
        step 'memory checker' env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
            "$python" -m pytest -q tests/kernels -k 'triton and (sizes_of_models or heads or many)'
    else
        say '==> memory checker: skipped, it needs a CUDA device and compute-sanitizer'
    fi
}

part_kernels() {
    step 'kernel timings' "$python" -m benchmarks kernels \
        --benchmark-json="$prefix-kernels.json"
}

part_flips() {
    local width widths=(256)
    on_gpu && widths=(1024 3200)
    for width in "${widths[@]}"; do
        step "routing flips, D = $width" "$python" -m benchmarks flips --width "$width" --prompts $flips \
            --output "$prefix-routing-flips-$width.json"
    done
}

part_vision() {
    local many like=$1
    case $like in
        300M) many=(--images 48 --latencies 60 --seconds 2) ;;
        6B) many=(--images 8 --latencies 10 --seconds 2 --parts stage latency) ;;
    esac
    on_gpu || like=tiny many=(--images 2 --latencies 3 --seconds 0.5 --parts preparation stage latency)
    step "vision side, ViT $like" "$python" -m benchmarks vision --like "$like" --device "$VICO_TEST_DEVICE" \
        "${many[@]}" --output "$prefix-vision-$1.json"
}

part_vit_speed() {
    local like=$1
    on_gpu || like=tiny
    step "switches of ViT $like" "$python" -m benchmarks vit-speed --like "$like" --device "$VICO_TEST_DEVICE" \
        --output "$prefix-vit-speed-$1.json"
}

part_handover() {
    local widths=()
    on_gpu || widths=(--widths 2048)
    step 'hand-over to the engine' "$python" -m benchmarks handover --rounds $handovers "${widths[@]}" \
        --output "$prefix-handover.json"
}

# part_placement [mps]
part_placement() {
    local against=${1:-one} repeats=2
    if [ "$against" = mps ] && ! { on_gpu && command -v nvidia-cuda-mps-control >/dev/null; }; then
        say '==> placement under MPS: skipped, it needs a CUDA device and nvidia-cuda-mps-control'
        return
    fi
    on_gpu || repeats=1
    step '8B: config and tokenizer' checkpoint 8B
    LMDEPLOY_VICO_DUMMY_WEIGHTS=1 step "8B: placement, two processes against $against" "$python" -m benchmarks placement \
        --model "$model" --against "$against" --num-prompts "$prompts" --max-concurrency $clients --tiles $tiles \
        --repeats $repeats --output "$prefix-placement-$against.json"
}

# part_llm MODEL-TEXT, part_image MODEL, part_baselines MODEL-NAME
part_llm() {
    local name=${1%-*} text=${1##*-} more=()
    [ "$name" != 8B ] || more=(--count-prefills)
    step "$name: config and tokenizer" checkpoint "$name"
    LMDEPLOY_VICO_DUMMY_WEIGHTS=1 step "$name: language model alone, $text text tokens" first_token "llm-$1" llm \
        --text-tokens "$text" --token-compression 0 0.25 0.5 0.75 "${more[@]}"
}

part_image() {
    step "$1: config and tokenizer" checkpoint "$1"
    LMDEPLOY_VICO_DUMMY_WEIGHTS=1 step "$1: images" first_token "image-$1" image --text-tokens 64 \
        --token-compression 0 0.5 0.75 --count-prefills
}

part_baselines() {
    local name=${1%-*} baseline=lmdeploy-${1##*-}
    step "$name: random weights" checkpoint "$name" --weights
    step "$name: images, against $baseline" first_token "baselines-$1" image --text-tokens 64 \
        --token-compression 0 0.75 --baseline "$baseline" --servers in-turn
    rm -rf "$model"
}

part_soak() {
    step 'soak' "$python" -m benchmarks soak --requests $soak --output-file "$prefix-soak.json"
}

part_bench_check() {
    step 'ratios to compare with' "$python" -m benchmarks check --update --baseline "$prefix-check.json" "${check[@]}"
    step 'the same again' "$python" -m benchmarks check --baseline "$prefix-check.json" "${check[@]}"
}

# plan PART: prints the arithmetic and sets $prompts; fails where the part is not to be run.
plan() {
    local printed
    prompts=$most
    on_gpu || return 0
    printed=$(<"$scratch/plans/$1")
    prompts=$(tail -n 1 <<<"$printed")
    case $prompts in
        *SKIPPED*) say "$printed" && return 1 ;;
        *REFUSED*) say "$printed" && failed+=("$1") && return 1 ;;
    esac
    say "$(head -n -1 <<<"$printed")"
}

if on_gpu; then
    mkdir "$scratch/plans"
    "$python" -m benchmarks budget "${chosen[@]}" --limit "$limit" --most "$most" --memory "$memory" \
        --folder "$scratch/plans" || exit
fi
began=0 # of a part: the first one pays for this script's own start
for part in "${chosen[@]}"; do
    [ -z "$ended" ] || { failed+=("$part was not begun") && continue; }
    model= deadline=$((began + ${limit:-0} - 30))
    plan "$part" || continue
    case $part in
        checks-* | vision-* | llm-* | image-* | baselines-* | placement-*) "part_${part%%-*}" "${part#*-}" ;;
        vit-speed-*) part_vit_speed "${part##*-}" ;;
        *) "part_${part//-/_}" ;;
    esac
    began=$SECONDS
done
"$python" -m benchmarks targets "$results"
if [ ${#failed[@]} -gt 0 ]; then
    printf '==> failed: %s\n' "${failed[@]}" | tee -a "$log"
    [ -z "$ended" ] || exit 143
    exit 1
fi
say "==> all done in $SECONDS s; results in $results"
