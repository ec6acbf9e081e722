// Masks as pixels: painting, filling and showing them.

import type { Mask } from "./document";

function canvasOf(width: number, height: number): [HTMLCanvasElement, CanvasRenderingContext2D] {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  return [canvas, canvas.getContext("2d", { willReadFrequently: true })!];
}

/** A mask in a colour, transparent elsewhere. */
export function maskImage(mask: Mask, width: number, height: number, color: string): HTMLCanvasElement {
  const [canvas, context] = canvasOf(width, height);
  const image = context.createImageData(width, height);
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
  mask.forEach((value, i) => {
    if (value) image.data.set([r, g, b, 255], 4 * i);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

/** The mask with a round stroke along points painted in (1) or out (0). */
export function paintStroke(mask: Mask, width: number, height: number, points: number[], radius: number, value: 0 | 1): Mask {
  const made = mask.slice();
  const [x0, y0, x1, y1] = points.length > 2 ? points : [...points, ...points];
  const steps = Math.max(1, Math.ceil(Math.hypot(x1 - x0, y1 - y0)));
  for (let step = 0; step <= steps; step++) {
    const [x, y] = [x0 + ((x1 - x0) * step) / steps, y0 + ((y1 - y0) * step) / steps];
    for (let v = Math.max(0, Math.floor(y - radius)); v < Math.min(height, y + radius); v++) {
      for (let u = Math.max(0, Math.floor(x - radius)); u < Math.min(width, x + radius); u++) {
        if (Math.hypot(u + 0.5 - x, v + 0.5 - y) <= radius) made[v * width + u] = value;
      }
    }
  }
  return made;
}

/** The pixels inside a polygon. */
export function polygonMask(points: number[], width: number, height: number): Mask {
  const [, context] = canvasOf(width, height);
  context.beginPath();
  for (let i = 0; i < points.length; i += 2) context.lineTo(points[i], points[i + 1]);
  context.fill();
  const { data } = context.getImageData(0, 0, width, height);
  return Uint8Array.from({ length: width * height }, (_, i) => (data[4 * i + 3] >= 128 ? 1 : 0));
}

/** An image scaled to a canvas, as base64 of a PNG. */
export function asPng(image: CanvasImageSource, width: number, height: number): string {
  const [canvas, context] = canvasOf(width, height);
  context.drawImage(image, 0, 0, width, height);
  return canvas.toDataURL("image/png").split(",")[1];
}

export function loadImage(url: string): Promise<HTMLImageElement> {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("This file is no image that the browser can show."));
    image.src = url;
  });
}
