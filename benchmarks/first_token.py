"""First-token throughput by token compression, as in the paper's Table 4: ``lmdeploy-vico bench`` as a file.

``benchmarks/first_token.py --help`` describes the options.
"""

import sys

from lmdeploy_vico.cli import main

if __name__ == '__main__':
    sys.exit(main(['bench', *sys.argv[1:]]))
