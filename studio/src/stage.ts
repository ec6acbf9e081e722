// The canvas: draws the document with Konva, and turns the pointer into changes of it.

import Konva from "konva/lib/Core";
import { Circle } from "konva/lib/shapes/Circle";
import { Image as KonvaImage } from "konva/lib/shapes/Image";
import { Label, Tag } from "konva/lib/shapes/Label";
import { Line } from "konva/lib/shapes/Line";
import { Rect } from "konva/lib/shapes/Rect";
import { Text } from "konva/lib/shapes/Text";
import { Transformer } from "konva/lib/shapes/Transformer";

import { Doc, Item, clamp, extentOf, moved, newItem } from "./document";
import { maskImage, paintStroke, polygonMask } from "./masks";
import { Store } from "./store";

const LABEL = 12; // pixels of the screen

export class Stage {
  overlay = true;
  brush = 0.08; // of the canvas' shorter side
  erase = false;
  trace: CanvasImageSource | null = null;
  /** Called while something is dragged, with the document as it would be. */
  onDraft: (doc: Doc) => void = () => undefined;
  private stage: Konva.Stage;
  private under = new Konva.Layer({ listening: false });
  private shapes = new Konva.Layer();
  private above = new Konva.Layer();
  private transformer: Transformer;
  private picture: HTMLImageElement | null = null;
  private scale = 1;
  private path: number[] = []; // of the drawing on its way
  private start: [number, number] | null = null;
  private draft: Item | null = null;

  constructor(
    private host: HTMLElement,
    private store: Store,
  ) {
    this.stage = new Konva.Stage({ container: host as HTMLDivElement, width: 10, height: 10 });
    this.stage.add(this.under, this.shapes, this.above);
    this.transformer = new Transformer({
      rotateEnabled: false,
      flipEnabled: false,
      keepRatio: false,
      ignoreStroke: true,
      anchorSize: matchMedia("(pointer: coarse)").matches ? 18 : 10,
      anchorCornerRadius: 3,
      borderEnabled: false,
    });
    this.above.add(this.transformer);
    this.stage.on("pointerdown", (event) => this.down(event.evt as PointerEvent, event.target));
    this.stage.on("pointermove", () => this.move());
    window.addEventListener("pointerup", () => this.up());
    host.addEventListener("dblclick", () => this.closePolygon());
    new ResizeObserver(() => this.fit()).observe(host.parentElement!);
    store.onChange(() => this.render());
  }

  /** The picture that lies under the layout. */
  show(picture: HTMLImageElement | null): void {
    this.picture = picture;
    this.renderUnder();
  }

  fit(): void {
    const { doc } = this.store;
    const room = this.host.parentElement!.getBoundingClientRect();
    this.scale = Math.max(Math.min((room.width - 2) / doc.width, (room.height - 2) / doc.height), 0.05);
    this.stage.size({ width: Math.round(doc.width * this.scale), height: Math.round(doc.height * this.scale) });
    for (const layer of [this.under, this.shapes, this.above]) layer.scale({ x: this.scale, y: this.scale });
    this.render();
  }

  render(): void {
    const { doc, tool } = this.store;
    const wanted = [Math.round(doc.width * this.scale), Math.round(doc.height * this.scale)];
    if (this.stage.width() !== wanted[0] || this.stage.height() !== wanted[1]) return this.fit();
    this.host.style.cursor = tool === "select" ? "default" : "crosshair";
    this.renderUnder();
    this.shapes.destroyChildren();
    this.shapes.visible(this.overlay);
    this.above.visible(this.overlay);
    for (const item of doc.items) if (item.visible) this.shapes.add(this.group(item, doc));
    if (this.draft) this.shapes.add(this.group(this.draft, doc));
    this.renderPolygon();
    this.attach();
  }

  private renderUnder(): void {
    const { doc } = this.store;
    this.under.destroyChildren();
    const size = { width: doc.width, height: doc.height };
    if (this.trace) this.under.add(new KonvaImage({ image: this.trace, opacity: this.picture ? 0.35 : 0.7, ...size }));
    if (this.picture) {
      const small = this.scale > 3;
      const image = new KonvaImage({ image: this.picture, opacity: this.trace ? 0.65 : 1, ...size });
      this.under.add(image);
      this.under.getNativeCanvasElement().style.imageRendering = small ? "auto" : "";
    }
  }

