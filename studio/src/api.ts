// Requests to the server that the page came from.

import type { LayoutJson } from "./document";

export interface Sampling {
  steps: number;
  sampler: string;
  guidance_scale: number;
  alpha: number[];
  mis: number;
  negative_prompt: string;
}

export interface Model {
  version: string;
  fingerprint: string;
  canvas_multiple: number;
  canvas: number;
  sampling: Sampling;
  presets: Record<string, Sampling>;
  live: Record<string, unknown>;
  choices: Record<string, string[]>;
  limits: { side: number; steps: number; images: number; instances: number };
}

export interface Picture {
  seed: number;
  png: string; // base64
}

export interface Read {
  layout: LayoutJson;
  seed?: number;
  format?: string;
  sampling?: Sampling;
}

export class Problem extends Error {
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

const token = readToken();

/** The token of the address that the page was opened with; it does not stay there. */
function readToken(): string {
  const found = /token=([^&]+)/.exec(location.hash);
  if (found) {
    sessionStorage.setItem("instdiff-token", decodeURIComponent(found[1]));
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem("instdiff-token") ?? "";
}

let waiting: (text: string) => void = () => undefined;

/** Who is told that a request waits for the server to get its model ready. */
export const onWait = (listener: (text: string) => void): void => void (waiting = listener);

export async function ask(path: string, options: RequestInit = {}): Promise<Response> {
  const headers = new Headers(options.headers);
  if (token) headers.set("Authorization", `Bearer ${token}`);
  let answer: Response;
  for (;;) {
    try {
      answer = await fetch(path, { ...options, headers });
    } catch (error) {
      if ((error as Error).name === "AbortError") throw error;
      throw new Problem("The server does not answer. Is it still running?", 0);
    }
    const seconds = Number(answer.headers.get("Retry-After"));
    if (answer.status !== 503 || !seconds) break;
    waiting("The model is getting ready…");
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
  }
  if (answer.ok) return answer;
  let text = `${answer.status} ${answer.statusText}`;
  try {
    text = (await answer.json()).error;
  } catch {
    // no JSON
  }
  throw new Problem(text, answer.status);
}

const post = (path: string, body: unknown, signal?: AbortSignal): Promise<Response> =>
  ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

/** Pictures in one answer. */
export async function drawNow(body: object, signal?: AbortSignal): Promise<Picture[]> {
  return (await (await post("/v1/images", body, signal)).json()).images;
}

/** Pictures, with progress on the way. */
export async function draw(body: object, progress: (done: number) => void, signal: AbortSignal): Promise<Picture[]> {
  const job = await (await post("/v1/images", { ...body, wait: false }, signal)).json();
  signal.addEventListener("abort", () => void ask(`/v1/jobs/${job.id}`, { method: "DELETE" }).catch(() => undefined));
  const reader = (await ask(`/v1/jobs/${job.id}/events`, { signal })).body!.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    text += value;
    const events = text.split("\n\n");
    text = events.pop()!;
    for (const event of events) progress(JSON.parse(event.slice(event.indexOf("data: ") + 6)).progress);
  }
  const answer = await (await ask(`/v1/jobs/${job.id}`)).json();
  if (answer.state !== "done") throw new Problem(answer.error ?? "cancelled", 409);
  return answer.images;
}

export const readFile = async (file: Blob): Promise<Read> =>
  (await ask("/v1/layouts", { method: "POST", body: file })).json();
export const readModel = async (): Promise<Model> => (await ask("/v1/model")).json();
export const readExamples = async (): Promise<Record<string, Read>> => (await ask("/v1/examples")).json();
