// A pane: one image, one of its methods, and one of the method's maps at the current step.

const MIN_SIDE = 384, THUMBNAIL_SIDE = 52, GALLERY_SIDE = 96;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function setOptions(select, options) {
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

/** The block of a layer, such as "down_blocks.0"; empty for a word. */
const blockOf = (name) => name.match(/^(?:\w*blocks\.\d+|mid_block)(?=\.)/)?.[0] ?? "";

const itemLabel = (item) =>
  `${item.number}: ${item.schedule}, seed ${item.seed}, ${item.model}: ${item.prompt.slice(0, 100) || "a given image"}`;

/** `state` belongs to the page; `change(pane)` loads the pane's choice, `goTo(step, pane)` goes to a step of its image. */
function Pane(state, name, change, goTo) {
  const root = document.getElementById("pane").content.firstElementChild.cloneNode(true);
  root.setAttribute("aria-label", name);
  const part = Object.fromEntries([...root.querySelectorAll("[data-part]")].map((element) => [element.dataset.part, element]));
  const canvas = part.canvas;
  let galleryMethod; // whose maps the gallery has buttons for
  let item, source, method, variant, maps, error, pictures, chart, words;
  let step = 0;
  let loads = 0; // counts calls of `load`: of several in quick succession, the last one wins

  Object.assign(this, { root, item: null, chosen: { item: 0, method: "", variant: "" } });

  setOptions(part.item, data.items.map((one, index) => ({ value: index, label: itemLabel(one) })));
  root.querySelector(".item").hidden = data.items.length < 2;
  part.bar.style.background = `linear-gradient(to right, ${Array.from({ length: 17 }, (_, i) => {
    const entry = 3 * Math.min(255, 16 * i);
    return `rgb(${colours.slice(entry, entry + 3).join(" ")})`;
  }).join(", ")})`;

  part.item.onchange = () => { this.chosen = { ...this.chosen, item: Number(part.item.value) }; change(this); };
  part.method.onchange = () => { this.chosen = { ...this.chosen, method: part.method.value, variant: "" }; change(this); };
  part.variant.onchange = () => { this.chosen = { ...this.chosen, variant: part.variant.value }; change(this); };
  part.gallery.ontoggle = () => drawGallery();

  /** Load what is chosen, or the nearest that exists. */
  this.load = async () => {
    const current = ++loads;
    const { chosen } = this;
    const nextItem = data.items[chosen.item] ?? data.items[0];
    const index = data.items.indexOf(nextItem);
    const nextMethod = nextItem.methods.find((one) => one.name === chosen.method) ?? nextItem.methods[0];
    const nextVariant = nextMethod?.variants.find((one) => one.name === chosen.variant) ?? nextMethod?.variants[0];
    const nextSource = sources[index];
    const results = await Promise.all([
      nextSource.pictures(), nextVariant && nextSource.maps(nextVariant), nextVariant?.error && nextSource.maps(nextVariant.error),
    ]);
    if (current !== loads) return;
    const isOther = nextItem !== item;
    [item, source, method, variant] = [this.item = nextItem, nextSource, nextMethod, nextVariant];
    [pictures, maps, error] = results;
    this.chosen = { item: index, method: method?.name ?? "", variant: variant?.name ?? "" };
    if (isOther) describe();
    showChoices();
  };

  /** Draw a step, counted from 0, of what is loaded. */
  this.draw = (newStep) => {
    step = Math.max(0, Math.min(item.timesteps.length - 1, newStep));
    const background = resized(pictureAt(step), canvas.width, canvas.height);
    const isComputed = Boolean(maps?.isComputed(step));
    canvas.getContext("2d").putImageData(isComputed ? withMap(background, maps, step) : background, 0, 0);
    part.blank.hidden = !isComputed || !maps.isBlank(step);
    part.bare.getContext("2d").putImageData(background, 0, 0);
    part["bare-name"].textContent = isPreview() ? "image predicted at this step" : "image";
    part.bare.setAttribute("aria-label", `The ${part["bare-name"].textContent}, without the map`);
    const range = state.range === "all" ? "All steps' maps share one range." : "Each step's map has its own range.";
    part.hot.textContent = maps ? range + (method.hot && ` Hot: ${method.hot}`) : "";
    const ends = isComputed ? colourRange(maps, step) : [NaN, NaN];
    [part.low.textContent, part.high.textContent] = state.values === "raw" ? ends.map(format) : ["0", "1"];
    part.scale.style.visibility = isComputed && part.blank.hidden ? "" : "hidden";
    const subject = isComputed ? `Heat map of ${title()}` : "No map is computed";
    const reading = !isComputed ? "" : maps.isBlank(step) ? "; the same everywhere" : `; highest ${highest()}`;
    canvas.setAttribute("aria-label", `${subject} at step ${step}, t = ${item.timesteps[step]}${reading}. Use the arrow keys to read its cells.`);
    part.python.textContent = python();
    drawChart();
    markStrip();
    drawGallery();
    this.point(state.pointer);
  };

  /** Draw a thumbnail of every step. */
  this.drawStrip = () => {
    part.strip.replaceChildren(...item.timesteps.map((t, at) => {
      const height = Math.round((THUMBNAIL_SIDE * item.size[0]) / item.size[1]);
      const small = thumbnail(resized(pictureAt(at), THUMBNAIL_SIDE, height), maps, at);
      small.title = `step ${at}, t = ${t}${maps?.isBlank(at) ? ": nothing here" : ""}`;
      small.onclick = () => goTo(at, this);
      return small;
    }));
    markStrip();
  };

  /** Mark the cell at a position in [0, 1)², or none for null, and show its value; returns the text shown. */
  this.point = (pointer) => {
    part.cell.hidden = !pointer || !maps;
    part.value.textContent = !maps ? "" : maps.isComputed(step) ? "Point at the map to read its values." : "The map of this step is not computed.";
    if (part.cell.hidden) return "";
    const column = Math.floor(pointer.x * maps.width), row = Math.floor(pointer.y * maps.height);
    const side = (count) => `${100 / count}%`;
    Object.assign(part.cell.style, { width: side(maps.width), height: side(maps.height), left: `${(100 * column) / maps.width}%`, top: `${(100 * row) / maps.height}%` });
    part.value.textContent = `row ${row}, column ${column} of ${maps.height}×${maps.width}: ${valueAt(row, column)}`;
    return part.value.textContent;
  };

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
    const counts = maps ? [maps.width, maps.height] : [1, 1];
    const [x, y] = ["x", "y"].map((axis, i) => {
      const cell = state.pointer ? Math.floor(state.pointer[axis] * counts[i]) + ARROWS[event.key][i] : counts[i] >> 1;
      return (Math.max(0, Math.min(counts[i] - 1, cell)) + 0.5) / counts[i];
    });
    state.point({ x, y });
    state.announce(this.point(state.pointer));
  };

  const title = () => method.label + (variant.name ? `, ${variant.label}` : "");
  const isPreview = () => state.background === "preview" && item.previews.length > 0;
  const pictureAt = (at) => pictures[isPreview() ? at + 1 : 0];
  const colourRange = (which, at) => which.range(at, state.range === "all");
  const withMap = (background, which, at) =>
    overlay(background, which, at, colourRange(which, at), state.opacity, state.smooth);

  function valueAt(row, column) {
    if (!maps.isComputed(step)) return "not computed";
    const index = row * maps.width + column;
    const range = colourRange(maps, step);
    let value = maps.at(step)[index];
    let spread = error ? error.at(step)[index] : NaN;
    if (state.values === "normalised") [value, spread] = [normalise(value, range), spread / (range[1] - range[0])];
    if (!Number.isFinite(value)) return "not finite";
    return format(value) + (Number.isFinite(spread) ? ` ± ${format(spread)}` : "");
  }

  function highest() {
    const index = maps.peak(step);
    return `at row ${Math.floor(index / maps.width)}, column ${index % maps.width} of ${maps.height}×${maps.width}`;
  }

  /** Python code that returns the map that is shown. */
  function python() {
    const [name, open] = item.source ? ["item", `item = dfengine.open(${JSON.stringify(item.source)})[${item.number}]\n`] : ["result", ""];
    if (!method) return `${open}${name}.image`;
    const comment = `   # t = ${item.timesteps[step]}`;
    if (variant.row !== undefined) return `${open}dfengine.result.heatmap(${name}.word_maps[${variant.row}, ${step}], ${name}.image.shape[:2])${comment}`;
    const word = method.form === "words" && variant.name;
    const layer = variant.name && !word ? `, layer=${JSON.stringify(variant.name)}` : "";
    return `${open}${name}.heatmap(${JSON.stringify(word || method.name)}, step=${step}${layer})${comment}`;
  }

  function thumbnail(background, which, at) {
    const small = Object.assign(document.createElement("canvas"), { width: background.width, height: background.height });
    small.getContext("2d").putImageData(which?.isComputed(at) ? withMap(background, which, at) : background, 0, 0);
    return small;
  }

  function markStrip() {
    [...part.strip.children].forEach((small, at) => small.classList.toggle("current", at === step));
    const current = part.strip.children[step];
    if (current) part.strip.scrollLeft = current.offsetLeft - part.strip.offsetLeft - (part.strip.clientWidth - current.clientWidth) / 2;
  }

  /** Draw all of the method's maps at this step, if the gallery is open. */
  async function drawGallery() {
    if (!part.gallery.open || !method) return;
    const [current, shown, at] = [loads, method, step];
    const all = await Promise.all(shown.variants.map((one) => source.maps(one)));
    if (current !== loads || at !== step) return;
    const background = resized(pictureAt(step), GALLERY_SIDE, Math.round((GALLERY_SIDE * item.size[0]) / item.size[1]));
    if (galleryMethod !== shown) {
      galleryMethod = shown;
      part.thumbnails.replaceChildren(...shown.variants.map((one) => {
        const button = Object.assign(document.createElement("button"), { type: "button" });
        button.append(document.createElement("canvas"), one.label.replaceAll(".", ".\u200b"));
        button.onclick = () => { part.variant.value = one.name; part.variant.onchange(); };
        return button;
      }));
    }
    shown.variants.forEach((one, index) => {
      const button = part.thumbnails.children[index];
      button.firstChild.replaceWith(thumbnail(background, all[index], step));
      button.classList.toggle("empty", all[index].isBlank(step));
      button.setAttribute("aria-pressed", one === variant);
      button.classList.toggle("current", one === variant);
    });
  }

  function showChoices() {
    part.item.value = data.items.indexOf(item);
    setOptions(part.method, item.methods.map((one) => ({ value: one.name, label: one.label })));
    part.method.value = method?.name ?? "";
    const hasVariants = (method?.variants.length ?? 0) > 1;
    setOptions(part.variant, hasVariants ? method.variants.map((one) => ({ value: one.name, label: one.label, group: blockOf(one.name) })) : []);
    part.variant.value = variant?.name ?? "";
    root.querySelector(".method").hidden = !method;
    root.querySelector(".variant").hidden = part.gallery.hidden = !hasVariants;
    part["gallery-name"].textContent = hasVariants ? `All ${method.variants.length} maps of ${method.label} at this step` : "";
    part.about.textContent = method?.about ?? "no maps";
  }

  /** Show what depends on the image alone. */
  function describe() {
    const [height, width] = item.size;
    const scale = Math.max(1, Math.ceil(MIN_SIDE / Math.max(height, width)));
    for (const one of [canvas, part.bare]) Object.assign(one, { width: width * scale, height: height * scale });
    root.style.setProperty("--ratio", width / height);
    const count = item.timesteps.length;
    const prompt = item.prompt && item.prompt !== document.querySelector("h1").textContent ? `: “${item.prompt}”` : "";
    part.summary.textContent = `${item.model}, seed ${item.seed}, ${item.schedule}, ${count} step${count > 1 ? "s" : ""}${prompt}`;
    part.facts.replaceChildren(...item.facts.map((fact) => tableRow(fact)));
    part.curves.hidden = part.table.hidden = !item.lines.length;
    if (!item.lines.length) return;
    words = new Set(item.lines.filter((line) => line.shown).map((line) => line.word));
    chart = new Chart(part.chart, item, (at) => goTo(at, pane));
    part.words.replaceChildren(...item.lines.map((line) => {
      const label = document.createElement("label");
      const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: line.shown });
      box.onchange = () => { words[box.checked ? "add" : "delete"](line.word); drawChart(); };
      const swatch = svgElement("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
      swatch.append(svgElement("line", { x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": 3, ...lineStyle(line.style) }));
      label.append(box, swatch, `${line.word} `, document.createElement("span"));
      return label;
    }));
  }

  function drawChart() {
    if (!item.lines.length) return;
    const scale = part.shares.checked ? "normalised" : "raw";
    chart.draw(scale, words, step);
    item.lines.forEach((line, index) => {
      part.words.children[index].lastElementChild.textContent = format(line[scale][step] ?? NaN);
    });
    if (!part.table.open) return;
    part.numbers.replaceChildren(
      tableRow(["step", "t", ...item.lines.map((line) => line.word)], "th"),
      ...item.timesteps.map((t, at) => tableRow([at, t, ...item.lines.map((line) => format(line[scale][at] ?? NaN))])),
    );
  }
  part.table.ontoggle = part.shares.onchange = drawChart;
  new ResizeObserver(() => { if (item) drawChart(); }).observe(part.chart);

  function tableRow(cells, kind = "td") {
    const element = document.createElement("tr");
    element.append(...cells.map((text, column) => {
      const cell = document.createElement(column ? kind : "th");
      cell.textContent = text;
      cell.scope = kind === "th" ? "col" : column ? "" : "row";
      return cell;
    }));
    return element;
  }
  const pane = this;
}
