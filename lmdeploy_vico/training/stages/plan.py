"""Which tile of which sample a router sees at each place of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training.compression import draw_sample, draw_tile


@dataclass(frozen=True)
class Tile:
    """A tile of a sample, by their numbers."""

    sample: int
    tile: int


class Plan:
    """One random tile of a sample at each place (paper, section 3.2); samples without images are passed over.

    Args:
        tiles: of each sample.
        seed: of the draws.

    Raises:
        TrainingError: no sample has an image.
    """

    def __init__(self, tiles: Sequence[int], seed: int) -> None:
        self._tiles, self._seed = tiles, seed
        self._samples = [index for index, count in enumerate(tiles) if count]
        if not self._samples:
            raise TrainingError('No sample has an image, and a router is trained with tiles.')

    def __getitem__(self, place: int) -> Tile:
        """The tile at a place."""
        sample = self._samples[draw_sample(self._seed, place, len(self._samples))]
        return Tile(sample, draw_tile(self._seed, place, self._tiles[sample]))

    def one_pass(self) -> list[Tile]:
        """A tile of every sample that has one."""
        return [self[place] for place in range(len(self._samples))]
