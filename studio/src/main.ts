// Puts the page together: tools, files, keyboard, drawing pictures.

import { draw, Model, onWait, Problem, Read, readExamples, readFile, readModel } from "./api";
import { clamp, emptyDoc, fromLayout, moved, newItem, resized, toLayout } from "./document";
import { get, iconButton, icon, say } from "./dom";
import { Gallery } from "./gallery";
import { Live } from "./live";
import { asPng, loadImage } from "./masks";
import { Panel } from "./panel";
import { Settings } from "./settings";
import { Stage } from "./stage";
import { Store, Tool } from "./store";

const TOOLS: [Tool, string, string][] = [
  ["select", "Select and move", "v"],
  ["box", "Box", "b"],
  ["point", "Point", "p"],
  ["scribble", "Scribble", "s"],
  ["brush", "Mask brush", "m"],
  ["polygon", "Mask polygon", "g"],
];

const store = new Store();
const stage = new Stage(get("canvas"), store);
const gallery = new Gallery((entry) => {
  stage.show(entry?.image ?? null);
  get<HTMLButtonElement>("download").disabled = !gallery.current;
  get<HTMLButtonElement>("restore").disabled = !gallery.current;
});
new Panel(store);
let settings: Settings;
let running: AbortController | null = null;
let startImage: HTMLImageElement | null = null;

const live = new Live(
  (doc) => ({ layout: toLayout(doc), ...settings.liveBody() }),
  (picture) => gallery.preview(picture),
  (problem) => say(problem.message, "error"),
  () => showTime(),
);

function showTime(): void {
  const sorted = [...live.times].sort((a, b) => a - b);
  get("live-time").textContent = sorted.length ? `${Math.round(sorted[sorted.length >> 1])} ms` : "";
}

function switchOn(id: string, listener: (on: boolean) => void): void {
  const button = get<HTMLButtonElement>(id);
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    listener(on);
  });
}

const isOn = (id: string): boolean => get(id).getAttribute("aria-pressed") === "true";

onWait((text) => say(text));

async function generate(): Promise<void> {
  if (running) return running.abort();
  const doc = store.doc;
  if (!doc.items.some((item) => item.visible)) return say("Draw at least one instance first.", "error");
  const body: Record<string, unknown> = { layout: toLayout(doc), ...settings.body() };
  if (isOn("edit") && gallery.current) Object.assign(body, { edit: gallery.current.png, seeds: [gallery.current.seed] });
  else if (startImage) Object.assign(body, { init_image: asPng(startImage, doc.width, doc.height), strength: settings.strength });
  running = new AbortController();
  const bar = get("progress");
  document.body.classList.add("drawing");
  get("generate-text").textContent = "Stop";
  try {
    const pictures = await draw(body, (done) => bar.style.setProperty("--done", String(done)), running.signal);
    await gallery.add(pictures, doc);
    say(pictures.length > 1 ? `${pictures.length} pictures drawn` : "Picture drawn");
  } catch (error) {
    if ((error as Error).name === "AbortError") say("Stopped");
    else say((error as Error).message, "error");
  } finally {
    running = null;
    bar.style.setProperty("--done", "0");
    document.body.classList.remove("drawing");
    get("generate-text").textContent = "Generate";
  }
}

function open(read: Read): void {
  store.commit(fromLayout(read.layout), null);
  store.use("select");
  if (read.sampling) settings.put(read.sampling);
  if (read.layout.negative_prompt) get<HTMLInputElement>("negative").value = read.layout.negative_prompt;
  if (read.seed !== undefined) settings.seed = read.seed;
  if (read.format) settings.format = read.format;
}

async function openFile(file: File): Promise<void> {
  const isImage = file.type.startsWith("image/");
  try {
    const read = await readFile(file);
    open(read);
    if (isImage) {
      const bytes = new Uint8Array(await file.arrayBuffer());
      const png = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
      await gallery.add([{ seed: read.seed ?? 0, png }], store.doc);
    }
    say(isImage ? "Layout and settings of this picture" : `${file.name} opened`);
  } catch (error) {
    if (isImage) await openBackground(file);
    else say((error as Error).message, "error");
  }
}

