"""The page and pictures of `pathfed-site inspect`. Everything stands in the one HTML file: nothing is fetched, nothing runs.

Text from the slide or its path is escaped; it is for the site's own eyes.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pathfed_client.slides.filters import WARNING_SHARE, FilterReport, SlideMasks
from pathfed_client.slides.masks import Mask
from pathfed_client.slides.reader import Thumbnail
from pathfed_common.plan import CohortPlan

Pixels = NDArray[np.uint8]

TISSUE, PEN, FOLD, TILE = (0, 150, 60), (230, 0, 200), (255, 140, 0), (20, 60, 200)
_TINT = 0.45  # of ink and folds over the picture
_WIDEST = 1600  # pixels of the overlay's longer side; smaller thumbnails are enlarged by a whole factor
_COLUMNS = 6
_CAPTION = 16


@dataclass(frozen=True)
class Shown:
    """The pictures on the page, as PNG bytes; None where the slide could not be read that far."""

    thumbnail: bytes | None
    overlay: bytes | None
    contact: bytes | None


def png(pixels: Pixels) -> bytes:
    """PNG bytes of a picture, without any metadata."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def overlay(thumbnail: Thumbnail, masks: SlideMasks | None, corners: NDArray[np.int64], side: float) -> Pixels:
    """The thumbnail with the outline of tissue, ink and folds tinted, and the tiles' squares.

    Args:
        thumbnail: of the slide.
        masks: what is where; None where that cannot be told.
        corners: of the tiles, level-0 pixels.
        side: of a tile, level-0 pixels.
    """
    factor = max(1, _WIDEST // max(thumbnail.valid.shape))
    picture = _enlarged(thumbnail.pixels, factor).astype(np.float32)
    if masks is not None:
        for mask, colour in ((masks.pen, PEN), (masks.fold, FOLD)):
            here = _enlarged(mask, factor)
            picture[here] += (np.array(colour, np.float32) - picture[here]) * _TINT
        picture[_outline(_enlarged(masks.tissue, factor))] = TISSUE
    image = Image.fromarray(picture.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    scale = factor / thumbnail.cell
    for x, y in corners * scale:
        draw.rectangle((x, y, x + side * scale, y + side * scale), outline=TILE, width=max(1, factor // 3))
    return np.asarray(image)


def _enlarged(plane: NDArray[Any], factor: int) -> NDArray[Any]:
    return plane.repeat(factor, axis=0).repeat(factor, axis=1)


def _outline(mask: Mask) -> Mask:
    """Cells of the mask with a neighbour outside it."""
    padded = np.pad(mask, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(mask & ~inside)


def contact_sheet(tiles: Sequence[Pixels], sharpness: Sequence[float]) -> Pixels:
    """Tiles in rows, each with its number and sharpness below it.

    Raises:
        ValueError: no tile, or not one sharpness for each.
    """
    if not tiles or len(tiles) != len(sharpness):
        raise ValueError(f"a contact sheet needs tiles and a sharpness for each, got {len(tiles)} and {len(sharpness)}")
    px = tiles[0].shape[0]
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    image = Image.new("RGB", (columns * (px + 4) - 4, rows * (px + _CAPTION)), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for index, (tile, value) in enumerate(zip(tiles, sharpness, strict=True)):
        x, y = index % columns * (px + 4), index // columns * (px + _CAPTION)
        image.paste(Image.fromarray(tile), (x, y))
        draw.text((x + 2, y + px + 2), f"{index + 1}: {value:.2f}", fill=(0, 0, 0))
    return np.asarray(image)


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:90rem;padding:0 1.5rem;color:#1c1c1c;background:#fff}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
.stays{background:#fff4d6;border:1px solid #d9b650;padding:.4rem .8rem;border-radius:4px}
.verdict{font-size:1.05rem;padding:.6rem .8rem;border-radius:4px;background:#e5f4e8}.verdict.no{background:#fbe5e5}
.pictures{display:flex;flex-wrap:wrap;gap:1.5rem;align-items:flex-start}.pictures figure{flex:1 1 24rem;min-width:0;max-width:44rem}
img{max-width:100%;max-height:80vh;border:1px solid #ccc;background:#fff}figcaption{font-size:.9rem;margin-top:.3rem}
table{border-collapse:collapse}td,th{padding:.2rem .9rem .2rem 0;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
td.n,th.n{text-align:right}.warn{background:#fbe5e5}.key{display:inline-block;width:.8em;height:.8em;margin:0 .35em 0 .9em}figure{margin:0}
.pictures img{width:100%;max-height:none;image-rendering:pixelated}
"""


def page(facts: Mapping[str, object], filters: FilterReport | None, shown: Shown, plan: CohortPlan) -> str:
    """The HTML page.

    Args:
        facts: an inspection as `--json` prints it.
        filters: what each filter removed, where there was tissue.
        shown: the pictures.
        plan: the cohort rules.
    """
    verdict = f"usable: {facts['tiles']} tiles" if facts["usable"] else f"not used, {facts['code']}: {facts['why']}"
    properties = facts["properties"]
    technical: dict[str, object] = {
        "resolution of level 0, um/px": facts["mpp"] or "not stated",
        "size of level 0, pixels": "unknown" if facts["width"] is None else f"{facts['width']} x {facts['height']}",
        "plan": f"{plan.tile_px} px at {plan.mpp:g} um/px, at least {plan.tissue_share:.0%} tissue",
        **(properties if isinstance(properties, Mapping) else {}),
    }
    tiles = "tiles" if facts["usable"] else "tiles as they would lie without the filters"
    keys = ((TISSUE, "tissue"), (PEN, "pen mark"), (FOLD, "fold"), (TILE, tiles))
    caption = "".join(f'<span class=key style="background:rgb{colour}"></span>{words}' for colour, words in keys)
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            f"<title>Slide inspection - stays at this site</title><style>{_STYLE}</style></head><body>",
            f"<h1>{_escaped(facts['slide'])}</h1><p class=stays>Stays at this site: it shows patient material and names a file.</p>",
            f'<p class="verdict{"" if facts["usable"] else " no"}">{_escaped(verdict)}</p>',
            "<div class=pictures>",
            _figure(shown.thumbnail, "Thumbnail"),
            _figure(shown.overlay, caption),
            "</div>",
            _filter_table(filters, plan),
            "<h2>Tiles at the plan's resolution</h2>" if shown.contact else "",
            _figure(shown.contact, f"Below each tile its sharpness; in focus from {plan.quality.min_sharpness:g} on"),
            "<h2>Technical properties</h2><table>",
            *(f"<tr><td>{_escaped(key)}</td><td>{_escaped(value)}</td></tr>" for key, value in technical.items()),
            "</table></body></html>\n",
        )
    )


def _escaped(value: object) -> str:
    text = " x ".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)
    return html.escape(text)


def _figure(data: bytes | None, caption: str) -> str:
    if data is None:
        return ""
    source = base64.b64encode(data).decode()
    return f'<figure><img alt="" src="data:image/png;base64,{source}"><figcaption>{caption}</figcaption></figure>'


def _filter_table(filters: FilterReport | None, plan: CohortPlan) -> str:
    if filters is None:
        return ""
    rows = [f"<tr><td>tissue found</td><td class=n>{filters.tissue_cells:,}</td><td class=n>{filters.tissue_tiles:,}</td></tr>"]
    for count in filters.removed:
        nearly = count.tiles >= WARNING_SHARE * filters.tissue_tiles or count.cells >= WARNING_SHARE * filters.tissue_cells > 0
        rows.append(
            f"<tr{' class=warn' if nearly else ''}><td>removed by {count.name}{': nearly everything' if nearly else ''}</td>"
            f"<td class=n>{count.cells:,}</td><td class=n>{count.tiles:,}</td></tr>"
        )
    cells = filters.tissue_cells - sum(count.cells for count in filters.removed)
    tiles = filters.tissue_tiles - sum(count.tiles for count in filters.removed)
    rows.append(f"<tr><th>left</th><th class=n>{cells:,}</th><th class=n>{tiles:,}</th></tr>")
    focus = f"{filters.sharp} of {filters.sampled} sampled tiles are in focus; the plan asks {plan.quality.sharp_share:.0%}."
    return (
        "<h2>Filters, in order</h2><table><tr><th></th><th class=n>thumbnail cells</th><th class=n>tiles</th></tr>"
        + "".join(rows)
        + f"</table><p>{focus if filters.sampled else ''}</p>"
    )
