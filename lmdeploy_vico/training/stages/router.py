"""Router training (paper, section 3.2): the router learns which tiles can be compressed; everything else is frozen."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch.utils.data import Dataset

from lmdeploy_vico.training import TrainingError
from lmdeploy_vico.training.data.samples import Samples
from lmdeploy_vico.training.loop.folder import write_json
from lmdeploy_vico.training.loop.processes import Processes
from lmdeploy_vico.training.loop.steps import Loop, Pace, Schedule
from lmdeploy_vico.training.model.build import PARTS, choose, fill, outline, outline_router, set_types
from lmdeploy_vico.training.model.pair import Pair
from lmdeploy_vico.training.model.vico_model import RouterModel
from lmdeploy_vico.training.model.weights import Tensors, round_as_stored
from lmdeploy_vico.training.model.writer import publish_model
from lmdeploy_vico.training.stages.beginning import folder_of, reader_of
from lmdeploy_vico.training.stages.initialise import ABSOLUTE_THRESHOLD, read_config
from lmdeploy_vico.training.stages.labels import Labels, classify, effect_of_epsilon, label
from lmdeploy_vico.training.stages.plan import Plan, Tile
from lmdeploy_vico.training.stages.ratios import RatioFile, ratio
from lmdeploy_vico.training.stages.verdict import Thresholds, Verdict, fit_threshold, scores_of

REPORT = 'report.json'
PHASE = 'router'


@dataclass(frozen=True)
class Settings:
    """What is asked of a run.

    Attributes:
        model: the ViCO checkpoint whose router is trained.
        reference: the plain checkpoint that the losses of Eq. 1 are taken against.
        data, held_out: files of samples, see :class:`~lmdeploy_vico.training.data.records.Records`.
        schedule: of the router's training.
        percentile, window, epsilon: of labels and ratios.
        relative_threshold: goes into the config.
        absolute_threshold: likewise; None where ``compress`` chooses it.
        compress: the share of held-out tiles that the absolute threshold is to compress.
        max_tiles, max_length: of a sample.
        seed: of every draw.
    """

    model: Path
    reference: Path
    data: Path
    held_out: Path | None
    schedule: Schedule
    percentile: float
    window: int
    epsilon: float
    relative_threshold: float
    absolute_threshold: float | None
    compress: float | None
    max_tiles: int
    max_length: int
    seed: int

    @property
    def absolute(self) -> float:
        """The absolute threshold where nothing else chooses it."""
        return ABSOLUTE_THRESHOLD if self.absolute_threshold is None else self.absolute_threshold

    def require(self) -> None:
        """Raise TrainingError for values that cannot be."""
        shares = {
            '--relative-threshold': self.relative_threshold,
            '--absolute-threshold': self.absolute_threshold,
            '--compress': self.compress,
        }
        for name, value in {**shares, '--percentile': self.percentile / 100}.items():
            if value is not None and not 0 <= value <= 1:
                raise TrainingError(f'{name} is out of its range.')
        if self.epsilon < 0 or self.window < 1:
            raise TrainingError('--epsilon must be 0 or more, and --window 1 or more.')
        if self.compress is not None and (self.absolute_threshold is not None or self.held_out is None):
            raise TrainingError('--compress chooses the absolute threshold by --held-out: give that, and no other.')

    def as_json(self) -> dict[str, Any]:
        """What decides ratios and training, for the run's folder; thresholds can be chosen anew afterwards."""
        settings = json.loads(json.dumps(asdict(self), default=str)) | {'stage': 'router'}
        for name in ('relative_threshold', 'absolute_threshold', 'compress'):
            del settings[name]
        return settings


class Places(Dataset):
    """The tile at each place of a run, uint8 ``[448, 448, 3]``, and its class."""

    def __init__(self, samples: Samples, plan: Plan, labels: Labels) -> None:
        self._samples, self._plan, self._labels = samples, plan, labels

    def __getitem__(self, place: int) -> tuple[np.ndarray, int]:
        """Read the tile."""
        tile = self._plan[place]
        return self._samples[tile.sample].tiles[tile.tile], int(self._labels.classes[place])


