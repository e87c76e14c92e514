"""The visual tokens of a prompt in the form in which TurboMind takes embeddings: one tensor, and where its rows go.

They are put together in a thread beside the event loop, already in the engine's data type, and reach C++ without
another copy. TurboMind itself checks neither their width nor their data type: it copies bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

from lmdeploy_vico.stage.jobs import EncodedImage


@dataclass(frozen=True)
class VisualInput:
    """The visual tokens of a prompt.

    Attributes:
        values: ``[n, H]`` of the engine's data type, on the CPU, row after row; those of all images.
        ranges: ``int32 [images, 2]``: the positions in the prompt where the rows of each image begin and end, the end
            not included.
    """

    values: torch.Tensor
    ranges: torch.Tensor

    @classmethod
    def of(
        cls, images: Sequence[EncodedImage], starts: Sequence[int], dtype: torch.dtype, beyond_float16: str
    ) -> 'VisualInput':
        """Put the visual tokens of a prompt's images together; an image is one range, however many tiles it has.

        Args:
            images: at least one.
            starts: where the visual tokens of each begin.
            dtype: the engine's.
            beyond_float16: what to do where float16 cannot hold a value, in a sentence.

        Raises:
            RequestError: a value is beyond what float16 can hold; the message says what to do.
        """
        embeddings = [image.tokens.embeddings for image in images]
        values = torch.empty(sum(map(len, embeddings)), embeddings[0].shape[1], dtype=dtype)
        torch.cat([rows.to(dtype=dtype, device='cpu') for rows in embeddings], out=values)
        # Scaled values would be other values: the language model adds to them before it normalises.
        if dtype == torch.float16 and not values.isfinite().all():
            raise RequestError(
                ErrorCode.UNSUPPORTED_FEATURE,
                'A visual token of this prompt is beyond the range of float16, in which TurboMind runs. '
                f'{beyond_float16}',
            )
        ends = [start + len(rows) for start, rows in zip(starts, embeddings, strict=True)]
        return cls(values, torch.tensor([starts, ends], dtype=torch.int32).T.contiguous())

    def require(self, tokens: int, width: int, dtype: torch.dtype) -> None:
        """Check what TurboMind would not, or would report as an engine that is unavailable.

        Args:
            tokens: of the prompt.
            width: of the engine's embeddings.
            dtype: the engine's.

        Raises:
            RequestError: the visual tokens do not fit the prompt or the engine.
        """
        rows, columns = self.values.shape
        sizes = self.ranges[:, 1] - self.ranges[:, 0]
        sound = {
            f'they have {columns} values each, and the engine takes {width}': columns == width,
            f'they are {self.values.dtype}, and the engine takes {dtype}': self.values.dtype == dtype,
            'an image has none': bool((sizes > 0).all()),
            'two images overlap, or are out of order': bool((self.ranges[1:, 0] >= self.ranges[:-1, 1]).all()),
            f'they lie outside the prompt of {tokens} tokens': self.ranges.min() >= 0 and self.ranges.max() <= tokens,
            f'they are {rows}, and their places {int(sizes.sum())}': int(sizes.sum()) == rows,
        }
        for problem, fits in sound.items():
            if not fits:
                raise RequestError(ErrorCode.INTERNAL_ERROR, f'Visual tokens do not fit TurboMind: {problem}.')
