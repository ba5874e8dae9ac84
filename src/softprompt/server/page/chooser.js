// The list of prompts: search, choose several, and the base beside them; apart, what cannot be chosen and why.

import { element } from "./elements.js";

export class Chooser {
  constructor(onChange) {
    this.byKey = new Map();
    this.rows = new Map();
    this.keys = new Set();
    this.withBase = true;
    this.onChange = onChange;
    this.list = document.getElementById("prompts");
    this.search = document.getElementById("search");
    this.count = document.getElementById("count");
    this.search.addEventListener("input", () => this.filter());
    this.search.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown" || event.key === "Enter") {
        event.preventDefault();
        this.boxes().find((box) => !box.closest("li").hidden)?.focus();
      }
    });
    this.list.addEventListener("keydown", (event) => this.step(event));
  }

  // The chosen prompts, in the order they were chosen.
  get chosen() {
    return [...this.keys].map((key) => this.byKey.get(key));
  }

  boxes() {
    return [...this.list.querySelectorAll("input")];
  }

  show({ base, prompts, apart }) {
    this.base = base;
    this.byKey = new Map(prompts.map((prompt) => [prompt.key, prompt]));
    for (const key of this.keys) if (!this.byKey.has(key)) this.keys.delete(key);
    this.rows = new Map(prompts.map((prompt) => [prompt.key, this.row(prompt)]));
    this.list.replaceChildren();
    this.arrange();
    this.search.disabled = prompts.length === 0;
    const choice = document.getElementById("base-choice");
    choice.replaceChildren();
    if (base) {
      const box = element("input", {
        type: "checkbox", checked: this.withBase,
        on: { change: () => { this.withBase = box.checked; this.onChange(); } },
      });
      choice.append(element("label", { class: "prompt" }, box, element("span", { class: "name", text: "Base model" })));
      choice.append(element("p", { class: "hint", id: "base-hint" }));
    }
    this.showApart(apart);
    this.filter();
  }

  row(prompt) {
    const box = element("input", {
      type: "checkbox", checked: this.keys.has(prompt.key), value: prompt.key,
      on: {
        change: () => {
          if (box.checked) this.keys.add(prompt.key);
          else this.keys.delete(prompt.key);
          this.arrange();
          this.tell();
          this.onChange();
        },
      },
    });
    const score = typeof prompt.accuracy === "number" ? `${(prompt.accuracy * 100).toFixed(1)} %` : null;
    return element("li", {}, element("label", { class: "prompt" }, box, element("span", { class: "name", text: prompt.key }),
      score && element("span", { class: "score", title: "accuracy that is recorded with the prompt", text: score })));
  }

  // Chosen prompts stand first, so that a long list never hides them.
  arrange() {
    const focused = document.activeElement, top = this.list.scrollTop;
    const others = [...this.rows.keys()].filter((key) => !this.keys.has(key));
    this.list.append(...[...this.keys, ...others].map((key) => this.rows.get(key)));
    [...this.rows].forEach(([key, item]) => item.classList.toggle("last-chosen", key === [...this.keys].at(-1)));
    this.list.scrollTop = top;
    if (this.list.contains(focused)) focused.focus({ preventScroll: true });
  }

  showApart(apart) {
    const holder = document.getElementById("apart");
    holder.hidden = !apart.length;
    document.getElementById("apart-count").textContent = `${apart.length} cannot be chosen here`;
    document.getElementById("apart-list").replaceChildren(...apart.flatMap(({ id, problem }) => [
      element("dt", { text: id }), element("dd", { text: problem }),
    ]));
  }

  chooseFirst() {
    const [box] = this.boxes();
    if (box && !this.keys.size) box.click();
    else this.onChange();
  }

  // Arrow keys walk through what the search left.
  step(event) {
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const shown = this.boxes().filter((box) => !box.closest("li").hidden);
    const at = shown.indexOf(event.target) + move;
    if (at < 0) this.search.focus();
    else shown[at]?.focus();
  }

  filter() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const [key, item] of this.rows) {
      item.hidden = !words.every((word) => key.toLowerCase().includes(word));
    }
    this.tell();
  }

  tell() {
    const shown = [...this.list.children].filter((item) => !item.hidden).length;
    const all = this.list.children.length;
    this.list.classList.toggle("long", this.list.scrollHeight > this.list.clientHeight);
    if (!all) this.count.textContent = "No prompts are served.";
    else if (!shown) this.count.textContent = "No name fits.";
    else this.count.textContent = `${this.keys.size} chosen of ${all}${shown < all ? `, ${shown} shown` : ""}`;
  }
}