class RouterTraining:
    """A run of router training.

    Args:
        settings, pace: what and how.
        output: the folder of the run, and of the checkpoint that it makes.
        processes: of the run.
        console: for progress and messages.

    Raises:
        TrainingError: data, options or checkpoints do not fit, or the folder belongs to another run.
    """

    def __init__(self, settings: Settings, pace: Pace, output: Path, processes: Processes, console: Console) -> None:
        settings.require()
        self._settings, self._pace, self._output = settings, pace, output
        self._processes, self._console = processes, console
        self._config = read_config(settings.model)
        reader = reader_of(settings, self._config, processes, console)
        self._samples, tiles = reader.read(settings.data)
        self._plan = Plan(tiles, settings.seed)
        self._held_out: tuple[Samples, Plan] | None = None
        if settings.held_out:
            held_out, tiles = reader.read(settings.held_out)
            self._held_out = held_out, Plan(tiles, settings.seed)
        self._folder = folder_of(settings, output, processes)

    def run(self) -> None:
        """Compute the ratios, train, judge, and write the checkpoint and the report."""
        settings, schedule = self._settings, self._settings.schedule
        places = [self._plan[place] for place in range(schedule.steps * schedule.batch)]
        ratios = RatioFile(self._output, 'ratios', self._samples, self._processes)
        judged = self._held_out[1].one_pass() if self._held_out else []
        held_out = RatioFile(self._output, 'held-out', self._held_out[0], self._processes) if self._held_out else None
        self._compute([(ratios, places), *([(held_out, judged)] if held_out else [])])

        losses = [ratios[tile] for tile in places]
        values = [ratio(each, settings.epsilon) for each in losses]
        windowed = schedule.batch, settings.window, settings.percentile
        labels = label(values, *windowed)
        model = self._train(labels)
        report: dict[str, Any] = {
            'labels': {
                'compress': float(np.mean(labels.classes == 0)),
                'threshold': labels.thresholds[-1],
                'same with': effect_of_epsilon(losses, settings.epsilon, *windowed),
            }
        }
        chosen = Thresholds(settings.relative_threshold, settings.absolute)
        if held_out and self._held_out:
            scores = scores_of(model, self._held_out[0], self._processes)
            if settings.compress is not None:
                chosen = fit_threshold(scores, settings.relative_threshold, settings.compress)
            theirs = np.array([ratio(held_out[tile], settings.epsilon) for tile in judged])
            classes = classify(theirs, float(labels.thresholds[-1]))
            own = np.array([scores[tile.sample][tile.tile] for tile in judged])
            report['held out'] = Verdict(own, classes, scores, chosen).as_json()
        self._write(model, chosen, report)

    def _compute(self, wanted: Sequence[tuple[RatioFile, Sequence[Tile]]]) -> None:
        """Compute the losses that no earlier run has; the two models are in memory only meanwhile."""
        if not any(file.missing(tiles) for file, tiles in wanted):
            return
        settings, processes = self._settings, self._processes
        models = []
        for directories in ([settings.model], [settings.reference, settings.model]):
            model = outline(self._config)
            set_types(model, processes.compute)
            processes.share(model)
            models.append(fill(model, directories, processes.device))
        pair = Pair(models[0], models[1], processes)
        for file, tiles in wanted:
            if file.missing(tiles):
                file.compute(pair, tiles, self._pace.workers, self._console)

    def _train(self, labels: Labels) -> RouterModel:
        settings, processes = self._settings, self._processes
        model = outline_router(self._config)
        choose(model, ['router'])
        set_types(model, processes.compute)
        processes.share(model)
        fill(model, [settings.model], processes.device)

        def losses(items: Sequence[tuple[np.ndarray, int]]) -> torch.Tensor:
            """The cross-entropy of Eq. 4's classes, for each tile."""
            tiles = torch.from_numpy(np.stack([tile for tile, _ in items])).to(processes.device)
            classes = torch.tensor([kind for _, kind in items], device=processes.device)
            return F.cross_entropy(model(tiles), classes, reduction='none')

        places = Places(self._samples, self._plan, labels)
        loop = Loop(
            PHASE, model, places, losses, _is_routers, settings.schedule, self._pace,
            processes,
        )  # fmt: skip
        log = self._folder.log()
        loop.run(self._folder, log, self._console)
        log.close()
        round_as_stored(model.named_parameters(), Tensors(settings.model))
        return model

    def _write(self, model: RouterModel, chosen: Thresholds, report: dict[str, Any]) -> None:
        config = self._config | chosen.as_config()
        report['thresholds'] = chosen.as_config()
        publish_model(self._output, config, self._settings.model, model, _is_routers, self._processes.first)
        if self._processes.first:
            write_json(self._output / REPORT, report)
            self._console.print_json(json.dumps(report))
        self._processes.wait()


def _is_routers(name: str) -> bool:
    return name.startswith(PARTS['router'])
