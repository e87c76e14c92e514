"""The options of ``lmdeploy-vico plan``."""

import argparse

from lmdeploy_vico.bench.arguments import natural, positive
from lmdeploy_vico.checkpoints.sizes import MODELS
from lmdeploy_vico.planning.gpus import GPUS

DESCRIPTION = f"""\
Say how fast a deployment would be before there is one: how many requests/s reach their first token, how long they wait
for it, what is in the way, how many fit the KV cache, and how many GPUs a request rate needs. It is a model, not a
measurement: from FLOP, bytes, all-reduces and hand-over, with a simulation of preparation, vision batches and the
scheduling of LMDeploy. docs/planning.md has its formulas, their sources, and what they leave out.

  lmdeploy-vico plan --model 241B --gpu H200 --tp 8
  lmdeploy-vico plan --model 241B --gpu H200 --tp 8 --vision-devices 8 --rate 60
  lmdeploy-vico plan --check                            how far the model is off what it is checked against

Models: {', '.join(MODELS)}. GPUs: {', '.join(GPUS)}.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; what they may be together is checked by what uses them."""
    parser.add_argument('--model', help='a published size')
    parser.add_argument('--gpu', default='H200', help='what all GPUs are (default: H200)')
    parser.add_argument('--tp', type=positive, default=1, metavar='N', help="GPUs of a server's language model (1)")
    parser.add_argument('--dp', type=positive, default=1, metavar='N', help='servers (1)')
    parser.add_argument('--vision-devices', type=positive, metavar='N',
        help="GPUs that only encode, for all servers (default: none, the servers' own GPUs encode)",
    )  # fmt: skip
    parser.add_argument('--cores', type=positive, default=8, metavar='N',
        help='cores of a CPU that prepare pictures, for each server (8)',
    )  # fmt: skip
    parser.add_argument('--max-prefill-token-num', type=positive, default=8192, metavar='N',
        help="tokens of a prefill step, as LMDeploy's option (8192)",
    )  # fmt: skip
    parser.add_argument('--mode', choices=('image', 'llm'), default='image',
        help='image: from the bytes of a picture to the first token; llm: the language model alone, as the paper '
        'measures (default: image)',
    )  # fmt: skip
    parser.add_argument('--tiles', type=positive, default=10, help='tiles of a request, thumbnail included (10)')
    parser.add_argument('--text-tokens', type=natural, nargs='+', default=[64], metavar='N',
        help='tokens of a request\'s text (64)',
    )  # fmt: skip
    parser.add_argument('--compression', type=float, nargs='+', default=[0.0, 0.25, 0.5, 0.75], metavar='SHARE',
        help='shares of visual tokens to remove, 0 to 0.75 (default: 0 0.25 0.5 0.75)',
    )  # fmt: skip
    parser.add_argument('--rate', type=float, metavar='R',
        help='requests/s of all clients; how many GPUs they need is said, too (default: 70 %% of what the deployment '
        'answers at most without compression)',
    )  # fmt: skip
    parser.add_argument('--ttft-p99', type=float, metavar='MS',
        help='with --rate: milliseconds to the first token that only one request in a hundred may exceed',
    )  # fmt: skip
    parser.add_argument('--requests', type=positive, default=2000, help='of each simulation (2000)')
    parser.add_argument('--seed', type=natural, default=0, help="of the simulation's arrivals (0)")
    parser.add_argument('--check', action='store_true',
        help='compare the model with the paper\'s Table 4 and with measurements, and repeat the fit of its constants',
    )  # fmt: skip
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')
