// Small helpers for elements. Text is always set as text, never as HTML.

type Child = Node | string | null | undefined | false;
type Props = Record<string, unknown>;

/** An element with properties (`on...` are listeners; those with a dash are attributes) and children. */
export function h<K extends keyof HTMLElementTagNameMap>(
  name: K,
  props: Props = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value as EventListener);
    else if (key.includes("-") || ["for", "role", "class", "list"].includes(key)) element.setAttribute(key, String(value));
    else Object.assign(element, { [key]: value });
  }
  element.append(...children.filter((child): child is Node | string => Boolean(child)));
  return element;
}

export function get<T extends HTMLElement = HTMLElement>(id: string): T {
  return document.getElementById(id) as T;
}

const PATHS: Record<string, string> = {
  select: "M5 3l14 8-6.5 1.5L9 19z",
  box: "M4 6h16v12H4z",
  point: "M12 3v4M12 17v4M3 12h4M17 12h4M12 10.5a1.5 1.5 0 100 3 1.5 1.5 0 000-3z",
  scribble: "M3 16c3-9 6-9 6-4s-2 7 1 7 4-12 7-12 2 6 4 6",
  brush: "M20 4c-6 3-9 6-11 9l2 2c3-2 6-5 9-11zM8 14c-3 0-3 4-5 5 4 1 7 0 7-3z",
  polygon: "M12 3l8 6-3 10H7L4 9z",
  eye: "M2 12s4-7 10-7 10 7 10 7-4 7-10 7S2 12 2 12zM12 9a3 3 0 100 6 3 3 0 000-6z",
  hidden: "M3 3l18 18M10 5.2A9.6 9.6 0 0112 5c6 0 10 7 10 7a17 17 0 01-3 3.6M6.5 7A17 17 0 002 12s4 7 10 7a9.6 9.6 0 004-.8",
  lock: "M6 11h12v9H6zM8 11V8a4 4 0 018 0v3",
  unlocked: "M6 11h12v9H6zM8 11V8a4 4 0 017-2.5",
  up: "M6 15l6-6 6 6",
  down: "M6 9l6 6 6-6",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13",
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  undo: "M8 5L4 9l4 4M4 9h10a5 5 0 010 10h-3",
  redo: "M16 5l4 4-4 4M20 9H10a5 5 0 000 10h3",
  open: "M3 19V6h6l2 2h10v11z",
  save: "M12 4v11M7 11l5 5 5-5M4 20h16",
  dice: "M5 5h14v14H5zM9 9h.01M15 15h.01M12 12h.01M15 9h.01M9 15h.01",
  theme: "M12 4a8 8 0 100 16zM12 4a8 8 0 010 16",
  layers: "M12 4l9 5-9 5-9-5zM3 14l9 5 9-5",
  picture: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M15 9h.01",
};

export function icon(name: string): SVGSVGElement {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("icon");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows an icon and is called by its label. */
export function iconButton(name: string, label: string, onclick: () => void, props: Props = {}): HTMLButtonElement {
  return h("button", { type: "button", class: "icon-button", title: label, "aria-label": label, onclick, ...props }, icon(name));
}

let timer = 0;
/** A line that everybody sees for some seconds; screen readers say it. */
export function say(text: string, kind: "info" | "error" = "info"): void {
  const status = get("status");
  status.textContent = text;
  status.dataset.kind = kind;
  status.classList.add("shown");
  clearTimeout(timer);
  timer = window.setTimeout(() => status.classList.remove("shown"), kind === "error" ? 8000 : 3000);
}
