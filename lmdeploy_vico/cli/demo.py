"""``lmdeploy-vico demo``: serve a checkpoint with the unmodified LMDeploy command and show what its router does."""

import argparse
import base64
import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy_vico.cli.errors import CommandError
from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.launch import ApiServer, ServerError

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console
    from rich.table import Table

    from lmdeploy_vico.cli import Commands

# Shipped inside scikit-image's wheel: photographs and a scanned page, nothing is downloaded.
PICTURES = ('coffee', 'chelsea', 'rocket', 'text', 'page', 'astronaut')
PROMPT = 'What is in this picture?'
MAX_TOKENS = 16
REAL_CHECKPOINT = 'OpenGVLab/InternVL3_5-8B-Flash'


@dataclass(frozen=True)
class Reply:
    """What the server said of one request: prompt tokens, seconds to the first token, the answer."""

    prompt_tokens: int
    seconds: float
    answer: str


def add_parser(commands: 'Commands') -> None:
    """Add the command."""
    demo = commands.add_parser(
        'demo',
        help='serve a checkpoint, send it photographs, show the tokens saved',
        description='Start `lmdeploy serve api_server`, send it photographs, print the tokens that ViCO saves.',
    )
    demo.add_argument(
        '--checkpoint', metavar='DIR', type=Path, help='what to serve (default: a tiny random checkpoint, made now)'
    )
    demo.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve the checkpoint, send it pictures, print a table, stop the server.

    Raises:
        CommandError: no checkpoint is there, a package is missing, or the server did not start.
    """
    from rich.console import Console

    checkpoint = arguments.checkpoint
    if checkpoint and not (checkpoint / 'config.json').is_file():
        raise CommandError(f'{checkpoint} is not a checkpoint directory: it holds no config.json')
    try:
        _show(checkpoint, Console())
    except ServerError as error:
        raise CommandError(str(error)) from error
    return 0


def _show(checkpoint: Path | None, console: 'Console') -> None:
    pictures = _load_pictures()
    with tempfile.TemporaryDirectory(prefix='vico-demo-') as scratch:
        model = checkpoint or _make_tiny(Path(scratch) / 'tiny', console)
        server = ApiServer(model, log=Path(scratch) / 'server.log')
        console.print('$ ' + ' '.join(server.command), style='bold', highlight=False, soft_wrap=True)
        console.print('Waiting until it is ready ...')
        with server:
            for line in server.log_text().splitlines():
                if 'lmdeploy_vico' in line:
                    console.print(line, style='dim', highlight=False, soft_wrap=True)
            replies = _ask_about(server.url, pictures, console)
    console.print(_table(pictures, replies))
    if checkpoint is None:
        console.print('Tiny random weights: the words of the answers mean nothing; the counts are real.')
    else:
        for name, (auto, _, _) in replies.items():
            console.print(f'[bold]{name}[/bold]: {auto.answer}')
    console.print(f'Server stopped. A real checkpoint: lmdeploy serve api_server {REAL_CHECKPOINT}', soft_wrap=True)


def _load_pictures() -> 'dict[str, Image]':
    from PIL import Image

    try:
        from skimage import data
    except ImportError as error:
        raise CommandError(
            'The demo needs its pictures and client; in a checkout of the plugin: pip install ".[demo]"'
        ) from error
    return {name: Image.fromarray(getattr(data, name)()) for name in PICTURES}


def _make_tiny(path: Path, console: 'Console') -> Path:
    from lmdeploy_vico.checkpoints.random import make_tiny_checkpoint

    with console.status('Making a tiny ViCO checkpoint: real layout, random weights'):
        make_tiny_checkpoint(path)
    return path


def _ask_about(url: str, pictures: 'dict[str, Image]', console: 'Console') -> dict[str, tuple[Reply, Reply, Reply]]:
    """Each picture's replies with compression "auto", "none" and "all"."""
    from openai import OpenAI
    from rich.progress import track

    client = OpenAI(base_url=f'{url}/v1', api_key='none')
    model = client.models.list().data[0].id
    _ask(client, model, next(iter(pictures.values())), 'auto')  # the first request of all warms the server up
    replies = {}
    for name in track(pictures, description='Sending pictures', console=console, transient=True):
        auto, none, everything = (_ask(client, model, pictures[name], value) for value in ('auto', 'none', 'all'))
        replies[name] = (auto, none, everything)
    return replies


def _ask(client: Any, model: str, image: 'Image', compression: str) -> Reply:
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    url = f'data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'
    content = [{'type': 'text', 'text': PROMPT}, {'type': 'image_url', 'image_url': {'url': url}}]
    began, first, answer, prompt_tokens = time.perf_counter(), 0.0, '', 0
    for chunk in client.chat.completions.create(
        model=model,
        messages=[{'role': 'user', 'content': content}],
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
        stream_options={'include_usage': True},
        extra_body={'mm_processor_kwargs': {'image': {'compression': compression}}},
    ):
        if chunk.usage:
            prompt_tokens = chunk.usage.prompt_tokens
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter() - began
            answer += chunk.choices[0].delta.content
    return Reply(prompt_tokens, first, answer)


def _table(pictures: 'dict[str, Image]', replies: dict[str, tuple[Reply, Reply, Reply]]) -> 'Table':
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        caption='tiles: thumbnail included; prompt: usage.prompt_tokens; TTFT: time to first token',
    )
    table.add_column('picture', no_wrap=True)
    for column in ('size', 'tiles', 'at 64', 'at 256', 'prompt', 'w/o ViCO', 'saved', 'TTFT'):
        table.add_column(column, justify='right', no_wrap=True)
    for name, (auto, none, everything) in replies.items():
        saving = TOKENS_FULL - TOKENS_COMPRESSED  # tokens that compressing one tile saves
        tiles = (none.prompt_tokens - everything.prompt_tokens) // saving
        compressed = (none.prompt_tokens - auto.prompt_tokens) // saving
        image = pictures[name]
        table.add_row(
            name,
            f'{image.width}x{image.height}',
            *(str(n) for n in (tiles, compressed, tiles - compressed, auto.prompt_tokens, none.prompt_tokens)),
            f'{1 - auto.prompt_tokens / none.prompt_tokens:.0%}',
            f'{auto.seconds * 1000:.0f} ms',
        )
    return table
