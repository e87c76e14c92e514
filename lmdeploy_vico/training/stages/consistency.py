"""Consistency training (paper, section 3.1): the model learns to say with fewer visual tokens what it said with all."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import Dataset

from lmdeploy_vico.training.compression import WARM_UP_SHARE, draw_sample, draw_share, draw_tiles
from lmdeploy_vico.training.data.batches import lay_out
from lmdeploy_vico.training.data.samples import Sample, Samples
from lmdeploy_vico.training.loop.folder import Log, write_json
from lmdeploy_vico.training.loop.processes import Processes
from lmdeploy_vico.training.loop.steps import Loop, Pace, Schedule
from lmdeploy_vico.training.model.adapters import add_adapters, reset_adapters, without_adapters
from lmdeploy_vico.training.model.build import PARTS, choose, fill, outline, recompute, set_types
from lmdeploy_vico.training.model.losses import Target, sample_means
from lmdeploy_vico.training.model.pair import Pair
from lmdeploy_vico.training.model.weights import Tensors, is_adapter, load, round_as_stored, whole
from lmdeploy_vico.training.model.writer import publish_model
from lmdeploy_vico.training.stages.beginning import folder_of, reader_of
from lmdeploy_vico.training.stages.divergence import SHARES, divergence, targets_of
from lmdeploy_vico.training.stages.initialise import read_config

REPORT = 'report.json'
BEFORE, AFTER = 'before', 'after'  # training, in the report
WARM_UP, MAIN = 'warm-up', 'main'  # the phases


@dataclass(frozen=True)
class Settings:
    """What is asked of a run.

    Attributes:
        model: a ViCO checkpoint to begin with.
        reference: the checkpoint that it shall go on answering like; with adapters, the model itself is.
        data, held_out: files of samples, see :class:`~lmdeploy_vico.training.data.records.Records`.
        warm_up, main: schedules of the two phases: ``mlp2`` alone, then ``parts``. One of no steps is left out.
        parts: what the second phase trains, keys of :data:`~lmdeploy_vico.training.model.build.PARTS`.
        lora_rank: of adapters that are trained instead of the weights of ``parts`` (but ``mlp2``); 0 for none.
        max_tiles, max_length: of a sample.
        seed: of every draw.
    """

    model: Path
    reference: Path
    data: Path
    held_out: Path | None
    warm_up: Schedule
    main: Schedule
    parts: Sequence[str]
    lora_rank: int
    max_tiles: int
    max_length: int
    seed: int

    def as_json(self) -> dict[str, Any]:
        """The same for the run's folder."""
        return json.loads(json.dumps(asdict(self), default=str)) | {'stage': 'consistency'}


class Places(Dataset):
    """What stands at each place of a run: a sample and which of its tiles are compressed.

    Args:
        samples: of the data.
        seed: of the draws.
        share: of tiles that are compressed; None draws one for each place (paper, Eq. 1).
        first: the place that a phase begins with; each goes on through the data where the one before it has ended.
    """

    def __init__(self, samples: Samples, seed: int, share: float | None = None, first: int = 0) -> None:
        self._samples, self._seed, self._share, self._first = samples, seed, share, first

    def __getitem__(self, index: int) -> tuple[Sample, np.ndarray]:
        """The sample, and bool for each of its tiles, at a place of the phase."""
        place = self._first + index
        sample = self._samples[draw_sample(self._seed, place, len(self._samples))]
        share = draw_share(self._seed, place) if self._share is None else self._share
        return sample, draw_tiles(self._seed, place, len(sample.tiles), share)


