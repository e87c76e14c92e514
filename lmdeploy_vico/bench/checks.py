"""Checks that a server does what the measurement needs."""

from lmdeploy_vico.bench import BenchError
from lmdeploy_vico.bench.client import Outcome
from lmdeploy_vico.bench.workload.requests import LLM, Cell, visual_tokens


def check_answer(cell: Cell, outcome: Outcome, tiles: int, compressed: int | None) -> None:
    """Raise :class:`BenchError` if a request of the warm-up was not answered as the measurement needs it."""
    if outcome.status == 400 and cell.mode == LLM:
        raise BenchError(
            'The server refuses synthetic images: start it with LMDEPLOY_VICO_SYNTHETIC_IMAGES=1 in its environment. '
            f'It said: {outcome.error}'
        )
    if outcome.error:
        raise BenchError(f'The server does not answer requests ({cell}): {outcome.error}')
    if not cell.is_ours:
        return
    if outcome.image_tokens is None:
        raise BenchError(
            'The model is not served as a ViCO model, as its usage counts no image_tokens: serve an InternVL3.5-Flash '
            'checkpoint where lmdeploy-vico is installed and LMDEPLOY_VICO is not 0.'
        )
    if compressed is not None and outcome.image_tokens != visual_tokens(tiles, compressed):
        raise BenchError(
            f'{tiles} tiles with {compressed} compressed are {visual_tokens(tiles, compressed)} visual tokens, but the '
            f'server counts {outcome.image_tokens}: compression does not do what it is asked ({cell}).'
        )
