"""Spans of visual tokens in the engine's process, and from there to the processes that compute.

What LMDeploy 0.18's executors do with them, in the engine's loop, and what is copied:

- one device (``uni_executor``): nothing; ``to_device`` copies each span to the device.
- Ray (``ray_executor``): ``ray.put`` pickles them with protocol 5. Our buffers go from the tensors straight into the
  object store, one copy, in a thread beside the loop (:func:`beside_the_loop`). A worker's tensors lie in the store,
  read-only and for all ranks of a machine together, and go from there to the device. Torch tensors would be written to
  a file in memory each, that into the pickle, and that into the store, and be read in reverse.
- multiprocessing (``mp_executor``): pickles with protocol 5 into one piece of bytes, one copy, and sends them in blocks
  of shared memory; a worker puts them together, and unpickles bytearrays, one copy, which become the tensors' memory.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, SupportsIndex, TypeVar

import torch
from lmdeploy.pytorch.multimodal.data_type import MultiModalData

from lmdeploy_vico.adapter.handover import PackedRows

Result = TypeVar('Result')


class VisualSpan(MultiModalData):
    """LMDeploy's multimodal data with ``data`` of ``[n, H]`` on the CPU, which is pickled at the cost of its bytes.

    ``data`` is a plain tensor. On a device it is LMDeploy's own class that holds it, by ``to_device``.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """Pickle, or copy."""
        rows = (PackedRows.lent if int(protocol) >= 5 else PackedRows.of)(self.data)
        fields = {name: value for name, value in vars(self).items() if name != 'data'}
        return _load, (rows.data, rows.dtype, rows.width, fields)


def carries_spans(inputs: Any) -> bool:
    """Return whether what an executor is to compute has visual tokens in it.

    Args:
        inputs: what LMDeploy's engine gives to ``forward_async``: by name, the step's ``ModelInputs`` among it.
    """
    vision = getattr(inputs.get('inputs'), 'vision_inputs', None)
    multimodals = getattr(vision, 'input_multimodals', None) or ()
    return any(isinstance(one, VisualSpan) for named in multimodals if named for kind in named.values() for one in kind)


async def beside_the_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end in a thread with a loop of its own, and wait for it.

    For what copies megabytes before it waits: meanwhile this loop serves others.
    """
    return await asyncio.to_thread(asyncio.run, work)


def _load(data: Any, dtype: torch.dtype, width: int, fields: dict[str, Any]) -> VisualSpan:
    return VisualSpan(data=PackedRows(data, dtype, width).tensor(), **fields)
