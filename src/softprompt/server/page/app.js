// The page: what is chosen and written becomes requests, one for each answer beside the others.

import { Answer } from "./answers.js";
import { apiKey, setApiKey } from "./api.js";
import { Boxes } from "./boxes.js";
import { cardBody } from "./card.js";
import { Chooser } from "./chooser.js";
import { element, seconds } from "./elements.js";
import { boxesOf, card, classifies, inputOf, listed, rendered, requiredOf } from "./models.js";
import { curl, python, snippet } from "./snippets.js";

const part = (id) => document.getElementById(id);
const boxes = new Boxes(part("fields"));
const chooser = new Chooser(() => drawFields());
let running = null;

function trouble(error) {
  const shown = part("trouble");
  shown.hidden = !error;
  shown.textContent = error ? error.message : "";
}

async function load() {
  try {
    const found = await listed();
    chooser.show(found);
    const parts = [found.base?.id ?? "no base model"];
    if (found.base?.engine) parts.push(`${found.base.engine} engine`);
    parts.push(`${found.prompts.length} ${found.prompts.length === 1 ? "prompt" : "prompts"}`);
    part("about").textContent = parts.join(" · ");
    part("mode").hidden = !found.base?.chat;
    trouble(null);
    chooser.chooseFirst();
  } catch (error) {
    part("about").textContent = "not connected";
    if (error.status === 401) part("key-box").open = true;
    trouble(error);
  }
}

function isChat() {
  return !part("mode").hidden && part("as-chat").checked;
}

function drawFields() {
  const chat = isChat();
  if (chat) boxes.showTurns();
  else boxes.showGroups(groups());
  part("mode-hint").hidden = !chat;
  part("mode-hint").textContent = chatHint();
  for (const id of ["kind-field", "labels-field"]) part(id).hidden = chat;
  if (part("base-hint")) {
    part("base-hint").textContent = `Without a prompt; it gets the ${chat ? "same messages" : "text as the first chosen prompt puts it"}.`;
  }
}

// Which template puts the messages, and for which prompts that is another than in training.
function chatHint() {
  const named = (chat) => chooser.chosen.filter((model) => model.chat === chat).map((model) => model.key).join(", ");
  const said = ["Messages are put as the base model's chat template says."];
  if (named(true)) said.push(`So they were for ${named(true)} in training.`);
  if (named(false)) said.push(`Not so for ${named(false)}: trained on a template of its own, which the Text tab uses.`);
  if (named(null)) said.push(`How ${named(null)} was trained is not recorded.`);
  return said.join(" ");
}

// The chosen prompts by the boxes that they need.
function groups() {
  const found = new Map();
  for (const model of chooser.chosen) {
    const names = boxesOf(model.template), key = names.join("\n"), before = found.get(key) ?? { prompts: [], required: [] };
    const required = [...before.required, ...requiredOf(model.template)];
    found.set(key, { names, required, prompts: [...before.prompts, model.key] });
  }
  return found.size ? [...found.values()] : [{ names: [""], required: [""], prompts: [] }];
}

// Prompts whose boxes are all empty wait; a box that is empty beside others is asked for. Returns who can be asked.
function written() {
  if (isChat()) {
    if (boxes.chatIsBlank()) return boxes.requireMessage();
    return chooser.chosen;
  }
  for (const model of chooser.chosen) {
    const missing = requiredOf(model.template).find((name) => boxes.blank([name]));
    if (missing !== undefined && !boxes.blank(boxesOf(model.template))) {
      return boxes.require(missing, `${model.key} needs ${missing} as well, or none of its fields.`);
    }
  }
  const ready = chooser.chosen.filter((model) => !boxes.blank(boxesOf(model.template)));
  if (ready.length || (!chooser.chosen.length && !boxes.blank([""]))) return ready;
  return boxes.require(groups()[0].required[0], "Write a text.");
}

function optionsLine() {
  const said = [`${part("max-tokens").value} tokens`];
  said.push(Number(part("temperature").value) ? `temperature ${part("temperature").value}` : "greedy");
  part("options-line").textContent = said.join(", ");
}

function generation() {
  const body = { max_tokens: Number(part("max-tokens").value), temperature: Number(part("temperature").value) };
  if (body.temperature && part("top-p").value) body.top_p = Number(part("top-p").value);
  if (body.temperature && part("seed").value) body.seed = Number(part("seed").value);
  if (part("stop-text").value) body.stop = [part("stop-text").value];
  return { ...body, stream: true, stream_options: { include_usage: true } };
}

function ownLabels() {
  return part("labels").value.split(",").map((label) => label.trim()).filter(Boolean);
}

