// Builds the page into the package: npm ci && npm run build
import { build } from "esbuild";
import { createHash } from "node:crypto";
import { copyFileSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";

const out = new URL("../instdiff_jax/serving/static/", import.meta.url).pathname;
mkdirSync(out, { recursive: true });
await build({
  entryPoints: ["src/main.ts", "src/api_page.ts"],
  outdir: out,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  legalComments: "eof",
});
for (const name of ["index.html", "api.html", "style.css", "icon.svg"]) copyFileSync(`src/${name}`, out + name);
// What it was built from; tests/unit/test_studio_files.py compares.
const hash = createHash("sha256");
for (const name of ["package.json", ...readdirSync("src").sort().map((file) => `src/${file}`)]) hash.update(readFileSync(name));
writeFileSync(`${out}sources.sha256`, `${hash.digest("hex")}\n`);
