// Curves of the words' relevance over the steps of an image, with a cursor at the current step.

const LEFT = 66, TOP = 12, BOTTOM = 188, HEIGHT = 230;
const DASHES = ["", "7 4", "2 3"];

function svgElement(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

/** Colour and dashes of the n-th line; black follows the text colour, so that it is visible on a dark page. */
function lineStyle(n) {
  const colour = data.lines[n % data.lines.length];
  return { stroke: colour === "#000000" ? "currentColor" : colour, "stroke-dasharray": DASHES[n % DASHES.length] };
}

/** A path through points, with gaps where they are null; a point without neighbours becomes a short stroke. */
function pathThrough(points) {
  return points.map((point, i) => {
    if (!point) return "";
    if (points[i - 1]) return `L${point}`;
    return points[i + 1] ? `M${point}` : `M${point[0] - 6},${point[1]}h12`;
  }).join("");
}

/** Draws an image's curves into `svg`; `goTo(step)` is called when a step is clicked or dragged to. */
function Chart(svg, item, goTo) {
  const count = item.timesteps.length;
  let right = 0;
  const x = (step) => (count > 1 ? LEFT + ((right - LEFT) * step) / (count - 1) : (LEFT + right) / 2);

  const follow = (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const step = Math.round(((point.x - LEFT) / (right - LEFT)) * (count - 1));
    goTo(Math.max(0, Math.min(count - 1, step)));
  };
  svg.onpointerdown = (event) => { svg.setPointerCapture(event.pointerId); follow(event); };
  svg.onpointermove = (event) => { if (event.buttons & 1) follow(event); };

  /** Draw the lines of a set of words on the scale "raw" or "normalised", and the cursor at `current`. */
  this.draw = (scale, words, current) => {
    const width = Math.max(240, Math.round(svg.getBoundingClientRect().width));
    right = width - 8;
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const lines = item.lines.filter((line) => words.has(line.word));
    const values = lines.flatMap((line) => line[scale]).filter((value) => value !== null);
    const [low, high] = scale === "normalised" || !values.length ? [0, 1] : [Math.min(0, ...values), Math.max(...values)];
    const y = (value) => BOTTOM - (BOTTOM - TOP) * normalise(value, [low, high]);
    svg.replaceChildren();
    for (const value of [low, (low + high) / 2, high]) {
      svg.append(svgElement("line", { class: "axis", x1: LEFT, x2: right, y1: y(value), y2: y(value) }));
      svg.append(svgElement("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, format(value)));
    }
    for (const step of new Set([0, (count - 1) >> 1, count - 1])) {
      const anchor = count > 1 && { 0: "start", [count - 1]: "end" }[step] || "middle";
      svg.append(svgElement("text", { x: x(step), y: BOTTOM + 20, "text-anchor": anchor }, `step ${step}`));
      svg.append(svgElement("text", { x: x(step), y: BOTTOM + 37, "text-anchor": anchor }, `t = ${item.timesteps[step]}`));
    }
    svg.append(svgElement("line", { class: "cursor", x1: x(current), x2: x(current), y1: TOP, y2: BOTTOM }));
    for (const line of lines) {
      const points = line[scale].map((value, step) => (value === null ? null : [x(step), y(value)]));
      const path = svgElement("path", { d: pathThrough(points), ...lineStyle(line.style) });
      path.append(svgElement("title", {}, line.word));
      svg.append(path);
    }
    const readings = lines.map((line) => `${line.word} ${line[scale][current] === null ? "not computed" : format(line[scale][current])}`);
    svg.setAttribute("aria-label", `Relevance over ${count} steps; at step ${current}: ${readings.join(", ") || "no word is selected"}. The table below lists all values.`);
  };
}
