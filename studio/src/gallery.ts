// The pictures that were drawn, newest first.

import type { Picture } from "./api";
import type { Doc } from "./document";
import { get, h } from "./dom";
import { loadImage } from "./masks";

const KEPT = 60;

export interface Entry extends Picture {
  image: HTMLImageElement;
  doc: Doc;
}

export class Gallery {
  entries: Entry[] = [];
  current: Entry | null = null;

  /** `show` is called with the entry whose picture is to lie under the layout. */
  constructor(private show: (entry: Entry | null) => void) {}

  async add(pictures: Picture[], doc: Doc): Promise<void> {
    const made = await Promise.all(
      pictures.map(async (picture) => ({ ...picture, doc, image: await loadImage(`data:image/png;base64,${picture.png}`) })),
    );
    this.entries = [...made, ...this.entries].slice(0, KEPT);
    this.choose(made[0]);
  }

  /** A picture that is only looked at, as in live mode. */
  async preview(picture: Picture): Promise<void> {
    const image = await loadImage(`data:image/png;base64,${picture.png}`);
    this.show({ ...picture, image, doc: this.current?.doc } as Entry);
  }

  choose(entry: Entry | null): void {
    this.current = entry;
    this.show(entry);
    this.render();
  }

  private render(): void {
    const strip = get("gallery");
    strip.hidden = !this.entries.length;
    strip.replaceChildren(
      ...this.entries.map((entry, i) => {
        const chosen = entry === this.current;
        const image = h("img", { src: entry.image.src, alt: "" });
        return h(
          "li",
          {},
          h("button", { type: "button", class: "thumb", "aria-pressed": String(chosen), "aria-label": `Picture ${this.entries.length - i}, seed ${entry.seed}`, title: `seed ${entry.seed}`, onclick: () => this.choose(entry) }, image),
        );
      }),
    );
  }
}
