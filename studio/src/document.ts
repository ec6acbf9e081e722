// The layout being drawn. Values are never changed in place, so that history is a list of documents.

/** A mask: 1 where the instance is, row by row. */
export type Mask = Uint8Array;
export type Format = "box" | "point" | "scribble" | "mask";
export const FORMATS: Format[] = ["box", "point", "scribble", "mask"];

export interface Item {
  id: number;
  caption: string;
  category: string;
  color: string;
  visible: boolean;
  locked: boolean;
  box?: [number, number, number, number]; // x, y, width, height in pixels of the canvas
  point?: [number, number];
  scribble?: number[]; // x1, y1, x2, y2, ...
  mask?: Mask;
}

export interface Doc {
  caption: string;
  width: number;
  height: number;
  items: Item[];
}

/** The official JSON's object. */
export interface LayoutJson {
  caption: string;
  width: number;
  height: number;
  annos: AnnoJson[];
  negative_prompt?: string;
}

export interface AnnoJson {
  caption: string;
  category_name?: string;
  bbox?: number[];
  point?: number[];
  scribble?: number[];
  mask?: { size: number[]; counts: number[] };
}

// Told apart in all common kinds of colour blindness; as in the drawings of layouts.
const COLORS = [
  "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#0072b2", "#c9b400", "#7e2f8e", "#77ac30", "#a2142f",
];

let lastId = 0;

export function newItem(doc: Doc, given: Partial<Item>): Item {
  const used = new Set(doc.items.map((item) => item.color));
  const color = COLORS.find((one) => !used.has(one)) ?? COLORS[doc.items.length % COLORS.length];
  return { id: ++lastId, caption: "", category: "", color, visible: true, locked: false, ...given };
}

export function emptyDoc(side: number): Doc {
  return { caption: "", width: side, height: side, items: [] };
}

export function formatsOf(item: Item): Format[] {
  return FORMATS.filter((format) => item[format] !== undefined);
}

/** A layout file's object; invisible instances are left out. */
export function toLayout(doc: Doc, visibleOnly = true): LayoutJson {
  const annos = doc.items.filter((item) => item.visible || !visibleOnly).map((item) => {
    const anno: AnnoJson = { caption: item.caption.trim() || "an object" };
    if (item.category) anno.category_name = item.category;
    if (item.box) anno.bbox = item.box.map(tidy);
    if (item.point) anno.point = item.point.map(tidy);
    if (item.scribble) anno.scribble = item.scribble.map(tidy);
    if (item.mask) anno.mask = { size: [doc.height, doc.width], counts: runsOf(item.mask, doc.width, doc.height) };
    return anno;
  });
  return { caption: doc.caption, width: doc.width, height: doc.height, annos };
}

export function fromLayout(layout: LayoutJson): Doc {
  const doc: Doc = { caption: layout.caption, width: layout.width, height: layout.height, items: [] };
  for (const anno of layout.annos) {
    const item = newItem(doc, { caption: anno.caption, category: anno.category_name ?? "" });
    if (anno.bbox) item.box = anno.bbox as Item["box"];
    if (anno.point) item.point = anno.point as Item["point"];
    if (anno.scribble) item.scribble = anno.scribble;
    if (anno.mask) item.mask = maskOf(anno.mask.counts, doc.width, doc.height);
    doc.items.push(item);
  }
  return doc;
}

const tidy = (value: number): number => Math.round(value * 100) / 100;

/** Run lengths of a mask, column by column, of pixels outside and inside in turn. */
export function runsOf(mask: Mask, width: number, height: number): number[] {
  const runs: number[] = [];
  let value = 0;
  let run = 0;
  for (let x = 0; x < width; x++) {
    for (let y = 0; y < height; y++) {
      if (mask[y * width + x] === value) run++;
      else {
        runs.push(run);
        value = 1 - value;
        run = 1;
      }
    }
  }
  return [...runs, run];
}

