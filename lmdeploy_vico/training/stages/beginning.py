"""What both stages of training begin with: a reader of their data, and the folder of the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.training.data.check import Reader
from lmdeploy_vico.training.data.records import deciding_files
from lmdeploy_vico.training.data.tokens import load_tokenizer
from lmdeploy_vico.training.loop.folder import RunFolder
from lmdeploy_vico.training.loop.processes import Processes


class Settings(Protocol):
    """What the settings of both stages have; see there."""

    @property
    def model(self) -> Path: ...  # noqa: D102
    @property
    def reference(self) -> Path: ...  # noqa: D102
    @property
    def data(self) -> Path: ...  # noqa: D102
    @property
    def held_out(self) -> Path | None: ...  # noqa: D102
    @property
    def max_tiles(self) -> int: ...  # noqa: D102
    @property
    def max_length(self) -> int: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102

    def as_json(self) -> dict[str, Any]: ...  # noqa: D102


def reader_of(settings: Settings, config: Mapping[str, Any], processes: Processes, console: Console) -> Reader:
    """Make the reader of a run's data, for its model, whose ``config.json`` is ``config``."""
    return Reader(
        load_tokenizer(settings.model),
        VicoConfig.from_dict(config),
        settings.max_tiles,
        settings.max_length,
        settings.seed,
        processes,
        console,
    )


def folder_of(settings: Settings, output: Path, processes: Processes) -> RunFolder:
    """Take the folder of a run; raises TrainingError where it belongs to another."""
    files = deciding_files([settings.model, settings.reference], [settings.data, settings.held_out])
    return RunFolder(output, settings.as_json(), processes, files)
