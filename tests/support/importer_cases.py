"""The same few scenes in the form of every tool that import-data reads."""

import base64
import csv
import io
import json
import tarfile

import numpy as np
import yaml
from PIL import Image

WIDTH, HEIGHT = 80, 64
NAMES = ("red cat", "dog")
# Category and x, y, w, h in whole pixels, by image.
SCENES = {
    "one": [("red cat", (8, 16, 24, 32)), ("dog", (40, 0, 40, 64))],
    "two": [("dog", (0, 8, 16, 8))],
}
CAPTIONS = {"one": "a red cat beside a dog", "two": "one dog"}


def picture(name):
    file = io.BytesIO()
    noise = np.random.default_rng(len(name)).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def ring(box):
    """The box as a polygon."""
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def mask_of(box):
    x, y, w, h = box
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + h, x : x + w] = True
    return mask


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def images_in(folder, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in SCENES:
        (folder / f"{name}{suffix}").write_bytes(picture(name))


def write_coco(folder, urls=False):
    images, rows = [], []
    for i, (name, things) in enumerate(SCENES.items()):
        place = {"coco_url": f"http://x.org/train/{name}.png"} if urls else {"file_name": f"{name}.png"}
        images.append({"id": i, "width": WIDTH, "height": HEIGHT} | place)
        for category, box in things:
            row = {"id": len(rows), "image_id": i, "category_id": NAMES.index(category), "bbox": box}
            rows.append(row | {"segmentation": [ring(box)], "iscrowd": 0})
    categories = [{"id": i, "name": name.replace(" ", "_") if urls else name} for i, name in enumerate(NAMES)]
    return {"images": images, "annotations": rows, "categories": categories}


def make_coco(folder):
    (folder / "annotations").mkdir(parents=True)
    images_in(folder / "train")
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(write_coco(folder)))
    rows = [{"image_id": i, "id": i, "caption": text} for i, text in enumerate(CAPTIONS.values())]
    (folder / "annotations" / "captions_train.json").write_text(json.dumps({"annotations": rows}))


def make_lvis(folder):
    images_in(folder / "train")
    (folder / "lvis_v1_train.json").write_text(json.dumps(write_coco(folder, urls=True)))


