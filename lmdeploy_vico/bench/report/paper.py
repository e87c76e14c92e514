"""The speed-ups that the paper reports, for comparison."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmdeploy_vico.bench.workload.requests import LLM, Cell

TILES = 10
# ViCO, Table 4: throughput of the language model at 25, 50 and 75 % compression over none, by model and text tokens.
SPEEDUPS: dict[str, dict[int, tuple[float, float, float]]] = {
    '8B': {64: (1.29, 1.97, 3.76), 512: (1.30, 1.76, 2.77)},
    '30B': {64: (1.30, 1.99, 3.77), 512: (1.29, 1.80, 2.72)},
    '38B': {64: (1.33, 1.99, 3.80), 512: (1.30, 1.77, 2.76)},
    '241B': {64: (1.34, 2.00, 3.76), 512: (1.32, 1.81, 2.87)},
}
SHARES = (0.25, 0.5, 0.75)
# (hidden size, layers) of the models' language models: Qwen3-8B, -30B-A3B, -32B and -235B-A22B.
SHAPES = {(4096, 36): '8B', (2048, 48): '30B', (5120, 64): '38B', (4096, 94): '241B'}
NAME = re.compile(r'(?<![\dA-Za-z])(8B|30B|38B|241B)(?![\dA-Za-z])', re.IGNORECASE)


def paper_model(model: str) -> str | None:
    """Which of the paper's models this is: by its config where it is a directory here, else by its name."""
    try:
        config: Mapping[str, Any] = json.loads((Path(model) / 'config.json').read_text())
        language_model = config['llm_config']
        return SHAPES.get((language_model['hidden_size'], language_model['num_hidden_layers']))
    except (OSError, ValueError, KeyError, TypeError):
        found = NAME.search(Path(model).name)
        return found[1].upper() if found else None


def paper_speedup(model: str | None, tiles: int, cell: Cell) -> float | None:
    """The paper's number for a cell; None where it has none, image mode included: it measured no ViT."""
    if model is None or tiles != TILES or cell.mode != LLM or not cell.is_ours:
        return None
    row = SPEEDUPS[model].get(cell.text_tokens)
    if row is None or cell.compression not in SHARES:
        return None
    return row[SHARES.index(float(cell.compression))]
