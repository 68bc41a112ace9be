"""python -m tests.make_sprites NODE_MODULES: make the pictures in numpy_ref/things/data again.

NODE_MODULES is a folder of npm packages: @iconify-json/noto, @fontsource/noto-sans, noto-serif, oswald, roboto-mono and
roboto-slab (versions in numpy_ref/things/data/README.md). Needs resvg-py besides, which draws SVG.
"""

import io
import json
import string
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from numpy_ref import cli
from numpy_ref.things import catalogue, stamps

PROG = "python -m tests.make_sprites"
FONTS = (
    "noto-sans-latin-700",
    "noto-serif-latin-700",
    "oswald-latin-500",
    "roboto-mono-latin-500",
    "roboto-slab-latin-700",
)
DRAWN_AT = 512  # pixels of an icon before it is reduced


def icon(icons: dict, name: str) -> Image.Image:
    """An icon of the collection, without empty margins, fitted into a cell of the sheet (RGBA)."""
    import resvg_py

    found = icons["icons"][name]
    width, height = (found.get(side, icons.get(side, 128)) for side in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{DRAWN_AT}" height="{DRAWN_AT}">{found["body"]}</svg>'
    )
    picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    alpha = np.asarray(picture)[..., 3] > 127
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    picture = picture.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    scale = stamps.CELL / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    cell = Image.new("RGBA", (stamps.CELL, stamps.CELL))
    cell.paste(picture.resize(size, Image.Resampling.LANCZOS), [(stamps.CELL - side) // 2 for side in size])
    return cell


def sheet(icons: dict) -> Image.Image:
    """All icons of the catalogue, row by row."""
    names = [entry.icon for entry in catalogue.ENTRIES]
    columns = stamps.COLUMNS
    canvas = Image.new("RGBA", (columns * stamps.CELL, -(-len(names) // columns) * stamps.CELL))
    for i, name in enumerate(names):
        canvas.paste(icon(icons, name), (i % columns * stamps.CELL, i // columns * stamps.CELL))
    return canvas


def glyphs(modules: Path) -> tuple[Image.Image, list[list[int]]]:
    """Capitals in every font, a font a row, and how far each moves the pen (pixels)."""
    height, letters = stamps.GLYPH, string.ascii_uppercase
    canvas = Image.new("L", (len(letters) * stamps.GLYPH_WIDTH, len(FONTS) * height))
    pen, advances = ImageDraw.Draw(canvas), []
    for row, name in enumerate(FONTS):
        family = name.partition("-latin")[0]
        font = ImageFont.truetype(modules / "@fontsource" / family / "files" / f"{name}-normal.woff", height)
        _, top, _, bottom = font.getbbox(letters)
        font = ImageFont.truetype(font.path, int(height * height * 0.98 / (bottom - top)))
        _, top, _, bottom = font.getbbox(letters)
        advances.append([round(font.getlength(letter)) for letter in letters])
        for column, letter in enumerate(letters):
            pen.text(
                (column * stamps.GLYPH_WIDTH + stamps.MARGIN, row * height + (height - bottom - top) // 2),
                letter,
                255,
                font,
            )
    return canvas, advances


def main(argv=None) -> int:
    options = cli.Parser(prog=PROG, description="Make the pictures that scenes of things are drawn with again.")
    options.add_argument("modules", type=Path, metavar="NODE_MODULES", help="the folder of the npm packages")
    modules = options.parse_args(argv).modules
    icons = json.loads((modules / "@iconify-json/noto/icons.json").read_text())
    sheet(icons).save(stamps.DATA / "sprites.webp", lossless=True, quality=100, method=6)
    picture, advances = glyphs(modules)
    picture.save(stamps.DATA / "glyphs.png", optimize=True)
    (stamps.DATA / "glyphs.json").write_text(json.dumps(dict(zip(FONTS, advances, strict=True))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
