// The relevance curves of an image: lines over the steps, and where the step that is shown stands among them.

const LEFT = 66, TOP = 12, BOTTOM = 188, HEIGHT = 230;
const DASHES = ["", "7 4", "2 3"];

function drawn(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

/** A word's colour and dashes; black is whatever the text is, so that it shows on a dark page. */
function look(place) {
  const colour = data.lines[place % data.lines.length];
  return { stroke: colour === "#000000" ? "currentColor" : colour, "stroke-dasharray": DASHES[place % DASHES.length] };
}

/** The path through points, with gaps where there is none; a point with no neighbour is a short stroke. */
function through(points) {
  return points.map((point, place) => {
    if (!point) return "";
    if (points[place - 1]) return `L${point}`;
    return points[place + 1] ? `M${point}` : `M${point[0] - 6},${point[1]}h12`;
  }).join("");
}

/** Draw an image's curves into `svg`; `choose(step)` is called when one is clicked or dragged to. */
function Chart(svg, item, choose) {
  const count = item.timesteps.length;
  let right = 0;
  const x = (step) => (count > 1 ? LEFT + ((right - LEFT) * step) / (count - 1) : (LEFT + right) / 2);

  const move = (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const step = Math.round(((point.x - LEFT) / (right - LEFT)) * (count - 1));
    choose(Math.max(0, Math.min(count - 1, step)));
  };
  svg.onpointerdown = (event) => { svg.setPointerCapture(event.pointerId); move(event); };
  svg.onpointermove = (event) => { if (event.buttons & 1) move(event); };

  /** The lines of the words that are shown, raw or normalised, and where a step is among them. */
  this.draw = (scale, words, now) => {
    const width = Math.max(240, Math.round(svg.getBoundingClientRect().width));
    right = width - 8;
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const lines = item.lines.filter((line) => words.has(line.word));
    const values = lines.flatMap((line) => line[scale]).filter((value) => value !== null);
    const [low, high] = scale === "normalised" || !values.length ? [0, 1] : [Math.min(0, ...values), Math.max(...values)];
    const y = (value) => BOTTOM - (BOTTOM - TOP) * normalised(value, [low, high]);
    svg.replaceChildren();
    for (const value of [low, (low + high) / 2, high]) {
      svg.append(drawn("line", { class: "axis", x1: LEFT, x2: right, y1: y(value), y2: y(value) }));
      svg.append(drawn("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, told(value)));
    }
    for (const step of new Set([0, (count - 1) >> 1, count - 1])) {
      const anchor = count > 1 && { 0: "start", [count - 1]: "end" }[step] || "middle";
      svg.append(drawn("text", { x: x(step), y: BOTTOM + 20, "text-anchor": anchor }, `step ${step + 1}`));
      svg.append(drawn("text", { x: x(step), y: BOTTOM + 37, "text-anchor": anchor }, `t = ${item.timesteps[step]}`));
    }
    svg.append(drawn("line", { class: "now", x1: x(now), x2: x(now), y1: TOP, y2: BOTTOM }));
    for (const line of lines) {
      const points = line[scale].map((value, step) => (value === null ? null : [x(step), y(value)]));
      const shape = drawn("path", { d: through(points), ...look(line.look) });
      shape.append(drawn("title", {}, line.word));
      svg.append(shape);
    }
    const here = lines.map((line) => `${line.word} ${line[scale][now] === null ? "not computed" : told(line[scale][now])}`);
    svg.setAttribute("aria-label", `Relevance at each of ${count} steps; at step ${now + 1}: ${here.join(", ") || "no word is drawn"}. The table below has the numbers.`);
  };
}
