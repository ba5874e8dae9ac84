// The same request as a command and as a program, to take away.

import { address } from "./api.js";
import { element } from "./elements.js";

function shellQuoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

export function curl({ path, body }, needsKey) {
  const lines = [`curl ${body.stream ? "-N " : ""}${shellQuoted(address(path))}`];
  lines.push("  -H 'Content-Type: application/json'");
  if (needsKey) lines.push('  -H "Authorization: Bearer $SOFTPROMPT_KEY"');
  lines.push(`  -d ${shellQuoted(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n");
}

function literal(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([k, v]) => `${literal(k)}: ${literal(v)}`).join(", ")}}`;
  // JSON's escapes are Python's too.
  return typeof value === "string" ? JSON.stringify(value) : String(value);
}

// Messages stand in lines of their own.
function laidOut(value) {
  if (!Array.isArray(value) || !value.every((each) => typeof each === "object")) return literal(value);
  return `[\n${value.map((each) => `        ${literal(each)},\n`).join("")}    ]`;
}

const OPENAI = ["model", "prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"];

export function python({ path, body }, needsKey) {
  const key = needsKey ? 'os.environ["SOFTPROMPT_KEY"]' : '"none needed"';
  const head = needsKey ? ["import os", ""] : [];
  head.push("from openai import OpenAI", "", `client = OpenAI(base_url=${literal(address("v1"))}, api_key=${key})`);
  if (!path.endsWith("completions")) {
    const fields = Object.entries(body).map(([name, value]) => `    ${literal(name)}: ${literal(value)},`);
    return [...head, "body = {", ...fields, "}",
      `reply = client.post(${literal(path.replace(/^v1/, ""))}, body=body, cast_to=object)`,
      'print(reply["data"][0]["probabilities"])'].join("\n");
  }
  const known = Object.entries(body).filter(([name]) => OPENAI.includes(name));
  const ours = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAI.includes(name)));
  const lines = known.map(([name, value]) => `    ${name}=${laidOut(value)},`);
  const chat = "messages" in body;
  if (!chat && !("prompt" in body)) lines.push('    prompt="",');
  if (Object.keys(ours).length) lines.push(`    extra_body=${literal(ours)},`);
  return [...head, `answer = client.${chat ? "chat." : ""}completions.create(`, ...lines, ")", "for part in answer:",
    "    if part.choices:",
    `        print(part.choices[0].${chat ? 'delta.content or ""' : "text"}, end="", flush=True)`].join("\n");
}

export function snippet(title, code) {
  const said = element("span", { class: "quiet", role: "status" });
  const shown = element("pre", { tabIndex: 0, "aria-label": title }, element("code", { text: code }));
  const button = element("button", {
    type: "button", text: "Copy", "aria-label": `Copy ${title}`,
    on: {
      click: async () => {
        said.textContent = (await copied(code, shown)) ? "Copied." : "Selected: copy it with Ctrl+C.";
      },
    },
  });
  return element("section", { class: "snippet" },
    element("div", { class: "snippet-top" }, element("h3", { text: title }), said, button), shown);
}

async function copied(text, shown) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without HTTPS there is no clipboard: select the text, so that a key press copies it.
    const range = document.createRange();
    range.selectNodeContents(shown);
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    return false;
  }
}
