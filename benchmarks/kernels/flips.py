"""How often routing in bfloat16 differs from routing in float64: the absorbed router, and LMDeploy's own modules.

Both get the same bfloat16 weights and patch tokens, and so does the float64 router, by which they are judged. Prompts
of 13 tiles are routed by the checkpoint's rule (score above the prompt's median). Inputs: random; with a mean 30 times
their deviation; tiles that differ by 1 %; channels 20 times the others. The weights are random.

    python -m benchmarks flips --width 1024 --prompts 8
"""

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lmdeploy.pytorch.models.internvl import CrossAttentionPooling
from lmdeploy.pytorch.models.internvl import Gating as LMDeployGating
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from lmdeploy_vico.kernels.implementation import implementation
from lmdeploy_vico.vision.model.router import AttentionPooling, Gating

TILES, PATCHES = 13, 1024
KINDS = ('random', 'large mean', 'near ties', 'outliers')


def plain_router(width: int, dtype: torch.dtype, device: torch.device) -> nn.Sequential:
    """LMDeploy's modules, with weights that spread the scores."""
    with device:
        router = nn.Sequential(CrossAttentionPooling(width), LMDeployGating(width))
    for name, value in router.named_parameters():
        if value.dim() > 1:
            nn.init.normal_(value, std=1.5 / value.shape[-1] ** 0.5)
        else:
            nn.init.normal_(value, mean=1.0 if 'norm' in name and name.endswith('weight') else 0.0, std=0.2)
    return router.to(dtype)


def absorbed_router(plain: nn.Sequential, width: int) -> nn.Sequential:
    with torch.device('meta'):
        router = nn.Sequential(AttentionPooling(width), Gating(width))
    router.load_state_dict(plain.state_dict(), strict=False, assign=True)
    for module in router.children():
        assert isinstance(module, AttentionPooling | Gating)
        module.freeze()
    return router


def prompt(kind: str, width: int, device: torch.device) -> torch.Tensor:
    x = torch.randn(TILES, PATCHES, width, device=device)
    if kind == 'large mean':
        x += 30 * torch.randn(width, device=device)
    elif kind == 'near ties':
        x = x[:1] + 1e-2 * x
    elif kind == 'outliers':
        x[..., :: width // 4] *= 20
    return x.bfloat16()


@torch.inference_mode()
def measure(width: int, prompts: int, device: torch.device) -> list[dict[str, Any]]:
    torch.manual_seed(5)
    plain = plain_router(width, torch.bfloat16, device)
    exact = plain_router(width, torch.float64, device)
    exact.load_state_dict(plain.state_dict())
    absorbed = absorbed_router(plain, width)
    rows = []
    for kind in KINDS:
        row = {'tokens': kind, 'tiles': prompts * TILES}
        results = {name: {'flips': 0, 'largest_score_error': 0.0} for name in ('absorbed', 'plain')}
        spread = 0.0
        for _ in track(range(prompts), description=kind):
            x = prompt(kind, width, device)
            expected = exact(list(x.double()))[:, 0]
            spread += expected.std().item() / prompts
            scores = {'absorbed': absorbed(x)[:, 0], 'plain': plain(list(x))[:, 0]}
            for name, given in scores.items():
                result = results[name]
                result['flips'] += int((decide(given) != decide(expected)).sum())
                result['largest_score_error'] = max(
                    result['largest_score_error'], (given.double() - expected).abs().max().item()
                )
        rows.append({**row, 'score_deviation': spread, **results})
    return rows


def decide(scores: torch.Tensor) -> torch.Tensor:
    return scores > torch.quantile(scores.float() if scores.dtype == torch.bfloat16 else scores, 0.5)


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(
        'patch tokens', 'tiles', 'score deviation', 'absorbed: flips', 'worst score', 'plain: flips', 'worst score'
    )
    table.title = title
    for row in rows:
        cells = [row['tokens'], str(row['tiles']), f'{row["score_deviation"]:.1e}']
        for name in ('absorbed', 'plain'):
            cells += [str(row[name]['flips']), f'{row[name]["largest_score_error"]:.1e}']
        table.add_row(*cells)
    Console(width=120).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--width',
        type=int,
        default=1024,
        help='width of the ViT; the published models have 1024 and 3200 (default: %(default)s)',
    )
    parser.add_argument(
        '--prompts', type=int, default=8, help='prompts of each kind of patch tokens (default: %(default)s)'
    )
    parser.add_argument('--output', type=Path, help='write the results, as JSON, to this file')
    arguments = parser.parse_args(argv)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    rows = measure(arguments.width, arguments.prompts, device)
    name = torch.cuda.get_device_name() if device.type == 'cuda' else platform.processor() or 'CPU'
    show(rows, f'Routing in bfloat16 against float64, D = {arguments.width}, {implementation(device)} on {name}')
    if arguments.output:
        facts = {'device': name, 'torch': torch.__version__, 'implementation': implementation(device)}
        content = {**facts, 'width': arguments.width, 'rows': rows}
        arguments.output.write_text(json.dumps(content, indent=1) + '\n')
    return 0
