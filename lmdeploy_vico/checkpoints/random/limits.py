"""How LMDeploy's engine is started for a tiny checkpoint.

LMDeploy fills the device with KV blocks and lets as many sequences run as it would of a large model. A block of a tiny
checkpoint is 32 KiB: a GPU of 80 GB holds two million of them, and each of the decode graphs, captured at the start,
keeps a table of int32 ``[sequences, blocks]`` of its own: 22 GiB and more with the default of 1024 sequences, so that
the engine ends for lack of memory. These limits are far above what a demonstration or a test asks for (262,144 tokens,
32 requests decoded at a time), and the same with and without a GPU, so that one command is tried on both.
"""

import json
from pathlib import Path

MARKER = 'tiny_checkpoint.json'
MADE_BY = 'lmdeploy-vico tiny'
# As keywords of lmdeploy.PytorchEngineConfig.
TINY_ENGINE = {'max_batch_size': 32, 'num_gpu_blocks': 4096}
# The same as arguments of ``lmdeploy serve api_server``.
TINY_SERVER = tuple(text for name, value in TINY_ENGINE.items() for text in (f'--{name.replace("_", "-")}', str(value)))


def server_arguments(checkpoint: str | Path) -> tuple[str, ...]:
    """Arguments that ``lmdeploy serve api_server`` needs for this checkpoint: none unless it is a tiny one."""
    try:
        marker = json.loads((Path(checkpoint) / MARKER).read_text())
    except (OSError, ValueError):  # a name on the hub, or a checkpoint of somebody else
        return ()
    return TINY_SERVER if marker.get('made_by') == MADE_BY else ()
