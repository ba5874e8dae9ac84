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

  // A group of boxes for each set of fields, {names, required, prompts}: the first to write in, the others to unfold. A field
  // without a name is "the text".
  showGroups(groups) {
    const folded = groups.length > 1;
    let count = 0;
    this.show(groups.map(({ names, required, prompts }, i) => ({
      names: names.map((name) => name || "Text").join(", "), prompts: folded ? prompts : null, open: i === 0,
      boxes: names.map((name) => ({
        name, id: count++ ? `text-${count - 1}` : "text", label: name || "Text", rows: names.length > 1 ? 2 : 3,
        placeholder: !name ? "Write what the prompts should answer" : required.includes(name) ? "" : "May stay empty",
      })),
    })));
  }

  showTurns() {
    this.show([{ names: "", prompts: null, open: true, boxes: [
      { name: SYSTEM, id: "system", label: "System", rows: 1, placeholder: "How to answer; may stay empty" },
      { name: USER, id: "text", label: "Message", rows: 3, placeholder: "Write to the prompts" },
    ] }]);
  }

  get messages() {
    const system = (this.texts[SYSTEM] ?? "").trim();
    const asked = { role: "user", content: this.texts[USER] ?? "" };
    return system ? [{ role: "system", content: system }, asked] : [asked];
  }

  // Whether none of some fields is written.
  blank(names) {
    return names.every((name) => !(this.texts[name] ?? "").trim());
  }

  chatIsBlank() {
    return this.blank([USER]);
  }

  // Asks the writer for a box, with the reason; unfolds the group that it is in.
  require(name, why) {
    const box = [...this.holder.querySelectorAll("textarea")].find((each) => each.dataset.field === name)
      ?? this.holder.querySelector("#text");
    const group = box.closest("details");
    if (group) group.open = true;
    box.setCustomValidity(why);
    box.reportValidity();
  }

  requireMessage() {
    this.require(USER, "Write a message.");
  }

  show(groups) {
    const layout = JSON.stringify(groups.map(({ names, prompts }) => [names, prompts]));
    if (this.layout === layout) return;
    const open = new Set([...this.holder.querySelectorAll("details[open]")].map((each) => each.dataset.names));
    this.layout = layout;
    this.holder.replaceChildren(...groups.flatMap((group) => {
      const boxes = group.boxes.map((each) => this.field(each));
      if (!group.prompts) return boxes;
      const made = element("details", { class: "group", open: group.open || open.has(group.names) },
        element("summary", {}, element("span", { class: "group-names", text: group.names }),
          element("span", { class: "quiet", text: ` for ${group.prompts.join(", ")}` })), ...boxes);
      made.dataset.names = group.names;
      return [made];
    }));
  }

  field({ name, id, label, rows, placeholder }) {
    const box = element("textarea", {
      id, rows, placeholder, value: this.texts[name] ?? "", spellcheck: false,
      on: { input: () => { this.texts[name] = box.value; this.mirror(box); } },
    });
    box.dataset.field = name;
    return element("div", { class: "field" }, element("label", { htmlFor: id, text: label }), box);
  }

  // A field of two groups has one text; and no complaint outlives a change.
  mirror(box) {
    for (const each of this.holder.querySelectorAll("textarea")) {
      each.setCustomValidity("");
      if (each !== box && each.dataset.field === box.dataset.field) each.value = box.value;
    }
  }
}
