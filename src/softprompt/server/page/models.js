// What the server serves: prompts, their base, and how a text becomes a prompt's input.

import { get } from "./api.js";

const EMBEDDING = "embedding";

// Every prompt as {key, id, ...}; each task of a multitask prompt is a choice of its own, with its own
// template, labels and kind.
export async function listed() {
  const { data, unusable } = await get("v1/models");
  const served = data.filter((each) => each.parent), answering = served.filter((each) => each.task !== EMBEDDING);
  const prompts = answering.flatMap(({ metrics, ...each }) =>
    each.tasks?.length
      ? each.tasks.map(({ name, ...own }) => (
        { ...each, ...own, key: `${each.id} · ${name}`, taskName: name, accuracy: metrics?.[`${name} accuracy`] }))
      : [{ ...each, key: each.id, accuracy: metrics?.accuracy }]);
  const base = data.find((each) => !each.parent);
  const embedding = served.filter((each) => each.task === EMBEDDING)
    .map(({ id }) => ({ id, problem: "gives vectors: ask /v1/embeddings" }));
  return { base: base ? { ...base, key: base.id } : null, prompts, apart: [...(unusable ?? []), ...embedding] };
}

export function card(name) {
  return get(`v1/prompts/${encodeURIComponent(name)}/card`);
}

// As data/template.py has them.
const NAME = String.raw`[\p{L}\p{N}_](?:[^{}"\r\n]*[^{}"\s])?`;
const FIELD = new RegExp(String.raw`\{\{(${NAME})\}\}`, "gu");
const SECTION = new RegExp(String.raw`\{\{([#^])(${NAME})\}\}([^]*?)\{\{/\2\}\}`, "gu");
const PLAIN = "{{input}}";

function sectionsOf(template) {
  return [...(template ?? PLAIN).matchAll(SECTION)].map((match) => match[2]);
}

function fieldsOf(template) {
  return [...new Set([...[...(template ?? PLAIN).matchAll(FIELD)].map((match) => match[1]), ...sectionsOf(template)])];
}

// One field is "the text", whatever a template calls it, so that prompts can share a box.
export function boxesOf(template) {
  const names = fieldsOf(template);
  return names.length > 1 ? names : [""];
}

// The boxes that may not stay empty: what a section has or is decided by may.
export function requiredOf(template) {
  const sections = sectionsOf(template);
  return boxesOf(template).filter((name) => !sections.includes(name));
}

export function rendered(template, values) {
  const single = fieldsOf(template).length <= 1;
  const shown = (template ?? PLAIN).replace(SECTION, (_, sign, name, part) => Boolean(values[name]?.trim()) === (sign === "#") ? part : "");
  return shown.replace(FIELD, (_, name) => values[single ? "" : name] ?? "");
}

export function inputOf(template, values) {
  const names = fieldsOf(template);
  if (names.length <= 1) return { prompt: values[""] ?? "" };
  return { fields: Object.fromEntries(names.map((name) => [name, values[name] ?? ""])) };
}

export function classifies(model) {
  return model.task === "classification" || Boolean(model.labels?.length);
}
