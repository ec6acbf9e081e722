"""What is made of a run's records: a COCO folder with a report, and a page to look at."""

import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from instdiff_jax.data.annotate import Picture, open_picture, record_path
from instdiff_jax.data.importers.records import scene_of_values
from instdiff_jax.data.importers.scene import Options, Scene
from instdiff_jax.data.importers.write import write_scenes
from instdiff_jax.data.report import Report
from instdiff_jax.files import read_json, write_file, write_text


def write_coco(
    pictures: Sequence[Picture], output: Path, source: Mapping[str, str], report: Report | None = None
) -> tuple[dict, Report]:
    """Makes OUTPUT/coco of all records, with a report of what was left out, added to one that there is.

    Args:
        pictures: all pictures; InputError if one has no record yet.
        output: the annotations' folder.
        source: what report.json says of the pictures.
        report: what was left out before.
    """
    report = report or Report()

    def scenes() -> Iterator[tuple[str, Scene]]:
        for picture in pictures:
            path = record_path(output, picture)
            values = read_json(path)
            if "error" in values:
                report.skip("image", picture.split, picture.name, str(values["error"]))
                continue
            for entry in values.get("dropped", []):
                report.note("instance", picture.split, picture.name, f"{entry['what']}: {entry['reason']}")
            captions = tuple(values.get("captions", ()))
            yield picture.split, scene_of_values(picture.image, picture.name, values, captions, str(path), Options())

    return write_scenes(scenes(), output / "coco", report, source, overwrite=True), report


def write_page(pictures: Sequence[Picture], output: Path, count: int = 48) -> None:
    """OUTPUT/page.html with some pictures, their boxes and captions, to look at."""
    step = max(1, len(pictures) // count)
    parts = ["<!doctype html><meta charset='utf-8'><title>Annotations</title>"]
    parts.append("<style>body{font:14px sans-serif}figure{display:inline-block;width:320px;vertical-align:top}</style>")
    (output / "page").mkdir(exist_ok=True)
    for number, picture in enumerate(list(pictures)[::step][:count]):
        values = read_json(record_path(output, picture))
        if "error" in values:
            continue
        image = Image.fromarray(open_picture(picture))
        draw = ImageDraw.Draw(image)
        lines = []
        for row in values["annotations"]:
            x, y, w, h = row["bbox"]
            draw.rectangle((x, y, x + w, y + h), outline=(255, 0, 90), width=max(1, image.width // 200))
            score = f" {row['score']:.2f}" if "score" in row else ""
            lines.append(f"{row['category']}{score}: {row.get('caption', '')}")
        image.thumbnail((320, 320))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG")
        write_file(output / "page" / f"{number}.jpg", lambda file, data=buffer.getvalue(): file.write(data), sync=False)
        text = "<br>".join(html.escape(line) for line in [*values["captions"][:1], *lines])
        parts.append(f"<figure><img src='page/{number}.jpg' alt=''><figcaption>{text}</figcaption></figure>")
    write_text(output / "page.html", "\n".join(parts))
