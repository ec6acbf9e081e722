// Sampling settings as fields, and the request that they make.

import type { Model, Sampling } from "./api";
import { get } from "./dom";

const NUMBERS = { steps: "steps", guidance_scale: "guidance", mis: "mis" } as const;
const field = (id: string): HTMLInputElement => get<HTMLInputElement>(id);

function fill(id: string, choices: string[]): void {
  get<HTMLSelectElement>(id).replaceChildren(...choices.map((name) => new Option(name, name)));
}

export class Settings {
  constructor(private model: Model) {
    fill("preset", ["checkpoint", ...Object.keys(model.presets).filter((name) => name !== "quality")]);
    fill("sampler", model.choices.sampler);
    fill("format", model.choices.format);
    field("steps").max = String(model.limits.steps);
    field("images").max = String(model.limits.images);
    this.put(model.sampling);
    get<HTMLSelectElement>("preset").addEventListener("change", (event) => {
      const name = (event.target as HTMLSelectElement).value;
      this.put(model.presets[name] ?? model.sampling);
    });
    get("random-seed").addEventListener("click", () => {
      field("seed").value = String(Math.floor(Math.random() * 2 ** 31));
      field("seed").dispatchEvent(new Event("change"));
    });
    for (const id of ["alpha", "mis", "strength", "trace-opacity"]) {
      field(id)?.addEventListener("input", () => this.showNumbers());
    }
  }

  put(sampling: Sampling): void {
    for (const [name, id] of Object.entries(NUMBERS)) field(id).value = String(sampling[name as keyof typeof NUMBERS]);
    field("alpha").value = String(sampling.alpha[0]);
    get<HTMLSelectElement>("sampler").value = sampling.sampler;
    field("negative").value = sampling.negative_prompt;
    this.showNumbers();
  }

  private showNumbers(): void {
    for (const id of ["alpha", "mis", "strength"]) get(`${id}-value`).textContent = Number(field(id).value).toFixed(2);
  }

  get seed(): number {
    return Math.max(0, Math.floor(Number(field("seed").value) || 0));
  }

  set seed(value: number) {
    field("seed").value = String(value);
  }

  set format(value: string) {
    get<HTMLSelectElement>("format").value = value;
  }

  get strength(): number {
    return Number(field("strength").value);
  }

  /** The request's settings. */
  body(): Record<string, unknown> {
    const body: Record<string, unknown> = {
      format: get<HTMLSelectElement>("format").value,
      sampler: get<HTMLSelectElement>("sampler").value,
      negative_prompt: field("negative").value,
      seeds: Array.from({ length: Math.max(1, Number(field("images").value) || 1) }, (_, i) => this.seed + i),
    };
    const preset = get<HTMLSelectElement>("preset").value;
    if (preset !== "checkpoint") body.preset = preset;
    for (const [name, id] of Object.entries(NUMBERS)) body[name] = Number(field(id).value);
    const alpha = Number(field("alpha").value);
    const before = (this.model.presets[preset] ?? this.model.sampling).alpha;
    body.alpha = alpha === before[0] ? before : alpha;
    return body;
  }

  /** Few steps, one picture: what live mode asks for. */
  liveBody(): Record<string, unknown> {
    return { ...this.body(), preset: undefined, ...this.model.live, seeds: [this.seed], live: "drag" };
  }
}
