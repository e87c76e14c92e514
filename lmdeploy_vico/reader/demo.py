"""What the demonstration shows: pictures with a question each, and what a server makes of them at each compression."""

import base64
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmdeploy_vico.config import TOKENS_COMPRESSED, TOKENS_FULL
from lmdeploy_vico.reader import ReaderError
from lmdeploy_vico.reader.documents.codes import Split
from lmdeploy_vico.reader.documents.page import make_page

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SEED = 900  # of the documents: the codes on them are withheld from training
# What stands on the tiles of each picture, and the kind that is asked about.
DOCUMENTS = {
    'list, photographs': (('photo', 'fine', 'photo'), 'fine'),
    'three lists': (('fine', 'fine', 'fine'), 'fine'),
    'large type': (('medium', 'photo', 'medium', 'shape'), 'medium'),
    'shape, photographs': (('photo', 'shape', 'photo', 'photo', 'photo'), 'shape'),
    'photograph, lists': (('fine', 'photo', 'fine', 'medium', 'shape'), 'photo'),
    'mixed page': (('shape', 'fine', 'photo', 'medium', 'photo', 'fine'), 'fine'),
    'one tile': (('fine',), 'fine'),
}
# Shipped inside scikit-image's wheel: photographs and a scanned page.
PHOTOGRAPHS = ('coffee', 'chelsea', 'rocket', 'text', 'page', 'astronaut')
PROMPT = 'What is in this picture?'
COMPRESSIONS = ('none', 'auto', 'all')
MAX_TOKENS = 16
SAVED = TOKENS_FULL - TOKENS_COMPRESSED  # tokens that compressing one tile saves


@dataclass(frozen=True)
class Exhibit:
    """A picture with a question.

    Attributes:
        name: what it is.
        pixels: uint8 ``[height, width, 3]``.
        question: about it.
        answer: the right one; None where it is not known.
    """

    name: str
    pixels: NDArray[np.uint8]
    question: str
    answer: str | None


@dataclass(frozen=True)
class Reply:
    """What the server said of one request.

    Attributes:
        prompt_tokens: as it counts them.
        seconds: to the first token; None if it sent none.
        answer: without space around it.
    """

    prompt_tokens: int
    seconds: float | None
    answer: str


Replies = Sequence[Mapping[str, Reply]]  # of each exhibit, by compression


def documents() -> list[Exhibit]:
    """Documents for the reader; raises ImportError without matplotlib or scikit-image."""
    rng = np.random.default_rng(SEED)
    exhibits = []
    for name, (kinds, wanted) in DOCUMENTS.items():
        page = make_page(rng, kinds, Split.TEST)
        while not (asked := [question for question in page.questions if question.kind == wanted]):
            page = make_page(rng, kinds, Split.TEST)
        exhibits.append(Exhibit(name, page.pixels, asked[0].text, asked[0].answer))
    return exhibits


def photographs() -> list[Exhibit]:
    """Photographs for any model; raises ImportError without scikit-image."""
    from skimage import data

    return [Exhibit(name, _colour(getattr(data, name)()), PROMPT, None) for name in PHOTOGRAPHS]


def _colour(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, 2)


def ask_about(url: str, exhibits: Sequence[Exhibit], console: 'Console') -> Replies:
    """Ask a server about everything at each compression.

    Raises:
        ImportError: openai is missing.
        ReaderError: a request failed.
    """
    from openai import APIError, OpenAI
    from rich.progress import track

    client = OpenAI(base_url=f'{url}/v1', api_key='none')
    try:
        model = client.models.list().data[0].id
        _ask(client, model, exhibits[0], 'auto')  # the first request of all warms the server up
        return [
            {compression: _ask(client, model, exhibit, compression) for compression in COMPRESSIONS}
            for exhibit in track(exhibits, description='Asking', console=console, transient=True)
        ]
    except APIError as error:
        raise ReaderError(f'The server did not answer: {error.message}') from error


def _ask(client: Any, model: str, exhibit: Exhibit, compression: str) -> Reply:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(exhibit.pixels).save(buffer, 'PNG')
    url = f'data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'
    content = [{'type': 'image_url', 'image_url': {'url': url}}, {'type': 'text', 'text': exhibit.question}]
    began, answer, prompt_tokens = time.perf_counter(), '', 0
    first: float | None = None
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
            first = time.perf_counter() - began if first is None else first
            answer += chunk.choices[0].delta.content
    return Reply(prompt_tokens, first, answer.strip())


def tiles_of(replies: Mapping[str, Reply], compression: str) -> tuple[int, int]:
    """How many tiles a prompt has, and how many of them have 64 tokens at a compression."""
    none, everything = replies['none'].prompt_tokens, replies['all'].prompt_tokens
    return (none - everything) // SAVED, (none - replies[compression].prompt_tokens) // SAVED


def counts_table(exhibits: Sequence[Exhibit], replies: Replies) -> 'Table':
    """Tiles, tokens and times of each picture with the router."""
    table = _table('tiles: thumbnail included; prompt: usage.prompt_tokens; TTFT: time to first token')
    table.add_column('picture', no_wrap=True)
    for column in ('size', 'tiles', 'at 64', 'at 256', 'prompt', 'w/o ViCO', 'saved', 'TTFT'):
        table.add_column(column, justify='right', no_wrap=True)
    for exhibit, said in zip(exhibits, replies, strict=True):
        tiles, compressed = tiles_of(said, 'auto')
        auto, none = said['auto'], said['none']
        height, width, _ = exhibit.pixels.shape
        counts = (tiles, compressed, tiles - compressed, auto.prompt_tokens, none.prompt_tokens)
        saved = f'{1 - auto.prompt_tokens / none.prompt_tokens:.0%}'
        waited = '-' if auto.seconds is None else f'{auto.seconds * 1000:.0f} ms'
        table.add_row(exhibit.name, f'{width}x{height}', *map(str, counts), saved, waited)
    return table


def answers_table(exhibits: Sequence[Exhibit], replies: Replies) -> 'Table':
    """The right answer of each question beside those at each compression."""
    from rich.markup import escape

    table = _table('none: 256 tokens a tile; auto: the router decides; all: 64 tokens a tile')
    for column in ('picture', 'question', 'right', *COMPRESSIONS):
        table.add_column(column, no_wrap=column != 'question')
    for exhibit, said in zip(exhibits, replies, strict=True):
        given = [said[compression].answer for compression in COMPRESSIONS]
        marked = [escape(answer) if answer == exhibit.answer else f'[red]{escape(answer)} ✗[/red]' for answer in given]
        table.add_row(exhibit.name, exhibit.question, exhibit.answer, *marked)
    return table


def summary(exhibits: Sequence[Exhibit], replies: Replies) -> str:
    """One sentence on what the router has compressed, and what that has cost."""
    counts = [tiles_of(said, 'auto') for said in replies]
    tiles, compressed = (sum(each) for each in zip(*counts, strict=True))
    tokens = {name: sum(said[name].prompt_tokens for said in replies) for name in COMPRESSIONS}
    right = {
        name: sum(said[name].answer == exhibit.answer for exhibit, said in zip(exhibits, replies, strict=True))
        for name in COMPRESSIONS
    }
    return (
        f'The router gave {compressed} of {tiles} tiles 64 tokens instead of 256. That is '
        f'{1 - tokens["auto"] / tokens["none"]:.0%} fewer prompt tokens, and {right["auto"]} of {len(exhibits)} '
        f'answers are right: without compression {right["none"]} are, with all tiles at 64 tokens {right["all"]}.'
    )


def _table(caption: str) -> 'Table':
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, caption=caption)