async function openBackground(file: File): Promise<void> {
  try {
    stage.trace = await loadImage(URL.createObjectURL(file));
    startImage = null;
    get("background").hidden = false;
    get<HTMLInputElement>("as-start").checked = false;
    stage.render();
    say("Background picture: trace it, or start from it");
  } catch (error) {
    say((error as Error).message, "error");
  }
}

function downloadUrl(url: string, name: string): void {
  const link = document.createElement("a");
  Object.assign(link, { href: url, download: name });
  link.click();
}

function save(): void {
  if (!store.doc.items.length) return say("There is nothing to save yet.", "error");
  const blob = new Blob([JSON.stringify(toLayout(store.doc, false))], { type: "application/json" });
  const url = URL.createObjectURL(blob);
  downloadUrl(url, "layout.json");
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function remove(): void {
  const { item, doc } = store;
  if (item && !item.locked) store.commit({ ...doc, items: doc.items.filter((one) => one !== item) }, null);
}

function duplicate(): void {
  const { item, doc } = store;
  if (!item) return;
  const made = newItem(doc, { ...item, id: undefined as never, color: undefined as never });
  const fresh = newItem(doc, {});
  const step = Math.max(1, Math.round(doc.width / 16));
  const copy = moved({ ...made, id: fresh.id, color: fresh.color }, step, step, doc);
  store.commit({ ...doc, items: [...doc.items, copy] }, copy.id);
}

function nudge(event: KeyboardEvent): boolean {
  const arrows: Record<string, [number, number]> = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const { item, doc } = store;
  const by = arrows[event.key];
  if (!by || !item || item.locked) return false;
  const step = event.shiftKey ? Math.max(1, Math.round(doc.width / 16)) : 1;
  const [dx, dy] = [by[0] * step, by[1] * step];
  if (event.altKey && item.box) {
    const [x, y, w, h] = item.box;
    store.update(item.id, { box: [x, y, clamp(w + dx, 1, doc.width - x), clamp(h + dy, 1, doc.height - y)] }, "size");
  } else {
    const next = moved(item, dx, dy, doc);
    store.update(item.id, next, "place");
  }
  return true;
}

function onKey(event: KeyboardEvent): void {
  const command = event.ctrlKey || event.metaKey;
  const typing = (event.target as HTMLElement).closest("input, textarea, select") !== null;
  if (command && event.key === "Enter") void generate();
  else if (typing) return;
  else if (command && event.key.toLowerCase() === "z") event.shiftKey ? store.redo() : store.undo();
  else if (command && event.key.toLowerCase() === "y") store.redo();
  else if (command && event.key.toLowerCase() === "d") duplicate();
  else if (command && event.key.toLowerCase() === "s") save();
  else if (command) return;
  else if (event.key === "Delete" || event.key === "Backspace") remove();
  else if (event.key === "Escape") stage.busy ? stage.cancel() : store.select(null);
  else if (event.key === "Enter" && document.activeElement === get("canvas")) stage.busy ? stage.closePolygon() : stage.addCentred();
  else if (event.key.toLowerCase() === "o") get("overlay").click();
  else if (nudge(event)) event.preventDefault();
  else {
    const tool = TOOLS.find(([, , key]) => key === event.key.toLowerCase());
    if (!tool) return;
    store.use(tool[0]);
  }
  event.preventDefault();
}

function addTools(): void {
  const rail = get("tools");
  for (const [tool, label, key] of TOOLS) {
    rail.append(iconButton(tool, `${label} (${key.toUpperCase()})`, () => store.use(tool), { "data-tool": tool, class: "tool" }));
  }
  store.onChange(() => {
    for (const button of rail.querySelectorAll<HTMLElement>("[data-tool]")) {
      button.setAttribute("aria-pressed", String(button.dataset.tool === store.tool));
    }
    get("brush-options").hidden = store.tool !== "brush";
    get<HTMLButtonElement>("undo").disabled = !store.canUndo;
    get<HTMLButtonElement>("redo").disabled = !store.canRedo;
    get("hint").hidden = store.doc.items.length > 0 || gallery.current !== null;
    get<HTMLInputElement>("width").value = String(store.doc.width);
    get<HTMLInputElement>("height").value = String(store.doc.height);
    live.follow(store.doc);
  });
}

function addActions(): void {
  for (const button of document.querySelectorAll<HTMLElement>("[data-icon]")) button.prepend(icon(button.dataset.icon!));
  const actions: Record<string, () => void> = {
    undo: () => store.undo(),
    redo: () => store.redo(),
    save,
    delete: remove,
    duplicate,
    generate: () => void generate(),
    open: () => get("file").click(),
    trace: () => get("trace-file").click(),
    clear: () => store.commit({ ...store.doc, caption: "", items: [] }, null),
    restore: () => gallery.current && store.commit(gallery.current.doc, null),
    download: () => gallery.current && downloadUrl(gallery.current.image.src, `picture-${gallery.current.seed}.png`),
    theme: nextTheme,
    "remove-background": () => {
      stage.trace = startImage = null;
      get("background").hidden = true;
      stage.render();
    },
  };
  for (const [id, act] of Object.entries(actions)) get(id).addEventListener("click", act);
  switchOn("live", (on) => {
    live.on = on;
    live.times = [];
    get("live-time").textContent = "";
    if (on) live.follow(store.doc);
    else stage.show(gallery.current?.image ?? null);
  });
  switchOn("edit", (on) => on && !gallery.current && say("Draw a picture first; then only what you change is painted anew."));
  switchOn("overlay", (on) => {
    stage.overlay = on;
    stage.render();
  });
  switchOn("erase", (on) => (stage.erase = on));
  get("brush-size").addEventListener("input", (event) => (stage.brush = Number((event.target as HTMLInputElement).value)));
  get("as-start").addEventListener("change", (event) => {
    startImage = (event.target as HTMLInputElement).checked ? (stage.trace as HTMLImageElement) : null;
  });
}

function addFiles(model: Model): void {
  const first = (input: HTMLInputElement, use: (file: File) => Promise<void>) =>
    input.addEventListener("change", async () => {
      if (input.files?.[0]) await use(input.files[0]);
      input.value = "";
    });
  first(get<HTMLInputElement>("file"), openFile);
  first(get<HTMLInputElement>("trace-file"), openBackground);
  window.addEventListener("dragover", (event) => event.preventDefault());
  window.addEventListener("drop", (event) => {
    event.preventDefault();
    const file = event.dataTransfer?.files[0];
    if (file) void openFile(file);
  });
  for (const side of ["width", "height"] as const) {
    const input = get<HTMLInputElement>(side);
    Object.assign(input, { step: model.canvas_multiple, min: model.canvas_multiple, max: model.limits.side });
    input.addEventListener("change", () => {
      const step = model.canvas_multiple;
      const value = clamp(Math.round(Number(input.value) / step) * step, step, Math.floor(model.limits.side / step) * step);
      store.commit(resized(store.doc, side === "width" ? value : store.doc.width, side === "height" ? value : store.doc.height));
    });
  }
}

async function addExamples(): Promise<void> {
  const examples = await readExamples();
  const select = get<HTMLSelectElement>("examples");
  select.append(...Object.keys(examples).map((name) => new Option(name.replaceAll("_", " "), name)));
  select.addEventListener("change", () => {
    if (examples[select.value]) open(examples[select.value]);
    select.value = "";
  });
}

function nextTheme(): void {
  const { dataset } = document.documentElement;
  const dark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("instdiff-theme", dataset.theme);
}

async function main(): Promise<void> {
  const theme = localStorage.getItem("instdiff-theme");
  if (theme) document.documentElement.dataset.theme = theme;
  addTools();
  addActions();
  window.addEventListener("keydown", onKey);
  try {
    const model = await readModel();
    settings = new Settings(model);
    addFiles(model);
    stage.onDraft = (doc) => live.follow(doc);
    if (!store.restore()) store.doc = emptyDoc(model.canvas);
    store.use(store.doc.items.length ? "select" : "box");
    stage.fit();
    await addExamples();
    document.body.classList.add("ready");
  } catch (error) {
    say((error as Problem).message, "error");
  }
}

void main();
