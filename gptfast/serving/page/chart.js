// Curves over steps as a picture; pointing at it, or the arrow keys, reads their values.

const SVG = "http://www.w3.org/2000/svg";
const [WIDE, HIGH, LEFT, RIGHT, TOP, BELOW] = [640, 200, 62, 14, 10, 22];

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Round numbers between two, about `count` of them.
export function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high * (1 + 1e-12); n++) found.push(n * step);
  return found;
}

export function short(value) {
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size !== 0 && size < 0.001) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

// The point of a curve that is nearest to a step.
function nearest(points, step) {
  return points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
}

// A picture in `place`. names: of its curves, in the order in which `draw` takes their points, [step, value] each.
export class Chart {
  #curves = [];
  #at = null; // the step that is read; null: none

  constructor(place, title, names) {
    this.title = title;
    this.names = names;
    const caption = document.createElement("p");
    caption.className = "caption";
    caption.append(title);
    if (names.length > 1) names.forEach((name, n) => caption.append(" ", this.#sign(name, n)));
    this.svg = element("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", tabindex: 0, class: "chart" });
    this.reading = document.createElement("p");
    this.reading.className = "hint reading";
    this.reading.setAttribute("role", "status");
    place.append(caption, this.svg, this.reading);
    this.svg.addEventListener("pointermove", (event) => this.#point(event));
    this.svg.addEventListener("pointerleave", () => this.#read(null));
    this.svg.addEventListener("keydown", (event) => this.#key(event));
  }

  draw(curves) {
    this.#curves = curves;
    const points = curves.flat();
    if (points.length < 2) {
      this.svg.replaceChildren(element("text", { x: LEFT, y: HIGH / 2 }, "No curve yet: it comes with the second record of the log."));
      return;
    }
    const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
    const of = (values) => [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
    const [[x0, x1], [low, high]] = [of(xs), of(ys)];
    const room = high > low ? (high - low) * 0.05 : Math.abs(high) * 0.05 || 1;
    const [y0, y1] = [low - room, high + room];
    this.x = (step) => LEFT + ((WIDE - LEFT - RIGHT) * (step - x0)) / (x1 - x0 || 1);
    this.y = (value) => HIGH - BELOW - ((HIGH - TOP - BELOW) * (value - y0)) / (y1 - y0);
    this.step = (x) => x0 + ((x - LEFT) * (x1 - x0)) / (WIDE - LEFT - RIGHT);
    const parts = [];
    for (const value of ticks(y0, y1, 4)) {
      parts.push(element("path", { d: `M${LEFT} ${this.y(value)}H${WIDE - RIGHT}`, class: "grid" }));
      parts.push(element("text", { x: LEFT - 6, y: this.y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    for (const step of ticks(x0, x1 > x0 ? x1 : x0 + 1, 5).filter((one) => one <= x1 && Number.isInteger(one))) {
      parts.push(element("text", { x: this.x(step), y: HIGH - 5, "text-anchor": "middle" }, short(step)));
    }
    curves.forEach((curve, n) => {
      const path = curve.map(([x, y], i) => `${i ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`).join("");
      parts.push(element("path", { d: path, class: `curve c${n}` }));
      if (curve.length === 1) parts.push(element("circle", { cx: this.x(curve[0][0]), cy: this.y(curve[0][1]), r: 3, class: `dot c${n}` }));
    });
    this.marks = element("g", {});
    this.svg.replaceChildren(...parts, this.marks);
    this.svg.setAttribute("aria-label", `${this.title}: ${this.#told(x1)}. Arrow keys read earlier steps.`);
    this.#read(this.#at);
  }

  #sign(name, n) {
    const sign = document.createElement("span");
    sign.className = `sign c${n}`;
    sign.textContent = name;
    return sign;
  }

  #told(step) {
    const told = this.#curves.map((curve, n) => {
      if (!curve.length) return "";
      const [at, value] = nearest(curve, step);
      return `${this.names[n]} ${short(value)} at step ${at.toLocaleString("en")}`;
    });
    return told.filter(Boolean).join(", ");
  }

  #read(step) {
    this.#at = step;
    this.reading.textContent = step === null ? "" : this.#told(step);
    if (!this.marks) return;
    const drawn = step === null ? [] : this.#curves.map((curve, n) => ({ curve, n })).filter(({ curve }) => curve.length);
    this.marks.replaceChildren(...drawn.map(({ curve, n }) => {
      const [at, value] = nearest(curve, step);
      return element("circle", { cx: this.x(at), cy: this.y(value), r: 4, class: `dot c${n}` });
    }));
  }

  #point(event) {
    if (!this.marks) return;
    const box = this.svg.getBoundingClientRect();
    this.#read(this.step(((event.clientX - box.left) * WIDE) / box.width));
  }

  #key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.#read(null);
    if (!move || !this.marks) return;
    event.preventDefault();
    const steps = [...new Set(this.#curves.flat().map(([x]) => x))].sort((a, b) => a - b);
    const here = this.#at === null ? steps.length : steps.indexOf(nearest(steps.map((x) => [x]), this.#at)[0]);
    this.#read(steps[Math.min(steps.length - 1, Math.max(0, here + move))]);
  }
}
