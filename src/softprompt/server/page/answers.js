// One panel for each answer: a stream of text or bars of label scores, with what it took.

import { events, post, Trouble } from "./api.js";
import { element, seconds } from "./elements.js";

// Labels that are shown before the rest is folded.
const SHOWN = 10;

export class Answer {
  // `asked` says all of a request: {key, title, note, kind, path, body, tools}.
  constructor(asked) {
    this.asked = asked;
    this.output = element("div", { class: "output", role: "group", "aria-live": "polite", "aria-label": `Answer of ${asked.title}` });
    this.state = element("p", { class: "state", text: "waiting" });
    this.panel = element("article", { class: `panel ${asked.isBase ? "is-base" : ""}`, "data-model": asked.key },
      element("header", {},
        element("h3", { text: asked.title }),
        element("p", { class: "note", text: asked.note })),
      this.output,
      element("footer", {}, this.state, element("div", { class: "tools" }, ...asked.tools)));
  }

  async run(signal) {
    if (this.asked.kind === "none") {
      this.say("not asked");
      return false;
    }
    this.began = performance.now();
    this.output.setAttribute("aria-busy", "true");
    this.panel.classList.add("running");
    try {
      if (this.asked.kind === "labels") await this.score(signal);
      else await this.stream(signal);
      return true;
    } catch (error) {
      if (error.name === "AbortError") this.say(`stopped after ${this.took()}`);
      else this.fail(error);
      return false;
    } finally {
      this.output.setAttribute("aria-busy", "false");
      this.panel.classList.remove("running");
    }
  }

  took() {
    return seconds(performance.now() - this.began);
  }

  say(text) {
    this.state.textContent = text;
  }

  fail(error) {
    this.panel.classList.add("failed");
    const text = error instanceof Trouble ? error.message : `The page failed: ${error.message}`;
    this.output.append(element("p", { class: "error", text }));
    this.say("failed");
  }

  async stream(signal) {
    const written = element("p", { class: "text" });
    this.output.append(written);
    this.say("waiting");
    let first = null, reason = null, usage = null;
    for await (const event of events(this.asked.path, this.asked.body, signal)) {
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      const piece = choice.text ?? choice.delta?.content;
      if (piece) {
        first ??= performance.now() - this.began;
        written.append(piece);
        this.say("writing");
      }
      reason = choice.finish_reason ?? reason;
    }
    if (!written.textContent.trim()) written.replaceChildren(element("span", { class: "quiet", text: "(an empty answer)" }));
    const all = performance.now() - this.began;
    const parts = [first === null ? seconds(all) : `first ${seconds(first)}, all ${seconds(all)}`, ...counts(usage)];
    const why = { length: "cut at the most tokens", time: "out of time" }[reason];
    if (why) parts.push(why);
    this.say(parts.join(" · "));
  }

  async score(signal) {
    this.say("scoring");
    const reply = await post(this.asked.path, this.asked.body, signal);
    const found = reply.data?.[0] ?? reply;
    const shares = Object.entries(found.probabilities ?? {}).sort((a, b) => b[1] - a[1]);
    const bars = shares.map(([label, share]) => bar(label, share, found.scores?.[label]));
    this.output.append(element("ol", { class: "bars" }, ...bars.slice(0, SHOWN)));
    if (bars.length > SHOWN) {
      this.output.append(element("details", { class: "more" }, element("summary", { text: `${bars.length - SHOWN} more labels` }),
        element("ol", { class: "bars rest", start: SHOWN + 1 }, ...bars.slice(SHOWN))));
    }
    const parts = [seconds(performance.now() - this.began), ...counts(reply.usage)];
    if (found.input_cut) parts.push("the input was cut");
    this.say(parts.join(" · "));
  }
}

function counts(usage) {
  if (!usage) return [];
  const virtual = usage.virtual_tokens ? ` + ${usage.virtual_tokens} virtual` : "";
  const out = usage.completion_tokens === undefined ? "" : `, ${usage.completion_tokens} out`;
  return [`${usage.prompt_tokens}${virtual} tokens in${out}`];
}

function bar(label, share, score) {
  const fill = element("span", { class: "fill" });
  fill.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  const percent = `${(share * 100).toFixed(1)} %`;
  const detail = typeof score === "number" ? `log-probability ${score.toFixed(3)}` : undefined;
  return element("li", { title: detail },
    element("span", { class: "label", text: label }),
    element("span", { class: "share", text: percent }),
    element("span", { class: "track", "aria-hidden": "true" }, fill));
}
