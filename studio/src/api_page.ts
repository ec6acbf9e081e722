// The API's page: paths of openapi.json with what they take and answer.

import { ask } from "./api";
import { get, h } from "./dom";

interface Operation {
  summary?: string;
  description?: string;
  requestBody?: unknown;
  responses: Record<string, { description: string }>;
}

async function main(): Promise<void> {
  const page = await (await ask("/openapi.json")).json();
  const paths = Object.entries(page.paths as Record<string, Record<string, Operation>>);
  for (const [path, operations] of paths) {
    for (const [method, operation] of Object.entries(operations)) {
      const answers = Object.entries(operation.responses).map(([status, { description }]) => h("li", {}, h("b", {}, status), ` ${description}`));
      get("paths").append(
        h("section", {}, h("h2", {}, h("span", { class: "method" }, method.toUpperCase()), ` ${path}`), h("p", {}, operation.description ?? ""), h("ul", {}, ...answers)),
      );
    }
  }
  const request = page.components.schemas.ImagesRequest;
  get("fields").append(
    ...Object.entries(request.properties as Record<string, object>).map(([name, schema]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, h("code", {}, JSON.stringify(schema).slice(0, 400))))),
  );
}

void main();
