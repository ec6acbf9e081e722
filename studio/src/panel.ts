// The list of instances, and the properties of the selected one.

import { FORMATS, Format, Item, clamp, formatsOf } from "./document";
import { get, h, icon, iconButton } from "./dom";
import type { Store, Tool } from "./store";

const NAMES: Record<Format, string> = { box: "Box", point: "Point", scribble: "Scribble", mask: "Mask" };
const TOOLS: Record<Format, Tool> = { box: "box", point: "point", scribble: "scribble", mask: "brush" };

export class Panel {
  private shownFor: number | null = null;

  constructor(private store: Store) {
    store.onChange(() => this.render());
    get<HTMLTextAreaElement>("caption").addEventListener("input", (event) => {
      const caption = (event.target as HTMLTextAreaElement).value;
      store.type({ ...store.doc, caption }, "caption");
    });
  }

  render(): void {
    const { doc } = this.store;
    const caption = get<HTMLTextAreaElement>("caption");
    if (caption.value !== doc.caption) caption.value = doc.caption;
    get("count").textContent = doc.items.length ? String(doc.items.length) : "";
    this.renderList();
    this.renderProperties();
  }

  private renderList(): void {
    const list = get("instances");
    const focused = (document.activeElement as HTMLElement | null)?.dataset.key;
    list.replaceChildren(...this.store.doc.items.map((item) => this.row(item)).reverse());
    if (!this.store.doc.items.length) list.append(h("li", { class: "empty" }, "Nothing drawn yet. Pick a tool and draw on the canvas."));
    if (focused) list.querySelector<HTMLElement>(`[data-key="${focused}"]`)?.focus();
  }

  private row(item: Item): HTMLLIElement {
    const name = item.caption.trim() || "untitled";
    const kinds = formatsOf(item).map((format) => NAMES[format]).join(" · ");
    const toggle = (key: "visible" | "locked", on: string, off: string, labels: [string, string]) =>
      iconButton(item[key] ? on : off, `${item[key] ? labels[0] : labels[1]} ${name}`, () => this.store.update(item.id, { [key]: !item[key] }), {
        "data-key": `${key}-${item.id}`,
        class: item[key] === (key === "visible") ? "icon-button quiet" : "icon-button",
      });
    return h(
      "li",
      { class: `row${item.id === this.store.selected ? " selected" : ""}${item.visible ? "" : " off"}` },
      h(
        "button",
        {
          type: "button",
          class: "name",
          "aria-pressed": String(item.id === this.store.selected),
          "data-key": `name-${item.id}`,
          onclick: () => {
            this.store.select(item.id);
            if (this.store.tool !== "select") this.store.use("select");
          },
        },
        h("span", { class: "swatch", style: `background:${item.color}` }),
        h("span", { class: "text" }, h("span", { class: "title" }, name), h("span", { class: "kinds" }, kinds)),
      ),
      toggle("visible", "eye", "hidden", ["Hide", "Show"]),
      toggle("locked", "lock", "unlocked", ["Unlock", "Lock"]),
    );
  }

  private renderProperties(): void {
    const host = get("properties");
    const item = this.store.item;
    // An input that is being typed in stays.
    if (item && this.shownFor === item.id && host.contains(document.activeElement) && document.activeElement instanceof HTMLInputElement) return;
    this.shownFor = item?.id ?? null;
    host.hidden = !item;
    if (!item) return host.replaceChildren();
    const { id } = item;
    const change = (values: Partial<Item>, field = "") => this.store.update(id, values, field);
    const caption = h("input", {
      id: "item-caption",
      value: item.caption,
      placeholder: "a red circle",
      autocomplete: "off",
      oninput: (event: Event) => change({ caption: (event.target as HTMLInputElement).value }, "caption"),
    });
    const color = h("input", {
      type: "color",
      id: "item-color",
      value: item.color,
      oninput: (event: Event) => change({ color: (event.target as HTMLInputElement).value }, "color"),
    });
    host.replaceChildren(
      h("div", { class: "field grow" }, h("label", { for: "item-caption" }, "Instance caption"), h("div", { class: "line" }, caption, h("label", { class: "color", for: "item-color", title: "Colour" }, color, h("span", { class: "sr" }, "Colour")))),
      h("div", { class: "chips", role: "group", "aria-label": "Formats" }, ...FORMATS.map((format) => this.chip(item, format))),
      ...(item.box ? [this.numbers(item)] : []),
      h(
        "div",
        { class: "line actions" },
        iconButton("up", "Bring forward", () => this.reorder(id, 1)),
        iconButton("down", "Send back", () => this.reorder(id, -1)),
        iconButton("copy", "Duplicate (Ctrl+D)", () => get("duplicate").click()),
        h("span", { class: "spring" }),
        iconButton("trash", "Delete (Del)", () => get("delete").click(), { class: "icon-button danger" }),
      ),
    );
  }

  /** A format that the instance has, to remove; or lacks, to draw. */
  private chip(item: Item, format: Format): HTMLElement {
    const has = item[format] !== undefined;
    const onclick = () => {
      if (!has) return this.store.use(TOOLS[format], item.id);
      if (formatsOf(item).length > 1) this.store.update(item.id, { [format]: undefined });
    };
    const waiting = this.store.target === item.id && this.store.tool === TOOLS[format];
    const only = has && formatsOf(item).length === 1;
    return h(
      "button",
      { type: "button", class: `chip${has ? " on" : ""}${waiting ? " waiting" : ""}`, disabled: only, onclick, "aria-label": `${has ? "Remove" : "Add"} ${NAMES[format].toLowerCase()}` },
      NAMES[format],
      only ? null : icon(has ? "close" : "plus"),
    );
  }

  private numbers(item: Item): HTMLElement {
    const { doc } = this.store;
    const names = ["x", "y", "width", "height"];
    return h(
      "div",
      { class: "numbers" },
      ...names.map((name, i) =>
        h(
          "label",
          {},
          h("span", {}, name),
          h("input", {
            type: "number",
            value: String(Math.round(item.box![i] * 10) / 10),
            step: "any",
            onchange: (event: Event) => {
              const box = [...(this.store.item?.box ?? item.box!)] as [number, number, number, number];
              box[i] = Number((event.target as HTMLInputElement).value) || 0;
              const [x, y] = [clamp(box[0], 0, doc.width - 1), clamp(box[1], 0, doc.height - 1)];
              this.store.update(item.id, { box: [x, y, clamp(box[2], 1, doc.width - x), clamp(box[3], 1, doc.height - y)] });
            },
          }),
        ),
      ),
    );
  }

  private reorder(id: number, by: number): void {
    const items = [...this.store.doc.items];
    const from = items.findIndex((item) => item.id === id);
    const to = clamp(from + by, 0, items.length - 1);
    if (from === to) return;
    items.splice(to, 0, ...items.splice(from, 1));
    this.store.commit({ ...this.store.doc, items });
  }
}