  /** All of an item's locations, which move together. */
  private group(item: Item, doc: Doc): Konva.Group {
    const { selected, tool } = this.store;
    const active = item.id === selected;
    const movable = tool === "select" && !item.locked && item !== this.draft;
    const group = new Konva.Group({ id: `item-${item.id}`, draggable: movable, listening: tool === "select" });
    const thin = { strokeScaleEnabled: false, stroke: item.color, strokeWidth: active ? 3 : 2 };
    if (item.mask) {
      const image = maskImage(item.mask, doc.width, doc.height, item.color);
      const shape = new KonvaImage({ image, width: doc.width, height: doc.height, opacity: (active ? 0.75 : 0.55) * (this.picture ? 0.6 : 1) });
      shape.hitFunc(() => undefined);
      group.add(shape);
      const [x, y, w, h] = extentOf({ ...item, box: undefined, point: undefined, scribble: undefined }, doc);
      if (Number.isFinite(x)) group.add(new Rect({ x, y, width: w, height: h, fill: "#0000" }));
    }
    if (item.box) {
      const [x, y, width, height] = item.box;
      group.add(new Rect({ name: "box", x, y, width, height, fill: item.color + (active ? "2e" : "1a"), ...thin }));
    }
    if (item.scribble) {
      const hit = 16 / this.scale;
      group.add(new Line({ points: item.scribble, ...thin, strokeWidth: active ? 5 : 4, lineCap: "round", lineJoin: "round", hitStrokeWidth: hit }));
    }
    if (item.point) {
      const [x, y] = item.point;
      const radius = 7 / this.scale;
      group.add(new Circle({ x, y, radius, fill: item.color, stroke: "#fff", strokeWidth: 2, strokeScaleEnabled: false }));
      group.add(new Circle({ x, y, radius: 2.2 * radius, opacity: active ? 0.9 : 0.4, ...thin }));
    }
    group.add(this.label(item, doc));
    // Not when the pointer goes down: drawing all anew would end the drag that begins then.
    group.on("click tap", () => this.store.select(item.id));
    group.on("dragmove", () => this.dragging(group, item, doc));
    group.on("dragend", () => this.dropped(group, item, doc));
    return group;
  }

  private label(item: Item, doc: Doc): Label {
    const [x, y] = extentOf(item, doc);
    const size = LABEL / this.scale;
    const label = new Label({ x: Math.max(x, 0), y: y > 1.8 * size ? y - 1.7 * size : y, listening: false });
    label.add(new Tag({ fill: item.color, cornerRadius: size / 4 }));
    const dark = brightness(item.color) > 0.45;
    const text = item.caption.trim() || "untitled";
    label.add(new Text({
      text: text.length > 32 ? `${text.slice(0, 31)}…` : text,
      fontSize: size,
      fontFamily: "system-ui, sans-serif",
      fontStyle: "600",
      padding: size / 4,
      fill: dark ? "#111" : "#fff",
    }));
    return label;
  }

  private dragging(group: Konva.Group, item: Item, doc: Doc): void {
    const [x, y, w, h] = extentOf(item, doc);
    group.x(clamp(group.x(), -x, doc.width - x - w));
    group.y(clamp(group.y(), -y, doc.height - y - h));
    this.onDraft(replaced(doc, moved(item, group.x(), group.y(), doc)));
  }

  private dropped(group: Konva.Group, item: Item, doc: Doc): void {
    this.store.commit(replaced(doc, moved(item, group.x(), group.y(), doc)), item.id);
  }

  /** The handles, on the selected item's box. */
  private attach(): void {
    const item = this.store.item;
    const box = item?.box && !item.locked && item.visible && this.store.tool === "select";
    const rect = box ? this.shapes.findOne<Konva.Group>(`#item-${item.id}`)?.findOne<Rect>(".box") : undefined;
    this.transformer.nodes(rect ? [rect] : []);
    if (!rect || !item) return;
    this.transformer.anchorStroke(item.color);
    const { doc } = this.store;
    const read = (): Item["box"] => {
      const [w, h] = [rect.width() * rect.scaleX(), rect.height() * rect.scaleY()];
      const [x0, y0] = [clamp(rect.x(), 0, doc.width - 1), clamp(rect.y(), 0, doc.height - 1)];
      const [x1, y1] = [clamp(rect.x() + w, x0 + 1, doc.width), clamp(rect.y() + h, y0 + 1, doc.height)];
      return [x0, y0, x1 - x0, y1 - y0];
    };
    rect.on("transform", () => this.onDraft(replaced(doc, { ...item, box: read() })));
    rect.on("transformend", () => this.store.commit(replaced(doc, { ...item, box: read() }), item.id));
  }

  private place(): [number, number] {
    const pointer = this.stage.getPointerPosition() ?? { x: 0, y: 0 };
    const { doc } = this.store;
    return [clamp(pointer.x / this.scale, 0, doc.width), clamp(pointer.y / this.scale, 0, doc.height)];
  }

  private down(event: PointerEvent, target: Konva.Node): void {
    const { tool } = this.store;
    if (event.button > 0 || !this.overlay) return;
    this.host.focus({ preventScroll: true });
    if (tool === "select") {
      if (target === this.stage) this.store.select(null);
      return;
    }
    const [x, y] = this.place();
    if (tool === "point") return this.add({ point: [x, y] });
    if (tool === "polygon") {
      const [x0, y0] = this.path;
      const near = this.path.length >= 6 && Math.hypot(x - x0, y - y0) * this.scale < 12;
      if (near) return this.closePolygon();
      this.path = [...this.path, x, y];
      return this.render();
    }
    this.start = [x, y];
    this.path = [x, y];
    if (tool === "brush") this.stroke();
  }

