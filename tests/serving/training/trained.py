"""A checkpoint that has been through all stages of training, and what its model says."""

import dataclasses
from pathlib import Path

import torch
from training.made import Made, gpt, human
from training.runs import made

from lmdeploy_vico.config import VicoConfig
from lmdeploy_vico.training.data.batches import lay_out
from lmdeploy_vico.training.data.tokens import load_tokenizer
from lmdeploy_vico.training.stages.initialise import initialise
from lmdeploy_vico.vision.routing import route

QUESTION = 'What is it?'
SAMPLES = [
    {'image': images, 'conversations': [human('<image>\n' * len(images) + QUESTION), gpt('A page.')]}
    for images in (['cup.png'], ['wide.png'], ['cup.png', 'wide.png'])
] + [{'conversations': [human(QUESTION), gpt('Nothing.')]}]


ENDS = ('<|im_end|>', '<|endoftext|>')  # what an engine that is told to ignore them never says


def train(plain: Path, data: Path, folder: Path, count: int = 2) -> Path:
    """Init and ``count`` steps of either stage, with thresholds that compress about half of the tiles."""
    initialise(plain, folder / 'start')
    run = ['--reference', plain, '--data', data, '--batch', 2, '--rate', '1e-3']
    steps = ['--steps', count, '--warm-up-steps', 1]
    made('consistency', '--model', folder / 'start', '--output', folder / 'vico', *run, *steps).run()
    judged = ['--held-out', data, '--compress', 0.5]
    made('router', '--model', folder / 'vico', '--output', folder / 'flash', *run, '--steps', count, *judged).run()
    return folder / 'flash'


class Trained(Made):
    """The trained model; ``shares`` are those of each sample's tiles that it compressed."""

    def __init__(self, path: Path, data: Path) -> None:
        super().__init__(path, data)
        self._model = self.model()
        self._ends = load_tokenizer(path).convert_tokens_to_ids(list(ENDS))
        self.shares: list[float] = []

    @torch.no_grad()
    def greedy(self, index: int, answer) -> tuple[int, list[int]]:
        """Tokens of a sample's prompt, and what the model would have chosen in place of an answer's tokens."""
        sample = self.samples[index]
        spans = [dataclasses.replace(span, ids=list(answer)) if span.response else span for span in sample.spans]
        batch = lay_out([dataclasses.replace(sample, spans=spans)], [self._routed(sample)])
        logits = self._model(batch) @ self._model.language_model.lm_head.weight.T
        logits[:, self._ends] = -torch.inf
        return batch.ids.shape[1] - len(answer), logits.argmax(-1).tolist()

    def _routed(self, sample):
        """Which tiles the checkpoint's own router compresses; each is scored alone, as in the server."""
        if not len(sample.tiles):
            return torch.zeros(0, dtype=torch.bool).numpy()
        scores = torch.cat([self._model.encode(tile[None])[1] for tile in torch.from_numpy(sample.tiles)])
        config = VicoConfig.from_dict(self.config)
        compressed = route(scores, 'auto', config.relative_threshold, config.absolute_threshold)
        self.shares.append(compressed.float().mean().item())
        return compressed.numpy()
