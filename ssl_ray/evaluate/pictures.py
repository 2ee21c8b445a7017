"""Pictures of read-outs, as PNG: a confusion matrix, images with their nearest neighbours."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE_PX = 640
"""Of a matrix, about: a cell has a pixel at least and MAX_CELL_PX at most."""
MAX_CELL_PX = 44
NAMED_CELL_PX, NUMBERED_CELL_PX = 10, 26
"""Cells as large as these have the names of their classes beside them, and their share in them."""
_DARK = np.array([8, 48, 107])
_NAME = 24  # characters of a class name that are shown
_GAP_PX = 6


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _short(name: str) -> str:
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"


def _png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def confusion_picture(confusion: np.ndarray, class_names: Sequence[str], title: str) -> bytes:
    """A PNG: rows are true classes, columns predicted ones, the darker the larger the share of the row; int [K, K]."""
    classes = len(confusion)
    cell = max(1, min(MAX_CELL_PX, SIDE_PX // classes))
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    pixels = np.rint(255 + share[..., None] * (_DARK - 255)).astype(np.uint8)
    matrix = Image.fromarray(pixels.repeat(cell, axis=0).repeat(cell, axis=1))
    named, font = cell >= NAMED_CELL_PX, _font(max(8, min(13, cell - 2)))
    names = [_short(name) for name in class_names] if named else []
    margin = int(max((font.getlength(name) for name in names), default=0)) + 2 * _GAP_PX
    left, top = margin + 20, margin + 44
    width = max(left + matrix.width + _GAP_PX, int(_font(14).getlength(title)) + 2 * _GAP_PX)
    sheet = Image.new("RGB", (width, top + matrix.height + _GAP_PX), "white")
    sheet.paste(matrix, (left, top))
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((left - 1, top - 1, left + matrix.width, top + matrix.height), outline="gray")
    draw.text((_GAP_PX, _GAP_PX), title, fill="black", font=_font(14))
    draw.text((left + matrix.width // 2, 26), "predicted", fill="gray", font=_font(12), anchor="ma")
    _turned(sheet, "true", (2, top + matrix.height // 2), _font(12), "gray", centred=True)
    for i, name in enumerate(names):
        middle = i * cell + cell // 2
        draw.text((left - _GAP_PX, top + middle), name, fill="black", font=font, anchor="rm")
        _turned(sheet, name, (left + middle, top - _GAP_PX), font, "black", centred=False)
    if cell >= NUMBERED_CELL_PX:
        for i, j in np.argwhere(confusion > 0).tolist():
            at = (left + j * cell + cell // 2, top + i * cell + cell // 2)
            text = f"{100 * share[i, j]:.0f}" if share[i, j] >= 0.005 else "<1"
            draw.text(at, text, fill="white" if share[i, j] > 0.5 else "black", font=_font(11), anchor="mm")
    return _png(sheet)


def _turned(sheet: Image.Image, text: str, at: tuple[int, int], font: object, fill: str, *, centred: bool) -> None:
    """Text that reads upwards: its left side, or the middle of it, at `at` (x is the middle of the line, or its left side)."""
    _, _, width, height = font.getbbox(text)  # type: ignore[attr-defined]
    word = Image.new("RGB", (int(width) + 1, int(height) + 3), "white")
    ImageDraw.Draw(word).text((0, 0), text, fill=fill, font=font)  # type: ignore[arg-type]
    word = word.transpose(Image.Transpose.ROTATE_90)
    sheet.paste(word, (at[0], at[1] - word.height // 2) if centred else (at[0] - word.width // 2, at[1] - word.height))


def neighbours_picture(images: np.ndarray, titles: Sequence[Sequence[str]]) -> bytes:
    """A PNG with a row an image: itself, then its neighbours, nearest first, their titles below.

    images: uint8 [n, 1 + k, C, S, S].  titles: n lists of 1 + k; all empty where there is nothing to say.
    """
    zoom = max(1, 96 // images.shape[-1])
    images = images.repeat(zoom, axis=3).repeat(zoom, axis=4)
    size, font = images.shape[-1], _font(11)
    line = 16 if any(any(row) for row in titles) else 0
    wide, high = size + _GAP_PX, size + line + _GAP_PX
    rows, columns = images.shape[:2]
    sheet = Image.new("RGB", (columns * wide + 2 * _GAP_PX, rows * high + _GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(rows):
        for j in range(columns):
            pixels = images[i, j].transpose(1, 2, 0)
            # The image itself stands a little apart.
            x, y = _GAP_PX + j * wide + (_GAP_PX if j else 0), _GAP_PX + i * high
            sheet.paste(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), (x, y))
            text = titles[i][j]
            while text and font.getlength(text) > size:
                text = text[:-2] + "…" if len(text) > 2 else ""
            draw.text((x, y + size + 1), text, fill="black" if titles[i][j] == titles[i][0] else "firebrick", font=font)
    return _png(sheet)
