// The API's page, drawn from its OpenAPI document.
"use strict";

function element(name, text, ...children) {
  const made = document.createElement(name);
  made.append(text, ...children);
  return made;
}

function limits(schema) {
  if (schema.anyOf) return schema.anyOf.map(limits).join(" or ");
  if (schema.enum) return schema.enum.join(", ");
  const range = ["minimum", "exclusiveMinimum", "maximum", "maxLength", "maxItems"]
    .filter((name) => name in schema).map((name) => `${name} ${schema[name]}`);
  return [schema.type, ...range].join(", ");
}

function operation(path, [method, { summary, requestBody }]) {
  const made = element("section", element("h2", `${method.toUpperCase()} ${path}`), element("p", summary));
  if (!requestBody) return made;
  const schema = requestBody.content["application/json"].schema;
  const rows = Object.entries(schema.properties).map(([name, field]) =>
    element("tr", element("th", name), element("td", limits(field)),
      element("td", (schema.required.includes(name) ? "required. " : "") + (field.description ?? ""))));
  made.append(element("table", "", ...rows));
  return made;
}

fetch("/v1/openapi.json").then((answer) => answer.json()).then(({ paths }) => {
  const all = Object.entries(paths).flatMap(([path, methods]) =>
    Object.entries(methods).map((each) => operation(path, each)));
  const example = 'curl -N http://127.0.0.1:8000/v1/stream -H "Content-Type: application/json" \\\n  -d \'{"n": 2, "seed": 0}\'';
  document.getElementById("operations").append(...all, element("pre", example));
});
