// The relevance curves of an image: lines over the steps, and where the step that is shown stands among them.

const LEFT = 46, RIGHT = 632, TOP = 12, BOTTOM = 188;
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

/** Draw an image's curves into `svg`; `choose(step)` is called when one is clicked or dragged to. */
function Chart(svg, item, choose) {
  const count = item.timesteps.length;
  const x = (step) => (count > 1 ? LEFT + ((RIGHT - LEFT) * step) / (count - 1) : (LEFT + RIGHT) / 2);
  const now = drawn("line", { class: "now", y1: TOP, y2: BOTTOM });

  const move = (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const step = Math.round(((point.x - LEFT) / (RIGHT - LEFT)) * (count - 1));
    choose(Math.max(0, Math.min(count - 1, step)));
  };
  svg.onpointerdown = (event) => { svg.setPointerCapture(event.pointerId); move(event); };
  svg.onpointermove = (event) => { if (event.buttons & 1) move(event); };

  /** The lines of the words that are shown, raw or normalised. */
  this.draw = (scale, words) => {
    const lines = item.lines.filter((line) => words.has(line.word));
    const values = lines.flatMap((line) => line[scale]).filter((value) => value !== null);
    const [low, high] = scale === "normalised" || !values.length ? [0, 1] : [Math.min(0, ...values), Math.max(...values)];
    const y = (value) => BOTTOM - (BOTTOM - TOP) * normalised(value, [low, high]);
    svg.replaceChildren();
    for (const value of [low, (low + high) / 2, high]) {
      svg.append(drawn("line", { class: "axis", x1: LEFT, x2: RIGHT, y1: y(value), y2: y(value) }));
      svg.append(drawn("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, told(value)));
    }
    for (const [step, anchor] of [[0, "start"], [Math.floor((count - 1) / 2), "middle"], [count - 1, "end"]].slice(count > 2 ? 0 : -1)) {
      svg.append(drawn("text", { x: x(step), y: BOTTOM + 20, "text-anchor": anchor }, `step ${step + 1}`));
      svg.append(drawn("text", { x: x(step), y: BOTTOM + 37, "text-anchor": anchor }, `t = ${item.timesteps[step]}`));
    }
    svg.append(now);
    for (const line of lines) {
      const points = line[scale].flatMap((value, step) => (value === null ? [] : [`${x(step)},${y(value)}`]));
      const shape = drawn("polyline", { points: points.join(" "), ...look(item.lines.indexOf(line)) });
      shape.append(drawn("title", {}, line.word));
      svg.append(shape);
    }
    svg.setAttribute("aria-label", `Relevance of ${[...words].join(", ") || "no word"} at each of ${count} steps; the table below has the numbers.`);
  };
  this.at = (step) => {
    now.setAttribute("x1", x(step));
    now.setAttribute("x2", x(step));
  };
}