def make_yolo(folder):
    images_in(folder / "images" / "train")
    (folder / "labels" / "train").mkdir(parents=True)
    for i, (name, things) in enumerate(SCENES.items()):
        lines = []
        for category, (x, y, w, h) in things:
            values = [(x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT]
            if i == 0:  # polygons in one image
                values = [v / (WIDTH, HEIGHT)[k % 2] for k, v in enumerate(ring((x, y, w, h)))]
            lines.append(" ".join(map(str, [NAMES.index(category), *values])))
        (folder / "labels" / "train" / f"{name}.txt").write_text("\n".join([*lines, lines[0]]))  # one twice
    settings = {"path": "somewhere/else", "train": "images/train", "names": dict(enumerate(NAMES))}
    (folder / "data.yaml").write_text(yaml.safe_dump(settings))


def make_voc(folder):
    for name in ("JPEGImages", "SegmentationObject", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    images_in(folder / "JPEGImages")
    (folder / "ImageSets" / "Main" / "train.txt").write_text("\n".join(SCENES))
    for name, things in SCENES.items():
        numbers, text = np.zeros((HEIGHT, WIDTH), np.uint8), ""
        for i, (category, (x, y, w, h)) in enumerate(things, 1):
            numbers[mask_of((x, y, w, h))] = i
            sides = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
            inner = "".join(f"<{key}>{value}</{key}>" for key, value in sides.items())
            text += f"<object><name>{category}</name><bndbox>{inner}</bndbox></object>"
        (folder / "SegmentationObject" / f"{name}.png").write_bytes(png(numbers))
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
        note = f"<annotation><filename>C:\\other\\{name}.png</filename>{size}{text}</annotation>"
        (folder / "Annotations" / f"{name}.xml").write_text(note)


def make_labelme(folder):
    images_in(folder)
    for name, things in SCENES.items():
        shapes = []
        for i, (category, box) in enumerate(things):
            x, y, w, h = box
            shape = {"label": category, "shape_type": "polygon", "group_id": None}
            shape["points"] = np.reshape(ring(box), (4, 2)).tolist()
            if i == 1:  # a PNG of the part between two pixels
                content = base64.b64encode(png(np.full((h, w), 255, np.uint8))).decode()
                points = [[x, y], [x + w - 1, y + h - 1]]
                shape |= {"shape_type": "mask", "points": points, "mask": content}
            shapes.append(shape)
        values = {"imagePath": f"..\\else\\{name}.png", "imageData": None, "shapes": shapes}
        (folder / f"{name}.json").write_text(json.dumps(values | {"imageWidth": WIDTH, "imageHeight": HEIGHT}))


def brush(mask):
    """Label Studio's runs, written plainly: every run repeats one value, with 16 bits of length."""
    values = np.repeat(mask.ravel().astype(np.uint8) * 255, 4)
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    text = f"{len(values):032b}" + f"{7:05b}" + f"{15:04b}" * 4
    for start, end in zip(edges, edges[1:], strict=False):
        text += f"1{0:02b}{end - start - 1:016b}{values[start]:08b}"
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def make_labelstudio(folder):
    images_in(folder)
    tasks = []
    for name, things in SCENES.items():
        results = [{"type": "textarea", "id": "t", "value": {"text": [CAPTIONS[name]]}}]
        for i, (category, box) in enumerate(things):
            x, y, w, h = box
            size = {"original_width": WIDTH, "original_height": HEIGHT, "id": f"r{i}"}
            if i == 0:
                points = [[px / WIDTH * 100, py / HEIGHT * 100] for px, py in np.reshape(ring(box), (4, 2)).tolist()]
                value, kind = {"points": points, "polygonlabels": [category]}, "polygonlabels"
            else:
                value, kind = {"format": "rle", "rle": brush(mask_of(box)), "brushlabels": [category]}, "brushlabels"
            results.append(size | {"type": kind, "value": value})
        cancelled = {"was_cancelled": True, "result": []}
        data = {"image": f"/data/upload/3/0a1b2c3d-{name}.png"}
        tasks.append({"data": data, "annotations": [{"result": results}, cancelled]})
    (folder / "export.json").write_text(json.dumps(tasks))


def write_csv(path, columns, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])


def make_openimages(folder):
    images_in(folder / "train")
    (folder / "masks").mkdir()
    boxes, masks = [], []
    for name, things in SCENES.items():
        for i, (category, box) in enumerate(things):
            x, y, w, h = box
            sides = [x / WIDTH, (x + w) / WIDTH, y / HEIGHT, (y + h) / HEIGHT]
            mid, file = f"/m/{NAMES.index(category)}", f"{name}_{i}.png"
            boxes.append([name, mid, *sides, 0])
            (folder / "masks" / file).write_bytes(png(mask_of(box)[::2, ::2].astype(np.uint8) * 255))  # half the size
            masks.append([file, name, mid, *sides])
    columns = ["ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf"]
    write_csv(folder / "train-annotations-bbox.csv", columns, boxes)
    sides = ["BoxXMin", "BoxXMax", "BoxYMin", "BoxYMax"]
    write_csv(folder / "train-annotations-object-segmentation.csv", ["MaskPath", "ImageID", "LabelName", *sides], masks)
    write_csv(folder / "class-descriptions-boxable.csv", ["/m/0", NAMES[0]], [["/m/1", NAMES[1]]])


def make_webdataset(folder):
    """A tar with phrases of the caption for one image, as in GRIT, and COCO's rows for the other."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, things in SCENES.items():
            values = {"caption": CAPTIONS[name], "width": 5 * WIDTH, "height": 5 * HEIGHT}
            if name == "one":
                phrases = []
                for category, (x, y, w, h) in things:
                    start = CAPTIONS[name].index(category)
                    corners = [x / WIDTH, y / HEIGHT, (x + w) / WIDTH, (y + h) / HEIGHT]
                    phrases.append([start, start + len(category), *corners, 0.9])
                values["ref_exps"] = phrases
            else:
                values = {"annotations": [{"category": category, "bbox": box} for category, box in things]}
            parts = {"png": picture(name), "json": json.dumps(values).encode(), "txt": CAPTIONS[name].encode()}
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"./{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def make_imagefolder(folder):
    images_in(folder / "train")
    lines = []
    for name, things in SCENES.items():
        objects = {"bbox": [box for _, box in things], "categories": [NAMES.index(category) for category, _ in things]}
        lines.append(json.dumps({"file_name": f"{name}.png", "text": CAPTIONS[name], "objects": objects}))
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))


MAKERS = {name.removeprefix("make_"): make for name, make in dict(globals()).items() if name.startswith("make_")}
