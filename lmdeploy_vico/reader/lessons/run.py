"""All lessons, in one process or as ``torchrun`` starts several: from nothing to a model that reads.

    torchrun --standalone --nproc-per-node 2 -m lmdeploy_vico.reader.lessons.run DIR

writes two checkpoints: ``DIR/plain``, a plain InternVL one, and ``DIR/vanilla``, a ViCO one made of it whose ``mlp2``
has been taught alone and whose router is untrained. ``DIR/*.pt`` keep what each lesson has come to, so that a run which
was interrupted goes on with the next one.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from lmdeploy_vico.checkpoints.names import COMPRESSED_PROJECTOR, FLASH
from lmdeploy_vico.checkpoints.random.tiny import save_weights
from lmdeploy_vico.kernels.implementation import use
from lmdeploy_vico.reader.design import DTYPE, vico_config, write_all_but_weights
from lmdeploy_vico.reader.documents.codes import Split
from lmdeploy_vico.reader.documents.page import KINDS
from lmdeploy_vico.reader.initial import begin_language, begin_vision
from lmdeploy_vico.reader.lessons import answering, seeing
from lmdeploy_vico.reader.lessons.answering import Answering
from lmdeploy_vico.reader.lessons.material import COMPRESSED, FULL, Material
from lmdeploy_vico.reader.lessons.talk import Talks
from lmdeploy_vico.training.data.tokens import load_tokenizer
from lmdeploy_vico.training.loop.processes import Processes
from lmdeploy_vico.training.model.vico_model import VicoModel
from lmdeploy_vico.training.model.writer import publish_model
from lmdeploy_vico.training.stages.initialise import initialise, read_config

PLAIN, VANILLA = 'plain', 'vanilla'
JUDGED, JUDGED_SEED = 20, 99  # tiles of each kind; lower seeds than those of training
TOKENS = {FULL: 256, COMPRESSED: 64}
STRIDE = 1000  # from one seed of draws to the next; lower ones than the first are not for training


@dataclass(frozen=True)
class Steps:
    """How long the lessons are."""

    see: seeing.Plan
    answer: answering.Plan
    compress: int


STEPS = Steps(seeing.Plan(1600, 1200), answering.Plan(1100, 1500, 500), 1000)


class School:
    """Teaches one model, together with the other processes.

    Args:
        path: the folder.
        steps: how long.
        seed: of weights and draws; each process sees other documents.
        processes: of the run.
        console: for progress.
    """

    def __init__(self, path: Path, steps: Steps, seed: int, processes: Processes, console: Console) -> None:
        self._path, self._steps, self._seed = path, steps, seed
        self._processes, self._console = processes, console
        if processes.first:
            (path / PLAIN).mkdir(parents=True, exist_ok=True)
            write_all_but_weights(path / PLAIN)
        processes.wait()
        self._talks = Talks(load_tokenizer(path / PLAIN))
        use('torch')  # the Triton kernels have no gradients
        torch.manual_seed(seed)  # the weights of all processes begin alike
        self._model = VicoModel(vico_config(read_config(path / PLAIN))).float()  # small steps are lost in bfloat16
        begin_vision(self._model.vision_model)
        begin_language(self._model.language_model, self._model.mlp1, self._model.mlp2)

    def teach(self) -> None:
        """All lessons that are not kept; then write both checkpoints."""
        model = self._model
        self._lesson('vit', model.vision_model, self._see)
        model.requires_grad_(False)
        self._lesson('answering', nn.ModuleList([model.mlp1, model.language_model]), self._answer)
        model.requires_grad_(False)
        self._lesson('compressing', model.mlp2, self._compress)
        if self._processes.first:
            self._write()
        self._processes.wait()

    def _lesson(self, name: str, learner: nn.Module, teach: Callable[[], None]) -> None:
        """Teach what has not been taught yet."""
        file = self._path / f'{name}.pt'
        if file.exists():
            learner.load_state_dict(torch.load(file, weights_only=True))
            return
        torch.manual_seed(self._seed + 1)  # what is thrown away after a lesson begins alike in all processes, too
        teach()
        if self._processes.first:
            draft = file.with_suffix('.part')  # a file that is there is whole
            torch.save(learner.state_dict(), draft)
            draft.replace(file)
        self._processes.wait()

    def _see(self) -> None:
        seeing.teach_seeing(seeing.Seeing(self._model.vision_model), self._steps.see, self._draws(0), self._console)

    def _answer(self) -> None:
        self._answering(self._model.mlp1, 1, FULL).teach(self._steps.answer)
        self._judge(self._model.mlp1, FULL)

    def _compress(self) -> None:
        self._answering(self._model.mlp2, 2, COMPRESSED).teach_projector(self._steps.compress)
        self._judge(self._model.mlp2, COMPRESSED)

    def _judge(self, projector: nn.Sequential, ratio: int) -> None:
        """Say how many questions about tiles with withheld codes are answered rightly."""
        if self._processes.first:
            material = Material(self._model, JUDGED_SEED, ratio, Split.TEST)
            seen = [tile for _ in range(JUDGED) for tile in material.tiles(KINDS)]
            for kind, (right, count) in answering.accuracy(self._model, projector, self._talks, seen).items():
                self._console.print(f'{TOKENS[ratio]} tokens a tile, {kind}: {right} of {count} right', highlight=False)
        self._processes.wait()

    def _answering(self, projector: nn.Sequential, lesson: int, ratio: int) -> Answering:
        material = Material(self._model, self._draws(lesson), ratio)
        return Answering(self._model, projector, self._talks, material, self._console)

    def _draws(self, lesson: int) -> int:
        """The seed of what this process draws in a lesson."""
        return STRIDE * (1 + 3 * self._seed + lesson) + self._processes.rank

    def _write(self) -> None:
        plain = self._path / PLAIN
        weights = {name: value for name, value in self._model.state_dict().items() if not name.startswith(FLASH)}
        save_weights(plain, weights, getattr(torch, DTYPE))
        with tempfile.TemporaryDirectory(dir=self._path) as scratch:
            start = Path(scratch, 'start')
            initialise(plain, start, self._seed)
            vanilla = self._path / VANILLA
            vanilla.mkdir(exist_ok=True)
            publish_model(vanilla, read_config(start), start, self._model, _is_compressed_projectors, first=True)


def _is_compressed_projectors(name: str) -> bool:
    return name.startswith(COMPRESSED_PROJECTOR)


def main() -> None:
    """Read the command line and teach."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('directory', metavar='DIR', type=Path, help='the folder; it is made if need be')
    parser.add_argument('--seed', type=int, default=0, help='of weights and draws (default: 0)')
    arguments = parser.parse_args()
    processes = Processes()
    try:
        School(arguments.directory, STEPS, arguments.seed, processes, Console()).teach()
    finally:
        processes.close()


if __name__ == '__main__':
    main()
