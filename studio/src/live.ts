// Live mode: pictures follow the drawing. One request is on its way at a time, and only the latest change waits.

import { Picture, Problem, drawNow } from "./api";
import type { Doc } from "./document";

export class Live {
  on = false;
  /** Milliseconds from a change to its picture, of late. */
  times: number[] = [];
  private waiting: { doc: Doc; at: number } | null = null;
  private busy = false;

  constructor(
    private bodyOf: (doc: Doc) => object,
    private show: (picture: Picture) => Promise<void>,
    private fail: (problem: Problem) => void,
    private timed: () => void,
  ) {}

  /** The document has changed. */
  follow(doc: Doc): void {
    if (!this.on || !doc.items.some((item) => item.visible)) return;
    this.waiting = { doc, at: performance.now() };
    void this.work();
  }

  private async work(): Promise<void> {
    if (this.busy) return;
    this.busy = true;
    while (this.waiting && this.on) {
      const { doc, at } = this.waiting;
      this.waiting = null;
      try {
        const [picture] = await drawNow(this.bodyOf(doc));
        if (!this.on) break;
        await this.show(picture);
        this.times = [...this.times, performance.now() - at].slice(-200);
        this.timed();
      } catch (error) {
        if ((error as Problem).status === 429) await new Promise((resolve) => setTimeout(resolve, 500));
        else this.fail(error as Problem);
      }
    }
    this.busy = false;
  }
}
