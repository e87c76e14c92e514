"""The limits with which LMDeploy's engine is started for a checkpoint of a few megabytes, and the file that marks one.

By default LMDeploy fills the device with KV blocks and decodes up to 1024 sequences at a time. A block of a tiny
checkpoint is 32 KiB, so a GPU of 80 GB holds two million. Every decode graph has a block table of its own, int32
``[sequences, blocks]``. These tables would take 22 GiB and more, and the engine would run out of memory at its start.

The limits below allow 262,144 tokens and 32 sequences, far more than a demonstration or a test needs. They are the same
with and without a GPU, so that both are tried with one command.
"""

import json
from pathlib import Path

MARKER = 'tiny_checkpoint.json'  # a file in every checkpoint that this package writes from nothing
MADE_BY = 'lmdeploy-vico tiny'
READER_MADE_BY = 'lmdeploy-vico reader'
# As keywords of lmdeploy.PytorchEngineConfig.
TINY_ENGINE = {'max_batch_size': 32, 'num_gpu_blocks': 4096}
# The same as arguments of ``lmdeploy serve api_server``.
TINY_SERVER = tuple(text for name, value in TINY_ENGINE.items() for text in (f'--{name.replace("_", "-")}', str(value)))


def server_arguments(checkpoint: str | Path) -> tuple[str, ...]:
    """Return the arguments that ``lmdeploy serve api_server`` needs for a tiny checkpoint; none for any other."""
    try:
        marker = json.loads((Path(checkpoint) / MARKER).read_text())
    except (OSError, ValueError):  # a name on the hub, or a checkpoint that is not ours
        return ()
    return TINY_SERVER if marker.get('made_by') in (MADE_BY, READER_MADE_BY) else ()