function request(model, input) {
  const head = model.taskName === undefined ? { model: model.id } : { model: model.id, task: model.taskName };
  if (isChat()) {
    return { kind: "text", path: "v1/chat/completions", body: { ...head, messages: boxes.messages, ...generation() } };
  }
  const wanted = part("answer-kind").value;
  const labels = ownLabels();
  const scored = wanted === "labels" || (wanted === "auto" && (classifies(model) || labels.length > 0));
  if (!scored) return { kind: "text", path: "v1/completions", body: { ...head, ...input, ...generation() } };
  const body = input.fields ? { ...head, ...input } : { ...head, input: input.prompt };
  if (labels.length) body.labels = labels;
  return { kind: "labels", path: "v1/classify", body };
}

function tool(text, label, act) {
  return element("button", { type: "button", class: "plain", text, "aria-label": label, on: { click: act } });
}

function requests(ready) {
  const made = chooser.chosen.map((model) => {
    if (!ready.includes(model)) return waiting(model);
    const asked = request(model, inputOf(model.template, boxes.values));
    asked.key = asked.title = model.key;
    asked.note = [model.virtual_tokens ? `${model.virtual_tokens} virtual tokens` : "", isChat() ? "chat" : model.task ?? ""].filter(Boolean).join(" · ");
    asked.tools = [tool("Card", `Card of ${model.key}`, () => showCard(model)), tool("Code", `Code for ${model.key}`, () => showCode(asked))];
    return asked;
  });
  if (chooser.base && (chooser.withBase || !made.length)) made.unshift(baseRequest(chooser.base, ready[0]));
  return made;
}

function waiting(model) {
  const names = requiredOf(model.template).map((name) => name || "a text").join(", ");
  return { kind: "none", key: model.key, title: model.key, note: `waits for ${names}`, tools: [tool("Card", `Card of ${model.key}`, () => showCard(model))] };
}

// The base is asked as the first prompt is: the same text, and the same labels; or the same messages.
function baseRequest(base, first) {
  const asked = request({ ...base, labels: first?.labels }, { prompt: rendered(first?.template, boxes.values) });
  if (asked.kind === "labels") asked.body.labels ??= first?.labels;
  asked.key = base.key;
  asked.title = "Base model";
  asked.note = first && !isChat() ? `no prompt · text as ${first.key} puts it` : "no prompt";
  asked.isBase = true;
  asked.tools = [tool("Code", "Code for the base model", () => showCode(asked))];
  return asked;
}

async function run() {
  if (running || !part("ask").reportValidity()) return;
  const ready = written();
  if (!ready) return;
  running = new AbortController();
  const { signal } = running;
  part("run").disabled = true;
  part("stop").disabled = false;
  trouble(null);
  const began = performance.now();
  try {
    const answers = requests(ready).map((asked) => new Answer(asked));
    const count = answers.filter((answer) => answer.asked.kind !== "none").length;
    part("empty").hidden = true;
    part("answers").replaceChildren(...answers.map((answer) => answer.panel));
    part("progress").textContent = `asking for ${count} ${count === 1 ? "answer" : "answers"}`;
    const good = (await Promise.all(answers.map((answer) => answer.run(signal)))).filter(Boolean).length;
    const took = seconds(performance.now() - began);
    part("progress").textContent = signal.aborted ? "stopped" : `${good} of ${count} answered in ${took}`;
  } finally {
    running = null;
    part("run").disabled = false;
    part("stop").disabled = true;
  }
}

function stop() {
  running?.abort();
}

function openSheet(title, ...content) {
  part("sheet-title").textContent = title;
  part("sheet-body").replaceChildren(...content);
  if (!part("sheet").open) part("sheet").showModal();
}

async function showCard(model) {
  openSheet(model.key, element("p", { class: "quiet", text: "Reading the card…" }));
  let content;
  try {
    content = cardBody(await card(model.id), model.taskName);
  } catch (error) {
    content = [element("p", { class: "error", text: error.message })];
  }
  if (part("sheet").open) openSheet(model.key, ...content);
}

function showCode(asked) {
  const needsKey = apiKey() !== "";
  openSheet(`The same from elsewhere: ${asked.title}`, snippet("curl", curl(asked, needsKey)), snippet("Python", python(asked, needsKey)));
}

part("ask").addEventListener("submit", (event) => { event.preventDefault(); run(); });
part("ask").addEventListener("input", optionsLine);
part("mode").addEventListener("change", drawFields);
part("stop").addEventListener("click", stop);
part("sheet-close").addEventListener("click", () => part("sheet").close());
part("sheet").addEventListener("click", (event) => { if (event.target === part("sheet")) part("sheet").close(); });
part("key").value = apiKey();
part("key").addEventListener("change", () => { setApiKey(part("key").value); load(); });
document.addEventListener("keydown", (event) => {
  if (event.isComposing || part("sheet").open) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); }
  else if (event.key === "Escape" && running) { event.preventDefault(); stop(); }
});
optionsLine();
load();
