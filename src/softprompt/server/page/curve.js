// The training curve as inline SVG: losses over epochs, with their values to hand.

import { drawn, element, number } from "./elements.js";

const WIDTH = 480, HEIGHT = 190, LEFT = 44, RIGHT = 12, TOP = 12, BOTTOM = 28;

export function curve(points) {
  const lines = [{ name: "training loss", mark: "train", values: points.map((point) => [point.epoch, point.loss]) }];
  const validated = points.filter((point) => typeof point.validation?.loss === "number");
  if (validated.length) {
    lines.push({ name: "validation loss", mark: "valid", values: validated.map((point) => [point.epoch, point.validation.loss]) });
  }
  const all = lines.flatMap((line) => line.values);
  const x = scale(all.map(([epoch]) => epoch), LEFT, WIDTH - RIGHT);
  const top = Math.max(...all.map(([, loss]) => loss), 1e-9);
  const y = (loss) => HEIGHT - BOTTOM - (loss / top) * (HEIGHT - BOTTOM - TOP);
  const picture = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "curve", role: "img", "aria-label": described(lines) });
  for (const share of [0, 0.5, 1]) {
    const at = y(top * share);
    picture.append(drawn("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at }),
      drawn("text", { x: LEFT - 8, y: at + 4, "text-anchor": "end", text: number(top * share, 1) }));
  }
  const [first, last] = [points[0].epoch, points.at(-1).epoch];
  picture.append(drawn("text", { x: LEFT, y: HEIGHT - 8, text: `epoch ${first}` }),
    drawn("text", { x: WIDTH - RIGHT, y: HEIGHT - 8, "text-anchor": "end", text: String(last) }));
  for (const { mark, values } of lines) {
    const path = values.map(([epoch, loss]) => `${x(epoch).toFixed(1)},${y(loss).toFixed(1)}`).join(" ");
    picture.append(drawn("polyline", { class: `line ${mark}`, points: path }));
    for (const [epoch, loss] of values) {
      picture.append(drawn("circle", { class: `dot ${mark}`, cx: x(epoch), cy: y(loss), r: 3 },
        drawn("title", { text: `epoch ${epoch}: ${number(loss)}` })));
    }
  }
  return element("figure", {}, picture, element("figcaption", {},
    ...lines.map(({ name, mark, values }) => element("span", { class: `legend ${mark}`, text: `${name} ${number(values.at(-1)[1])}` }))));
}

function scale(values, low, high) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  return (value) => (most > least ? low + ((value - least) / (most - least)) * (high - low) : (low + high) / 2);
}

function described(lines) {
  return lines.map(({ name, values }) => `${name} from ${number(values[0][1])} to ${number(values.at(-1)[1])}`).join("; ");
}
