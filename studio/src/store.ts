// The page's state: the document with its history, what is selected, and who is told of changes.

import { Doc, Item, emptyDoc, fromLayout, toLayout } from "./document";

export type Tool = "select" | "box" | "point" | "scribble" | "brush" | "polygon";
const KEPT = 200;
const SAVED = "instdiff-studio";

export class Store {
  doc: Doc = emptyDoc(64);
  selected: number | null = null;
  tool: Tool = "box";
  /** The instance that the next drawing is added to; null: a new one. */
  target: number | null = null;
  private field = "";
  private past: Doc[] = [];
  private future: Doc[] = [];
  private listeners: (() => void)[] = [];

  onChange(listener: () => void): void {
    this.listeners.push(listener);
  }

  private changed(): void {
    this.listeners.forEach((listener) => listener());
  }

  get item(): Item | undefined {
    return this.doc.items.find((item) => item.id === this.selected);
  }

  get canUndo(): boolean {
    return this.past.length > 0;
  }

  get canRedo(): boolean {
    return this.future.length > 0;
  }

  /** A new document, as one step of the history. */
  commit(doc: Doc, selected: number | null = this.selected): void {
    this.past = [...this.past, this.doc].slice(-KEPT);
    this.future = [];
    this.field = "";
    this.put(doc, selected);
  }

  /** A change of one item; those of one `field`, such as letters of a caption, are one step. */
  update(id: number, change: Partial<Item>, field = ""): void {
    const items = this.doc.items.map((item) => (item.id === id ? { ...item, ...change } : item));
    this.type({ ...this.doc, items }, field && `${field}-${id}`);
  }

  /** A new document; while `field` stays the same, changes are one step. */
  type(doc: Doc, field: string): void {
    if (field && field === this.field) this.put(doc, this.selected);
    else this.commit(doc);
    this.field = field;
  }

  private put(doc: Doc, selected: number | null): void {
    this.doc = doc;
    this.selected = doc.items.some((item) => item.id === selected) ? selected : null;
    this.save();
    this.changed();
  }

  undo(): void {
    const before = this.past.pop();
    if (!before) return;
    this.field = "";
    this.future.push(this.doc);
    this.put(before, this.selected);
  }

  redo(): void {
    const after = this.future.pop();
    if (!after) return;
    this.field = "";
    this.past.push(this.doc);
    this.put(after, this.selected);
  }

  select(id: number | null): void {
    if (this.selected === id) return;
    this.selected = id;
    this.changed();
  }

  use(tool: Tool, target: number | null = null): void {
    this.tool = tool;
    this.target = target;
    this.changed();
  }

  private save(): void {
    try {
      localStorage.setItem(SAVED, JSON.stringify(toLayout(this.doc, false)));
    } catch {
      // no room, or none allowed: the page works without
    }
  }

  /** The document of the last visit. */
  restore(): boolean {
    try {
      const text = localStorage.getItem(SAVED);
      if (!text) return false;
      this.doc = fromLayout(JSON.parse(text));
      this.changed();
      return true;
    } catch {
      return false;
    }
  }
}
