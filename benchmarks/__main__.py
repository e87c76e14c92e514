"""The one way to start a benchmark: ``python -m benchmarks NAME [arguments]``."""

import argparse
import importlib
import sys
from collections.abc import Sequence

# Name: the module whose ``main(argv)`` runs it and returns the exit status, and what it does.
COMMANDS = {
    'kernels': ('benchmarks.kernels.run', "time the Triton kernels against torch, LMDeploy and the hardware's limits"),
    'kernel-resources': ('benchmarks.kernels.resources', 'compile the kernels for three GPUs and count what they take'),
    'flips': ('benchmarks.kernels.flips', 'count how often routing in bfloat16 differs from routing in float64'),
    'vision': ('benchmarks.vision.rates', "time preparation, vision stage and latency against LMDeploy's"),
    'vit-speed': ('benchmarks.vision.vit_speed', 'check and time the switches that may make the ViT faster'),
    'first-token': ('benchmarks.serving.first_token', 'measure first-token throughput (lmdeploy-vico bench)'),
    'handover': ('benchmarks.serving.handover', "time the ways to hand visual tokens to the engine's process"),
    'ranks': ('benchmarks.serving.ranks', "time the engine's hand-over of visual tokens to tensor-parallel ranks"),
    'pressure': ('benchmarks.serving.pressure', 'measure the overload valve where prefills are the bottleneck'),
    'placement': ('benchmarks.serving.placement', 'compare one process, two, and two under MPS on one GPU'),
    'one-process': ('benchmarks.serving.one_process', "lmdeploy with the engine in the API server's process"),
    'share': ('benchmarks.share.run', "time one rank's share of a tensor-parallel model on one GPU"),
    'soak': ('benchmarks.serving.soak', 'send thousands of requests with cancels: answers right, nothing grows'),
    'training': ('benchmarks.training.run', 'train a tiny checkpoint with photographs: divergence before and after'),
    'reader': ('benchmarks.reader.run', 'ask the reader documents through a server, by compression'),
    'check': ('benchmarks.gates.check', 'fail if anything got slower than a stored baseline'),
    'counters': ('benchmarks.gates.counters', 'compare what requests make the engine do with the committed counts'),
    'targets': ('benchmarks.gates.targets', 'compare results of GPUs with the targets'),
    'budget': ('benchmarks.gates.budget', 'print how long a part of on-gpu may take'),
    'on-gpu': ('benchmarks.gates.on_gpu', 'take all numbers that need a CUDA device, in parts of ten minutes'),
}


def main(argv: Sequence[str]) -> int:
    """Run the named command with the rest of the arguments; returns its exit status."""
    width = max(map(len, COMMANDS)) + 2
    listed = '\n'.join(f'  {name:{width}}{about}' for name, (_, about) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks',
        usage='%(prog)s NAME [arguments]',
        description=f'Run a benchmark. "%(prog)s NAME --help" describes its arguments.\n\n{listed}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('name', choices=COMMANDS, metavar='NAME', help='one of the names above')
    name = parser.parse_args(argv[:1]).name
    sys.argv = [f'{parser.prog} {name}', *argv[1:]]  # the name that the command's own --help shows
    module = importlib.import_module(COMMANDS[name][0])
    status: int = module.main(argv[1:])
    return status


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
