// The tree of a beam search as a picture: a column a token, the likeliest paths on top.

import { visible } from "./tokens.js";

const SVG = "http://www.w3.org/2000/svg";
const [WIDE, HIGH, LEFT] = [120, 24, 8];

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function path(nodes, n) {
  return n < 0 ? "" : path(nodes, nodes[n].parent) + nodes[n].text;
}

export function drawTree(place, nodes) {
  const depths = Math.max(...nodes.map((node) => node.depth));
  const rows = new Map();
  for (let depth = 1; depth <= depths; depth++) {
    const here = nodes.map((node, n) => ({ ...node, n })).filter((node) => node.depth === depth);
    here.sort((a, b) => b.kept - a.kept || b.logprob - a.logprob);
    here.forEach((node, row) => rows.set(node.n, row));
  }
  const tall = HIGH * (Math.max(...rows.values()) + 1) + 12;
  const picture = element("svg", { width: WIDE * depths + LEFT + 40, height: tall, role: "img" });
  const last = nodes.map((_, n) => n).filter((n) => nodes[n].depth === depths);
  const best = last.reduce((a, b) => (nodes[b].logprob > nodes[a].logprob ? b : a));
  picture.append(element("title", {}, `The likeliest continuation: ${JSON.stringify(path(nodes, best))}`));
  const x = (depth) => LEFT + WIDE * (depth - 1);
  const y = (n) => 18 + HIGH * rows.get(n);
  nodes.forEach((node, n) => {
    if (node.parent < 0) return;
    const [x0, y0, x1, y1] = [x(node.depth) - 34, y(node.parent) - 4, x(node.depth) - 4, y(n) - 4];
    const bend = `M${x0} ${y0}C${x0 + 15} ${y0} ${x1 - 15} ${y1} ${x1} ${y1}`;
    picture.append(element("path", { d: bend, class: node.kept ? "kept" : "" }));
  });
  nodes.forEach((node, n) => {
    const group = element("g", { class: node.kept ? "kept" : "" });
    const short = visible(node.text).slice(0, 8);
    group.append(element("text", { x: x(node.depth), y: y(n) }, `${short} ${node.logprob.toFixed(1)}`));
    group.append(element("title", {}, `${JSON.stringify(path(nodes, n))}: log-probability ${node.logprob.toFixed(3)}`));
    picture.append(group);
  });
  place.replaceChildren(picture);
}