export function maskOf(runs: number[], width: number, height: number): Mask {
  const mask = new Uint8Array(width * height);
  let place = 0;
  runs.forEach((run, i) => {
    for (let k = 0; k < run; k++, place++) if (i % 2) mask[(place % height) * width + Math.floor(place / height)] = 1;
  });
  return mask;
}

export function maskExtent(mask: Mask, width: number): [number, number, number, number] | null {
  let [x0, y0, x1, y1] = [Infinity, Infinity, -1, -1];
  mask.forEach((value, i) => {
    if (!value) return;
    const [x, y] = [i % width, Math.floor(i / width)];
    [x0, y0, x1, y1] = [Math.min(x0, x), Math.min(y0, y), Math.max(x1, x), Math.max(y1, y)];
  });
  return x1 < 0 ? null : [x0, y0, x1 + 1 - x0, y1 + 1 - y0];
}

/** The box around all of an item's locations. */
export function extentOf(item: Item, doc: Doc): [number, number, number, number] {
  const boxes: [number, number, number, number][] = [];
  if (item.box) boxes.push(item.box);
  if (item.point) boxes.push([...item.point, 0, 0]);
  if (item.scribble) {
    const xs = item.scribble.filter((_, i) => i % 2 === 0);
    const ys = item.scribble.filter((_, i) => i % 2 === 1);
    const [x, y] = [Math.min(...xs), Math.min(...ys)];
    boxes.push([x, y, Math.max(...xs) - x, Math.max(...ys) - y]);
  }
  const around = item.mask && maskExtent(item.mask, doc.width);
  if (around) boxes.push(around);
  const x = Math.min(...boxes.map((box) => box[0]));
  const y = Math.min(...boxes.map((box) => box[1]));
  return [x, y, Math.max(...boxes.map((b) => b[0] + b[2])) - x, Math.max(...boxes.map((b) => b[1] + b[3])) - y];
}

/** The item moved as far as the canvas allows. */
export function moved(item: Item, dx: number, dy: number, doc: Doc): Item {
  const [x, y, w, h] = extentOf(item, doc);
  dx = clamp(dx, -x, doc.width - x - w);
  dy = clamp(dy, -y, doc.height - y - h);
  const next = { ...item };
  if (item.box) next.box = [item.box[0] + dx, item.box[1] + dy, item.box[2], item.box[3]];
  if (item.point) next.point = [item.point[0] + dx, item.point[1] + dy];
  if (item.scribble) next.scribble = item.scribble.map((value, i) => value + (i % 2 ? dy : dx));
  if (item.mask) next.mask = shifted(item.mask, Math.round(dx), Math.round(dy), doc);
  return next;
}

function shifted(mask: Mask, dx: number, dy: number, doc: Doc): Mask {
  const made = new Uint8Array(mask.length);
  for (let y = 0; y < doc.height; y++) {
    for (let x = 0; x < doc.width; x++) {
      const [u, v] = [x - dx, y - dy];
      if (u >= 0 && v >= 0 && u < doc.width && v < doc.height) made[y * doc.width + x] = mask[v * doc.width + u];
    }
  }
  return made;
}

/** The document on another canvas: all locations are scaled with it. */
export function resized(doc: Doc, width: number, height: number): Doc {
  const [sx, sy] = [width / doc.width, height / doc.height];
  const items = doc.items.map((item) => {
    const next = { ...item };
    if (item.box) next.box = [item.box[0] * sx, item.box[1] * sy, item.box[2] * sx, item.box[3] * sy];
    if (item.point) next.point = [item.point[0] * sx, item.point[1] * sy];
    if (item.scribble) next.scribble = item.scribble.map((value, i) => value * (i % 2 ? sy : sx));
    if (item.mask) {
      const made = new Uint8Array(width * height);
      for (let i = 0; i < made.length; i++) {
        const [u, v] = [Math.floor((i % width) / sx), Math.floor(Math.floor(i / width) / sy)];
        made[i] = item.mask[v * doc.width + u];
      }
      next.mask = made;
    }
    return next;
  });
  return { ...doc, width, height, items };
}

export const clamp = (value: number, low: number, high: number): number => Math.min(Math.max(value, low), high);
