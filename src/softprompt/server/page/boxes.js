// The boxes to write in: the fields of templates, or the turns of a chat.

import { element } from "./elements.js";

// A space keeps them apart from any template's fields.
const SYSTEM = "chat system", USER = "chat user";

export class Boxes {
  constructor(holder) {
    this.holder = holder;
    this.texts = { "": "" };
  }

  // What is written, by field; what was written in boxes that are gone comes back with them.
  get values() {
    return this.texts;
  }

  // One box for each field; the one without a name is "the text".
  showFields(names) {
    this.show(names.map((name, i) => ({
      name, id: i === 0 ? "text" : `text-${i}`, label: name || "Text", rows: names.length > 1 ? 2 : 3, required: true,
      placeholder: name ? "" : "Write what the prompts should answer",
    })));
  }

  showTurns() {
    this.show([
      { name: SYSTEM, id: "system", label: "System", rows: 1, required: false, placeholder: "How to answer; may stay empty" },
      { name: USER, id: "text", label: "Message", rows: 3, required: true, placeholder: "Write to the prompts" },
    ]);
  }

  get messages() {
    const system = (this.texts[SYSTEM] ?? "").trim();
    const asked = { role: "user", content: this.texts[USER] ?? "" };
    return system ? [{ role: "system", content: system }, asked] : [asked];
  }

  show(wanted) {
    const shown = [...this.holder.querySelectorAll("textarea")].map((box) => box.dataset.field);
    if (shown.length && shown.join("\n") === wanted.map((each) => each.name).join("\n")) return;
    this.holder.replaceChildren(...wanted.map((each) => this.field(each)));
  }

  field({ name, id, label, rows, required, placeholder }) {
    const box = element("textarea", {
      id, rows, required, placeholder, value: this.texts[name] ?? "", spellcheck: false,
      on: { input: () => { this.texts[name] = box.value; } },
    });
    box.dataset.field = name;
    return element("div", { class: "field" }, element("label", { htmlFor: id, text: label }), box);
  }
}
