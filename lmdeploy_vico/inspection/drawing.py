"""Draws routed pictures as the paper's Figures 3 to 5: compressed tiles are shaded, each tile has its score."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from lmdeploy_vico.config import TOKENS_COMPRESSED
from lmdeploy_vico.inspection.routed import Routed

SIDE = 168  # pixels of a tile
GAP = 12  # between the grid and what stands beside it
CAPTION = 44  # pixels under a picture
SHEET_WIDTH = 1500
WHITE, INK, VEIL = (255, 255, 255), (20, 20, 20), (225, 225, 225)
SHADE = 0.65  # of the veil over a compressed tile
SCORE_SIZE, CAPTION_SIZE = 15, 15
MARGIN = 5  # of the plate that a score stands on


def draw(routed: Routed) -> Image.Image:
    """One picture: the grid as the model sees it, the thumbnail beside it, a line of text below.

    Returns:
        RGB; the grid's tiles have :data:`SIDE` pixels.
    """
    columns, rows = routed.grid.columns, routed.grid.rows
    width, height = columns * SIDE, rows * SIDE
    aside = GAP + SIDE if routed.grid.thumbnail else 0
    title = _font(CAPTION_SIZE)
    lines = [_fitting(routed.name, title, max(width + aside, 2 * SIDE)), _counts(routed)]
    whole_width = max(width + aside, *(int(title.getlength(line)) + 2 * GAP for line in lines))
    canvas = Image.new('RGB', (whole_width, height + CAPTION), WHITE)
    canvas.paste(routed.image.convert('RGB').resize((width, height), Image.Resampling.BICUBIC), (0, 0))
    corners = [(column * SIDE, row * SIDE) for row in range(rows) for column in range(columns)]
    if routed.grid.thumbnail:
        small = routed.image.convert('RGB').resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        canvas.paste(small, (width + GAP, 0))
        corners.append((width + GAP, 0))
    for corner, score, tokens in zip(corners, routed.scores, routed.tokens, strict=True):
        _tile(canvas, corner, score, tokens)
    for number, line in enumerate(lines):
        ImageDraw.Draw(canvas).text((4, height + 4 + number * CAPTION // 2), line, fill=INK, font=title)
    return canvas


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Several drawn pictures on one page, in rows as wide as :data:`SHEET_WIDTH` or as the widest of them."""
    widest = max(SHEET_WIDTH, *(picture.width + 2 * GAP for picture in pictures))
    rows: list[list[Image.Image]] = [[]]
    for picture in pictures:
        if sum(one.width + GAP for one in rows[-1]) + picture.width + 2 * GAP > widest and rows[-1]:
            rows.append([])
        rows[-1].append(picture)
    heights = [max(picture.height for picture in row) + GAP for row in rows]
    page = Image.new('RGB', (widest, sum(heights) + GAP), WHITE)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        left = GAP
        for picture in row:
            page.paste(picture, (left, top))
            left += picture.width + GAP
        top += height
    return page


def _tile(canvas: Image.Image, corner: tuple[int, int], score: float, tokens: int) -> None:
    left, top = corner
    box = left, top, left + SIDE, top + SIDE
    if tokens == TOKENS_COMPRESSED:
        canvas.paste(Image.blend(canvas.crop(box), Image.new('RGB', (SIDE, SIDE), VEIL), SHADE), box)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=WHITE, width=2)
    # In a corner, where it hides little; on a plate, so that it can be read on anything.
    text, font = f'{score:.2f} · {tokens}', _font(SCORE_SIZE)
    place = left + 2 * MARGIN, top + 2 * MARGIN
    around = draw.textbbox(place, text, font=font)
    plate = around[0] - MARGIN, around[1] - MARGIN, around[2] + MARGIN, around[3] + MARGIN
    draw.rectangle(plate, fill=WHITE, outline=INK)
    draw.text(place, text, fill=INK, font=font)


def _counts(routed: Routed) -> str:
    tokens, compressed = sum(routed.tokens), sum(routed.compressed)
    saved = 1 - tokens / routed.full
    return f'{compressed} of {len(routed.tokens)} tiles at 64; {tokens:,} of {routed.full:,} tokens ({saved:.0%} saved)'


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The end of a text, as much of it as fits: of a path, the end tells more."""
    start = 0
    while font.getlength(text[start:]) > width - 2 * GAP and start < len(text) - 1:
        start += 1
    return text if start == 0 else f'…{text[start + 1 :]}'


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