  private move(): void {
    if (!this.start) return;
    const { tool, doc } = this.store;
    const [x, y] = this.place();
    const last = this.path.slice(-2);
    if (tool !== "box" && Math.hypot(x - last[0], y - last[1]) * this.scale < 3) return;
    this.path = tool === "box" ? [...this.start, x, y] : [...this.path, x, y];
    if (tool === "brush") return this.stroke();
    const shape = tool === "box" ? { box: boxOf(this.path) } : { scribble: this.path };
    const base = this.targetItem() ?? { ...newItem(doc, {}), id: -1 };
    this.draft = { ...base, ...shape, color: base.color };
    this.render();
  }

  private up(): void {
    if (!this.start) return;
    const { tool } = this.store;
    const path = this.path;
    this.start = null;
    this.path = [];
    const draft = this.draft;
    this.draft = null;
    if (tool === "brush") return draft?.mask ? this.add({ mask: draft.mask }) : this.render();
    const [x, y, w, h] = boxOf([...path.slice(0, 2), ...path.slice(-2)]);
    if (tool === "box" && Math.min(w, h) * this.scale >= 4) return this.add({ box: [x, y, w, h] });
    if (tool === "scribble" && path.length >= 4) return this.add({ scribble: path });
    this.render();
  }

  /** The instance that a drawing is added to: the one asked for, or with the brush the selected mask. */
  private targetItem(): Item | undefined {
    const { doc, target, tool, item } = this.store;
    const asked = doc.items.find((one) => one.id === target);
    return asked ?? (tool === "brush" && item?.mask ? item : undefined);
  }

  private stroke(): void {
    const { doc } = this.store;
    const base = this.targetItem() ?? { ...newItem(doc, {}), id: -1 };
    const radius = (this.brush * Math.min(doc.width, doc.height)) / 2;
    const before = this.draft?.mask ?? base.mask ?? new Uint8Array(doc.width * doc.height);
    const mask = paintStroke(before, doc.width, doc.height, this.path.slice(-4), radius, this.erase ? 0 : 1);
    this.draft = { ...base, mask };
    this.render();
  }

  /** Ends the polygon on its way. */
  closePolygon(): void {
    const path = this.path;
    if (this.store.tool !== "polygon" || path.length < 6) return;
    this.path = [];
    const { doc } = this.store;
    const mask = polygonMask(path, doc.width, doc.height);
    const base = this.targetItem()?.mask;
    this.add({ mask: base ? mask.map((value, i) => value | base[i]) : mask });
  }

  cancel(): void {
    this.path = [];
    this.start = null;
    this.draft = null;
    this.render();
  }

  get busy(): boolean {
    return this.path.length > 0;
  }

  private renderPolygon(): void {
    this.above.find(".path").forEach((node) => node.destroy());
    if (this.store.tool !== "polygon" || !this.path.length) return;
    const color = this.targetItem()?.color ?? newItem(this.store.doc, {}).color;
    this.above.add(new Line({ name: "path", points: this.path, stroke: color, strokeWidth: 2, strokeScaleEnabled: false, dash: [6, 4] }));
    for (let i = 0; i < this.path.length; i += 2) {
      this.above.add(new Circle({ name: "path", x: this.path[i], y: this.path[i + 1], radius: 5 / this.scale, fill: i ? color : "#fff", stroke: color, strokeWidth: 2, strokeScaleEnabled: false }));
    }
  }

  /** Adds a location to the instance it is for, or a new instance with it. */
  private add(shape: Partial<Item>): void {
    const { doc } = this.store;
    const item = this.targetItem();
    if (shape.mask && !shape.mask.some(Boolean)) return this.render();
    if (item) {
      this.store.target = null;
      this.store.commit(replaced(doc, { ...item, ...shape }), item.id);
    } else {
      const made = newItem(doc, shape);
      this.store.commit({ ...doc, items: [...doc.items, made] }, made.id);
    }
  }

  /** A new instance in the middle, for those who draw with the keyboard. */
  addCentred(): void {
    const { doc, tool } = this.store;
    const [w, h] = [doc.width, doc.height];
    const [x, y] = [w / 4, h / 4];
    const shapes: Record<string, Partial<Item>> = {
      box: { box: [x, y, w / 2, h / 2] },
      point: { point: [w / 2, h / 2] },
      scribble: { scribble: [x, h / 2, w / 2, y, 3 * x, h / 2] },
      brush: { mask: paintStroke(new Uint8Array(w * h), w, h, [w / 2, h / 2], Math.min(w, h) / 4, 1) },
      polygon: { mask: polygonMask([x, y, 3 * x, y, 3 * x, 3 * y, x, 3 * y], w, h) },
    };
    if (shapes[tool]) this.add(shapes[tool]);
  }
}

const boxOf = ([x0, y0, x1, y1]: number[]): [number, number, number, number] => [
  Math.min(x0, x1),
  Math.min(y0, y1),
  Math.abs(x1 - x0),
  Math.abs(y1 - y0),
];

const replaced = (doc: Doc, item: Item): Doc => ({
  ...doc,
  items: doc.items.map((one) => (one.id === item.id ? item : one)),
});

function brightness(color: string): number {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16) / 255);
  return 0.3 * r + 0.59 * g + 0.11 * b;
}
