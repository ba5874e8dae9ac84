// The API's description, from the server's own openapi.json: every route with what it takes and gives.

import { get } from "./api.js";
import { element } from "./elements.js";

const part = (id) => document.getElementById(id);

function named(schema, all) {
  const name = schema?.$ref?.split("/").at(-1);
  return name ? { name, ...all[name] } : schema ?? {};
}

// What a value may be, in few words.
function kind(schema, all) {
  const found = named(schema, all);
  if (found.name) return found.name;
  const either = found.anyOf ?? found.oneOf ?? found.allOf;
  if (either) return [...new Set(either.map((each) => kind(each, all)))].filter((each) => each !== "null").join(" or ");
  if (found.enum || found.const !== undefined) return (found.enum ?? [found.const]).map((each) => JSON.stringify(each)).join(", ");
  if (found.type === "array") return `list of ${kind(found.items, all) || "values"}`;
  return found.type ?? "any value";
}

function range(schema) {
  const found = [schema, ...(schema.anyOf ?? [])].find((each) => each.minimum !== undefined || each.maximum !== undefined);
  if (!found) return "";
  return [found.minimum !== undefined ? `from ${found.minimum}` : "", found.maximum !== undefined ? `up to ${found.maximum}` : ""].join(" ").trim();
}

function table(title, schema, all) {
  const { name, properties = {}, required = [] } = named(schema, all);
  if (!Object.keys(properties).length) return null;
  const rows = Object.entries(properties).map(([field, own]) => element("tr", {},
    element("td", {}, element("code", { text: field })),
    element("td", { text: kind(own, all) }),
    element("td", { text: [required.includes(field) ? "required" : "", own.default !== undefined && own.default !== null ? `default ${JSON.stringify(own.default)}` : "", range(own), own.description ?? ""].filter(Boolean).join("; ") })));
  return element("details", {}, element("summary", { text: `${title}${name ? `: ${name}` : ""}` }),
    element("div", { class: "table-box", tabIndex: 0, role: "group", "aria-label": title }, element("table", {}, element("tbody", {}, ...rows))));
}

function route(method, path, said, all) {
  const body = said.requestBody?.content?.["application/json"]?.schema;
  const answer = said.responses?.["200"]?.content?.["application/json"]?.schema;
  return element("article", { class: "route" },
    element("h3", {}, element("span", { class: "method", text: method.toUpperCase() }), " ", element("code", { text: path })),
    element("p", { text: (said.description ?? said.summary ?? "").replaceAll("``", "") }),
    body && table("Takes", body, all), answer && table("Gives", answer, all));
}

async function load() {
  try {
    const { info, paths, components } = await get("openapi.json");
    const all = components?.schemas ?? {}, groups = new Map();
    for (const [path, methods] of Object.entries(paths)) {
      for (const [method, said] of Object.entries(methods)) {
        const tag = said.tags?.[0] ?? "other";
        groups.set(tag, [...(groups.get(tag) ?? []), route(method, path, said, all)]);
      }
    }
    part("about").textContent = `version ${info.version} · ${Object.keys(paths).length} paths`;
    part("routes").replaceChildren(...[...groups].map(([tag, routes]) => element("section", {}, element("h2", { text: tag }), ...routes)));
  } catch (error) {
    part("about").textContent = "not connected";
    part("trouble").hidden = false;
    part("trouble").textContent = error.message;
  }
}

load();