class ConsistencyTraining:
    """A run of consistency training.

    Args:
        settings, pace: what and how.
        output: the folder of the run, and of the checkpoint that it makes.
        processes: of the run.
        console: for progress and messages.

    Raises:
        TrainingError: data or checkpoints do not fit, or the folder belongs to another run.
    """

    def __init__(self, settings: Settings, pace: Pace, output: Path, processes: Processes, console: Console) -> None:
        self._settings, self._pace, self._output = settings, pace, output
        self._processes, self._console = processes, console
        self._config = read_config(settings.model)
        reader = reader_of(settings, self._config, processes, console)
        self._samples, _ = reader.read(settings.data)
        self._held_out = reader.read(settings.held_out)[0] if settings.held_out else None
        self._folder = folder_of(settings, output, processes)
        self._pair = self._make_pair()

    def run(self) -> None:
        """Train both phases, from where the folder says, and write the checkpoint and the report."""
        log = self._folder.log()
        report: dict[str, Any] = {}
        if self._held_out is not None:
            report[BEFORE] = self._judged(BEFORE)
        for name in self._left():
            self._phase(name, log)
        log.close()
        round_as_stored(self._pair.policy.named_parameters(), Tensors(self._settings.model))
        first = self._processes.first
        publish_model(self._output, self._config, self._settings.model, self._pair.policy, self._kept, first)
        self._processes.wait()
        if self._held_out is not None:
            report[AFTER] = self._judged(AFTER)
        if first:
            write_json(self._output / REPORT, report)
        self._processes.wait()

    def _left(self) -> list[str]:
        """The phases that are not over; each keeps its state until the next one has one."""
        schedules = {WARM_UP: self._settings.warm_up, MAIN: self._settings.main}
        phases = [name for name, schedule in schedules.items() if schedule.steps]
        return phases[next((i for i, name in enumerate(phases) if self._folder.newest(name) is not None), 0) :]

    def _phase(self, name: str, log: Log) -> None:
        self._choose(name)
        warm_up, schedule, seed = self._settings.warm_up, self._settings.main, self._settings.seed
        places = Places(self._samples, seed, first=warm_up.steps * warm_up.batch)
        if name == WARM_UP:
            schedule, places = warm_up, Places(self._samples, seed, WARM_UP_SHARE)
        loop = Loop(name, self._pair.policy, places, self._losses, self._kept, schedule, self._pace, self._processes)
        loop.run(self._folder, log, self._console)

    def _losses(self, items: Sequence[tuple[Sample, np.ndarray]]) -> torch.Tensor:
        """Eq. 1 for each sample."""
        samples, compressed = zip(*items, strict=True)
        target = self._pair.target(lay_out(samples, [np.zeros_like(tiles) for tiles in compressed]))
        batch = lay_out(samples, compressed).to(self._processes.device)
        return sample_means(self._pair.policy(batch, target), batch.responses)

    def _make_pair(self) -> Pair:
        settings, device, compute = self._settings, self._processes.device, self._processes.compute
        policy = outline(self._config)
        if settings.lora_rank:
            add_adapters(policy, settings.lora_rank, 2 * settings.lora_rank)
        choose(policy, ['mlp2', *(() if settings.lora_rank else settings.parts)])
        set_types(policy, compute)
        recompute(policy)
        self._processes.share(policy)
        fill(policy, [settings.model], device)
        if settings.lora_rank:
            reset_adapters(policy, settings.seed)
        sample = self._samples[0]
        self._processes.settle(policy, lay_out([sample], [np.zeros(len(sample.tiles), bool)]))
        if settings.lora_rank:
            return Pair(policy, None, self._processes)
        reference = outline(self._config)
        set_types(reference, compute)
        self._processes.share(reference)
        # A plain checkpoint has no mlp2. The reference never compresses, so the model's does for it.
        fill(reference, [settings.reference, settings.model], device)
        return Pair(policy, reference, self._processes)

    def _choose(self, phase: str) -> None:
        """Have trained what a phase trains."""
        choose(self._pair.policy, ['mlp2'] if phase == WARM_UP or self._settings.lora_rank else self._settings.parts)
        for name, parameter in self._pair.policy.named_parameters():
            if is_adapter(name):
                parameter.requires_grad_(phase == MAIN)

    def _kept(self, name: str) -> bool:
        trained = ('mlp2', *(() if self._settings.lora_rank else self._settings.parts))
        return is_adapter(name) or name.startswith(tuple(prefix for part in trained for prefix in PARTS[part]))

    def _judged(self, when: str) -> dict[str, float]:
        """The mean divergence on held-out samples by the share of compressed tiles."""
        file = self._output / f'divergence-{when}.json'
        if not file.exists():
            values = self._divergence(merged=when == AFTER and self._settings.lora_rank > 0)
            if self._processes.first:
                write_json(file, values)
            self._processes.wait()
        measured: dict[str, float] = json.loads(file.read_text(encoding='utf-8'))
        return measured

    def _divergence(self, merged: bool) -> dict[str, float]:
        """The divergence of the policy; or, ``merged``, of what has been written of it, which it is from then on."""
        assert self._held_out is not None
        policy, processes, device = self._pair.policy, self._processes, self._processes.device
        targets = targets_of(self._pair, self._held_out, processes)
        last = self._held_out, SHARES, self._settings.seed, processes
        if not merged:
            return divergence(policy, targets, *last)
        # The reference is the model before adapters: it has to have said everything before it is overwritten.
        said = [each.hidden.cpu() for each in targets]
        processes.release(policy)
        head = whole(policy.language_model.lm_head.weight.detach())
        load(policy.named_parameters(), Tensors(self._output))
        with without_adapters(policy):
            return divergence(policy, (Target(hidden.to(device), head) for hidden in said), *last)
