#!/bin/bash
# Everything that needs a CUDA device, correctness first: tests, memory checker; kernel timings, routing flips, the
# vision side against LMDeploy's.
#
#   benchmarks/on_gpu.sh [FOLDER]      results go to FOLDER (default: benchmarks/results)
#
# PYTHON chooses the interpreter (default: .venv/bin/python). VICO_TEST_DEVICE=cpu tries the script itself without a
# GPU, in minutes. A step that fails does not stop the others; the exit status says whether one did.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
results=${1:-benchmarks/results}
export VICO_TEST_DEVICE=${VICO_TEST_DEVICE:-cuda}
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().split()[-1].lower() if torch.cuda.is_available() else "cpu")')
prefix=$results/$(date +%Y-%m-%d)-$name
mkdir -p "$results"
failed=()

step() {
    local title=$1
    shift
    echo "==> $title"
    if "$@"; then echo "==> $title: done in $((SECONDS - began)) s"; else failed+=("$title") && echo "==> $title: FAILED"; fi
    began=$SECONDS
}
began=$SECONDS

step 'kernels against float64' "$python" -m pytest -q tests/kernels
step 'vision side and engine' "$python" -m pytest -q -m gpu tests/gpu
if command -v compute-sanitizer >/dev/null && [ "$VICO_TEST_DEVICE" = cuda ]; then
    # Without PyTorch's cache every tensor is an allocation of its own, so that a wrong access meets no neighbour's memory.
    step 'memory checker' env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$python" -m pytest -q tests/kernels -k 'triton and (sizes_of_models or heads or extreme or many)'
else
    echo '==> memory checker: skipped, no compute-sanitizer'
fi
step 'kernel timings' "$python" -m pytest -q benchmarks/kernels.py -o python_files=kernels.py \
    --benchmark-columns=median,iqr,rounds --benchmark-json="$prefix-kernels.json"
if [ "$VICO_TEST_DEVICE" = cuda ]; then widths=(1024 3200) prompts=32; else widths=(256) prompts=1; fi
for width in "${widths[@]}"; do
    step "routing flips, D = $width" "$python" benchmarks/routing_flips.py --width "$width" --prompts "$prompts" \
        --output "$prefix-routing-flips-$width.json"
done

# Targets on an H200: 600 tiles/s with ViT-300M, 48 with ViT-6B; one picture of 13 tiles in 60 ms.
if [ "$VICO_TEST_DEVICE" = cuda ]; then sizes=(300M 6B); else sizes=(tiny); fi
for size in "${sizes[@]}"; do
    case $size in 300M) many=(--images 64 --latencies 100) ;; *) many=(--images 8 --latencies 10) ;; esac
    step "vision side, ViT $size" "$python" -m benchmarks.vision --like "$size" --device "$VICO_TEST_DEVICE" \
        --seconds 3 "${many[@]}" --output "$prefix-vision-$size.json"
done
step 'hand-over to the engine' "$python" -m benchmarks.handover --rounds 60 --output "$prefix-handover.json"

if [ ${#failed[@]} -gt 0 ]; then
    printf '==> failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "==> all done; results in $results"
