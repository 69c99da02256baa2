// A pane: one image, one method and one of its maps at the step that is shown.

const LEAST_SIDE = 384, THUMB = 52;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function filled(select, options) {
  const groups = new Map();
  select.replaceChildren();
  for (const { value, label, group } of options) {
    if (group && !groups.has(group)) {
      groups.set(group, Object.assign(document.createElement("optgroup"), { label: group }));
      select.append(groups.get(group));
    }
    (groups.get(group) ?? select).append(new Option(label, value));
  }
}

/** The block that a layer is in, as in "down_blocks.0"; nothing of a word. */
const block = (name) => name.match(/^(?:\w+_blocks\.\d+|mid_block)(?=\.)/)?.[0] ?? "";

const named = (item) => `${item.number}: ${item.schedule}, seed ${item.seed}, ${item.model}: ${item.prompt.slice(0, 100) || "a given image"}`;

/** `state` is the page's; `change(what)` draws it again, `choose(step, pane)` goes to a step of this pane's image. */
function Pane(state, name, change, choose) {
  const root = document.getElementById("pane").content.firstElementChild.cloneNode(true);
  root.setAttribute("aria-label", name);
  const part = Object.fromEntries([...root.querySelectorAll("[data-part]")].map((element) => [element.dataset.part, element]));
  const canvas = part.canvas;
  let pictured; // the method whose maps the gallery has buttons of
  let item, image, method, variant, maps, error, pictures, chart, words;
  let step = 0;
  let turn = 0; // of several choices made quickly, the last one is shown

  Object.assign(this, { root, item: null, chosen: { item: 0, method: "", variant: "" } });

  filled(part.item, data.items.map((one, place) => ({ value: place, label: named(one) })));
  root.querySelector(".item").hidden = data.items.length < 2;
  part.bar.style.background = `linear-gradient(to right, ${Array.from({ length: 17 }, (_, i) => {
    const place = 3 * Math.min(255, 16 * i);
    return `rgb(${colours.slice(place, place + 3).join(" ")})`;
  }).join(", ")})`;

  part.item.onchange = () => { this.chosen = { ...this.chosen, item: Number(part.item.value) }; change(this); };
  part.method.onchange = () => { this.chosen = { ...this.chosen, method: part.method.value, variant: "" }; change(this); };
  part.variant.onchange = () => { this.chosen = { ...this.chosen, variant: part.variant.value }; change(this); };
  part.gallery.ontoggle = () => drawGallery();

  /** Make ready what is chosen, or what comes nearest to it. */
  this.load = async () => {
    const mine = ++turn;
    const { chosen } = this;
    const next = data.items[chosen.item] ?? data.items[0];
    const place = data.items.indexOf(next);
    const way = next.methods.find((one) => one.name === chosen.method) ?? next.methods[0];
    const which = way?.variants.find((one) => one.name === chosen.variant) ?? way?.variants[0];
    const picture = images[place];
    const ready = await Promise.all([
      picture.pictures(), which && picture.maps(which), which?.error && picture.maps(which.error),
    ]);
    if (mine !== turn) return;
    const other = next !== item;
    [item, image, method, variant] = [this.item = next, picture, way, which];
    [pictures, maps, error] = ready;
    this.chosen = { item: place, method: way?.name ?? "", variant: which?.name ?? "" };
    if (other) describe();
    showChoices();
  };

  /** Draw a step, counted from 0, of what is loaded. */
  this.draw = (now) => {
    step = Math.max(0, Math.min(item.timesteps.length - 1, now));
    const under = pixels(beneath(step), canvas.width, canvas.height);
    const there = Boolean(maps?.computed(step));
    canvas.getContext("2d").putImageData(there ? over(under, maps, step) : under, 0, 0);
    const ends = there ? maps.range(step, state.span === "all") : [NaN, NaN];
    [part.low.textContent, part.high.textContent] = state.values === "raw" ? ends.map(told) : ["0", "1"];
    part.scale.style.visibility = there ? "" : "hidden";
    canvas.setAttribute("aria-label", `${there ? `Heat map of ${title()}` : "No map is computed"} at step ${step + 1} of ${item.timesteps.length}, t = ${item.timesteps[step]}${there ? `; highest ${highest()}` : ""}. Arrows read out its cells.`);
    part.python.textContent = python();
    drawChart();
    markStrip();
    drawGallery();
    this.point(state.pointer);
  };

  /** Every step as a small picture. */
  this.drawStrip = () => {
    part.strip.replaceChildren(...item.timesteps.map((t, place) => {
      const small = thumb(pixels(beneath(place), THUMB, Math.round((THUMB * item.size[0]) / item.size[1])), maps, place);
      small.title = `step ${place + 1}, t = ${t}`;
      small.onclick = () => choose(place, this);
      return small;
    }));
    markStrip();
  };

  /** Mark the cell at a place in [0, 1)², or none, and tell its value; returns what it told. */
  this.point = (pointer) => {
    part.cell.hidden = !pointer || !maps;
    part.value.textContent = !maps ? "" : maps.computed(step) ? "Point at the map to read its values." : "The map of this step is not computed.";
    if (part.cell.hidden) return "";
    const column = Math.floor(pointer.x * maps.width), row = Math.floor(pointer.y * maps.height);
    const side = (count) => `${100 / count}%`;
    Object.assign(part.cell.style, { width: side(maps.width), height: side(maps.height), left: `${(100 * column) / maps.width}%`, top: `${(100 * row) / maps.height}%` });
    part.value.textContent = `row ${row}, column ${column} of ${maps.height}×${maps.width}: ${valueAt(row, column)}`;
    return part.value.textContent;
  };

  this.cells = () => (maps ? [maps.width, maps.height] : [1, 1]);

  canvas.onpointermove = canvas.onpointerdown = (event) => {
    const box = canvas.getBoundingClientRect();
    const inside = (at, size) => Math.max(0, Math.min(0.999999, at / size));
    state.point({ x: inside(event.clientX - box.left, box.width), y: inside(event.clientY - box.top, box.height) });
  };
  canvas.onpointerleave = (event) => {
    if (event.pointerType === "mouse" && document.activeElement !== canvas) state.point(null);
  };
  canvas.onblur = () => state.point(null);
  canvas.onkeydown = (event) => {
    if (event.key === "Escape") { state.point(null); return; }
    if (!ARROWS[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    const cells = this.cells();
    const [x, y] = ["x", "y"].map((axis, place) => {
      const cell = state.pointer ? Math.floor(state.pointer[axis] * cells[place]) + ARROWS[event.key][place] : cells[place] >> 1;
      return (Math.max(0, Math.min(cells[place] - 1, cell)) + 0.5) / cells[place];
    });
    state.point({ x, y });
    state.say(this.point(state.pointer));
  };

  const title = () => method.name + (variant.name ? `, ${variant.label}` : "");
  const beneath = (place) => pictures[state.beneath === "preview" && item.previews.length ? place + 1 : 0];
  const over = (under, shown, place) =>
    blended(under, shown, place, shown.range(place, state.span === "all"), state.opacity, state.smooth);

  function valueAt(row, column) {
    if (!maps.computed(step)) return "not computed";
    const at = row * maps.width + column;
    const range = maps.range(step, state.span === "all");
    const spread = error ? error.at(step)[at] : NaN;
    const scaled = state.values === "normalised";
    const value = scaled ? normalised(maps.at(step)[at], range) : maps.at(step)[at];
    const around = scaled ? spread / (range[1] - range[0]) : spread;
    if (!Number.isFinite(value)) return "not finite";
    return told(value) + (Number.isFinite(around) ? ` ± ${told(around)}` : "");
  }

  function highest() {
    const at = maps.peak(step);
    return `at row ${Math.floor(at / maps.width)}, column ${at % maps.width} of ${maps.height}×${maps.width}`;
  }

  function python() {
    const [name, opened] = item.source ? ["item", `item = dfengine.open(${JSON.stringify(item.source)})[${item.number}]\n`] : ["result", ""];
    if (!method) return `${opened}${name}.image`;
    const about = `   # t = ${item.timesteps[step]}`;
    if (variant.row !== undefined) return `${opened}dfengine.result.heatmap(${name}.heat[${variant.row}, ${step}], ${name}.image.shape[:2])${about}`;
    const word = method.kind === "Attention" && variant.name;
    const layer = variant.name && !word ? `, layer=${JSON.stringify(variant.name)}` : "";
    return `${opened}${name}.heatmap(${JSON.stringify(word || method.name)}, step=${step}${layer})${about}`;
  }

  function thumb(under, shown, place) {
    const small = Object.assign(document.createElement("canvas"), { width: under.width, height: under.height });
    small.getContext("2d").putImageData(shown?.computed(place) ? over(under, shown, place) : under, 0, 0);
    return small;
  }

  function markStrip() {
    [...part.strip.children].forEach((small, place) => small.classList.toggle("current", place === step));
    const now = part.strip.children[step];
    if (now) part.strip.scrollLeft = now.offsetLeft - part.strip.offsetLeft - (part.strip.clientWidth - now.clientWidth) / 2;
  }

  /** All of the method's maps at this step, while they are looked at. */
  async function drawGallery() {
    if (!part.gallery.open || !method) return;
    const [mine, shown, place] = [turn, method, step];
    const all = await Promise.all(shown.variants.map((one) => image.maps(one)));
    if (mine !== turn || place !== step) return;
    const under = pixels(beneath(step), 96, Math.round((96 * item.size[0]) / item.size[1]));
    if (pictured !== shown) {
      pictured = shown;
      part.thumbs.replaceChildren(...shown.variants.map((one) => {
        const button = Object.assign(document.createElement("button"), { type: "button" });
        button.append(document.createElement("canvas"), one.label.replaceAll(".", ".\u200b"));
        button.onclick = () => { part.variant.value = one.name; part.variant.onchange(); };
        return button;
      }));
    }
    shown.variants.forEach((one, index) => {
      const button = part.thumbs.children[index];
      button.firstChild.replaceWith(thumb(under, all[index], step));
      button.setAttribute("aria-pressed", one === variant);
      button.classList.toggle("current", one === variant);
    });
  }

  function showChoices() {
    part.item.value = data.items.indexOf(item);
    filled(part.method, item.methods.map((one) => ({ value: one.name, label: one.name })));
    part.method.value = method?.name ?? "";
    const several = (method?.variants.length ?? 0) > 1;
    filled(part.variant, several ? method.variants.map((one) => ({ value: one.name, label: one.label, group: block(one.name) })) : []);
    part.variant.value = variant?.name ?? "";
    root.querySelector(".method").hidden = !method;
    root.querySelector(".variant").hidden = part.gallery.hidden = !several;
    part["gallery-name"].textContent = several ? `All ${method.variants.length} maps of ${method.name} at this step` : "";
    part.about.textContent = method?.about ?? "no maps";
  }

  /** What follows from the image alone. */
  function describe() {
    const [height, width] = item.size;
    const times = Math.max(1, Math.ceil(LEAST_SIDE / Math.max(height, width)));
    Object.assign(canvas, { width: width * times, height: height * times });
    root.style.setProperty("--ratio", width / height);
    const count = item.timesteps.length;
    const prompt = item.prompt && item.prompt !== document.querySelector("h1").textContent ? `: “${item.prompt}”` : "";
    part.summary.textContent = `${item.model}, seed ${item.seed}, ${item.schedule}, ${count} step${count > 1 ? "s" : ""}${prompt}`;
    part.facts.replaceChildren(...item.facts.map(([fact, value]) => row([fact, value])));
    part.curves.hidden = part.table.hidden = !item.lines.length;
    if (!item.lines.length) return;
    words = new Set(item.lines.filter((line) => line.shown).map((line) => line.word));
    chart = new Chart(part.chart, item, (place) => choose(place, pane));
    part.words.replaceChildren(...item.lines.map((line, place) => {
      const label = document.createElement("label");
      const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: line.shown });
      box.onchange = () => { words[box.checked ? "add" : "delete"](line.word); drawChart(); };
      const swatch = drawn("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
      swatch.append(drawn("line", { x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": 3, ...look(line.look) }));
      label.append(box, swatch, `${line.word} `, document.createElement("span"));
      return label;
    }));
  }

  function drawChart() {
    if (!item.lines.length) return;
    const scale = part.shares.checked ? "normalised" : "raw";
    chart.draw(scale, words, step);
    item.lines.forEach((line, place) => {
      part.words.children[place].lastElementChild.textContent = told(line[scale][step] ?? NaN);
    });
    if (!part.table.open) return;
    part.numbers.replaceChildren(
      row(["step", "t", ...item.lines.map((line) => line.word)], "th"),
      ...item.timesteps.map((t, place) => row([place + 1, t, ...item.lines.map((line) => told(line[scale][place] ?? NaN))])),
    );
  }
  part.table.ontoggle = part.shares.onchange = drawChart;
  new ResizeObserver(() => { if (item) drawChart(); }).observe(part.chart);

  function row(cells, kind = "td") {
    const made = document.createElement("tr");
    made.append(...cells.map((text, place) => {
      const cell = document.createElement(place ? kind : "th");
      cell.textContent = text;
      cell.scope = kind === "th" ? "col" : place ? "" : "row";
      return cell;
    }));
    return made;
  }
  const pane = this;
}
