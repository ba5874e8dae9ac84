// A prompt's card: what it is, how well it does, how it was trained, what its rows are like.

import { curve } from "./curve.js";
import { bytes, drawn, element, number } from "./elements.js";

// Labels that are shown before the rest is folded.
const SHOWN = 10;

// Of a multitask prompt the card is that of one task: its kind, labels and template.
export function cardBody(card, taskName) {
  const own = { ...card, ...card.tasks?.find((task) => task.name === taskName) };
  return [
    facts(own),
    template(own),
    metrics(card.metrics),
    training(card.history),
    rows(card.geometry, card.nearest),
  ].filter(Boolean);
}

function section(title, ...content) {
  return element("section", {}, element("h3", { text: title }), ...content);
}

function pairs(entries) {
  const list = element("dl", { class: "facts" });
  for (const [name, value] of entries) {
    if (value === null || value === undefined || value === "") continue;
    list.append(element("dt", { text: name }), element("dd", {}, value instanceof Node ? value : String(value)));
  }
  return list;
}

function facts(card) {
  return pairs([
    ["Task", card.task ?? card.task_type],
    ["Tasks of the prompt", card.tasks?.map((task) => task.name).join(", ")],
    ["Labels", labels(card.labels)],
    ["Base", card.base_model],
    ["Fingerprint", card.fingerprint],
    ["Virtual tokens", card.virtual_tokens],
    ["Rows × width", card.rows && card.width ? `${card.rows} × ${card.width}` : null],
    ["Parameters", card.parameters?.toLocaleString("en")],
    ["Size", card.bytes ? bytes(card.bytes) : null],
    ["Made", moment(card.created)],
  ]);
}

function labels(names) {
  if (!names || names.length <= SHOWN) return names?.join(", ");
  return element("details", { class: "more" },
    element("summary", { text: `${names.slice(0, SHOWN).join(", ")} and ${names.length - SHOWN} more` }), names.slice(SHOWN).join(", "));
}

function moment(text) {
  const at = new Date(text ?? NaN);
  return Number.isNaN(at.getTime()) ? text : `${at.toISOString().slice(0, 16).replace("T", " ")} UTC`;
}

function template(card) {
  return card.template ? section("Template", element("pre", { tabIndex: 0 }, element("code", { text: card.template }))) : null;
}

function flat(values, prefix = "") {
  return Object.entries(values ?? {}).flatMap(([name, value]) =>
    value && typeof value === "object" && !Array.isArray(value)
      ? flat(value, `${prefix}${name} `)
      : [[prefix + name.replaceAll("_", " "), value]]);
}

function metrics(values) {
  const found = flat(values);
  if (!found.length) return null;
  return section("Metrics", pairs(found.map(([name, value]) => [name, typeof value === "number" ? number(value) : value])));
}

function training(history) {
  const points = (history ?? []).filter((point) => typeof point.loss === "number");
  return points.length > 1 ? section("Training", curve(points)) : null;
}

function rows(geometry, nearest) {
  if (!geometry?.norms?.length) return null;
  const summary = pairs([
    ["Mean norm", number(geometry.norm_mean)],
    ["Smallest, largest", `${number(geometry.norm_min)}, ${number(geometry.norm_max)}`],
    ["Rms over the base's", geometry.rms_ratio === null ? null : number(geometry.rms_ratio)],
    ["Effective rank", number(geometry.effective_rank)],
    ["Mean cosine of pairs", geometry.mean_pairwise_cosine === null ? null : number(geometry.mean_pairwise_cosine)],
  ]);
  const head = element("tr", {}, ...["#", "Norm", nearest ? "Nearest tokens (cosine)" : ""].map((text) => element("th", { scope: "col", text })));
  const body = geometry.norms.map((norm, i) => element("tr", {},
    element("td", { text: String(i + 1) }),
    element("td", {}, normBar(norm, geometry.norm_max), element("span", { text: number(norm, 2) })),
    element("td", {}, ...(nearest?.[i] ?? []).map((near) => element("span", { class: "near" },
      element("code", { text: visible(near.token) }), ` ${near.cosine.toFixed(2)}`)))));
  return section("Rows", summary, element("div", { class: "table-box", tabIndex: 0, role: "group", "aria-label": "Rows of the prompt" },
    element("table", {}, element("thead", {}, head), element("tbody", {}, ...body))));
}

function visible(token) {
  return token.replaceAll(" ", "␣").replaceAll("\n", "⏎") || "∅";
}

function normBar(norm, largest) {
  const width = largest > 0 ? (norm / largest) * 48 : 0;
  return drawn("svg", { viewBox: "0 0 48 6", class: "norm-bar", "aria-hidden": "true" },
    drawn("rect", { width: width.toFixed(1), height: 6, rx: 1.5 }));
}
