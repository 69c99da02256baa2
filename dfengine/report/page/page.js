// The page: its controls, its address, and the panes drawn accordingly.

const $ = (id) => document.getElementById(id);

const state = {
  step: null, // of the first pane's image, counted from 0; at first the one that the image names, or the address
  opacity: data.opacity,
  background: "preview",
  range: "step",
  values: "raw",
  smooth: true,
  follow: "step",
  pointer: null, // position in [0, 1)² that every pane marks
  point(pointer) {
    state.pointer = pointer;
    visible().forEach((pane) => pane.point(pointer));
  },
  announce: (text) => { $("announcement").textContent = text; },
};

const panes = ["first", "second"].map((name) => new Pane(state, `${name} image`, load, goTo));
const visible = () => ($("compare").checked ? panes : panes.slice(0, 1));
const loaded = () => visible().filter((pane) => pane.item);

/** The step that a pane shows: that of the first pane, or its own step nearest in t. */
function stepOf(pane) {
  if (pane === panes[0] || state.follow === "step") return state.step;
  return nearest(pane.item.timesteps, panes[0].item.timesteps[state.step]);
}

function nearest(timesteps, t) {
  const distances = timesteps.map((other) => Math.abs(other - t));
  return distances.indexOf(Math.min(...distances));
}

/** The number of positions of the slider: the longest image's steps where panes share the step. */
function stepCount() {
  const counts = loaded().map((pane) => pane.item.timesteps.length);
  return state.follow === "step" ? Math.max(1, ...counts) : counts[0];
}

/** Go to a step of a pane's image, once one is loaded. */
function goTo(step, pane = panes[0]) {
  if (!panes[0].item) return;
  const first = panes[0].item.timesteps;
  const target = pane === panes[0] || state.follow === "step" ? step : nearest(first, pane.item.timesteps[step]);
  state.step = Math.max(0, Math.min(stepCount() - 1, target));
  draw();
}

/** The current step in words; an image with fewer steps stays at its last one. */
function stepText() {
  const { timesteps } = panes[0].item;
  const step = Math.min(state.step, timesteps.length - 1);
  return `step ${step}, t = ${timesteps[step]}`;
}

let isDrawPending = false;
function draw() {
  if (isDrawPending || !panes[0].item) return;
  isDrawPending = true;
  requestAnimationFrame(() => {
    isDrawPending = false;
    state.step = Math.min(state.step, stepCount() - 1);
    $("step").max = stepCount() - 1;
    $("step").value = state.step;
    $("step").setAttribute("aria-valuetext", stepText());
    $("step-text").textContent = stepText();
    const preview = $("background").options[0];
    preview.disabled = !loaded().some((pane) => pane.item.previews.length);
    $("background").value = preview.disabled ? "image" : state.background;
    loaded().forEach((pane) => pane.draw(stepOf(pane)));
    writeAddress();
  });
}

function drawAll() {
  loaded().forEach((pane) => pane.drawStrip());
  draw();
}

/** Load the image, method and map that panes have been set to. */
async function load(...changed) {
  await Promise.all(changed.map((pane) => pane.load()));
  if (changed.some((pane) => !pane.item)) return; // a later choice is still loading
  drawAll();
}

// The address: whatever differs from the defaults.

let addressTimer = 0;
/** Update the address within half a second: browsers refuse more than 100 changes in 30 seconds. */
function writeAddress() {
  addressTimer ||= setTimeout(() => {
    addressTimer = 0;
    if (location.protocol !== "about:") history.replaceState(null, "", `#${address()}`); // a frame may have no address
  }, 400);
}

function address() {
  const parameters = new URLSearchParams({ step: state.step });
  loaded().forEach((pane, place) => {
    const { item, method, variant } = pane.chosen;
    const prefix = place ? "other-" : "";
    if (item || place) parameters.set(`${prefix}item`, pane.item.number);
    if (method !== pane.item.methods[0]?.name) parameters.set(`${prefix}method`, method);
    if (variant) parameters.set(`${prefix}map`, variant);
  });
  if (state.follow === "t") parameters.set("follow", "t");
  return parameters;
}

async function readAddress(url) {
  const parameters = new URLSearchParams(new URL(url).hash.slice(1));
  panes.forEach((pane, place) => {
    const prefix = place ? "other-" : "";
    const item = data.items.findIndex((one) => String(one.number) === parameters.get(`${prefix}item`));
    pane.chosen = {
      item: item < 0 ? Math.min(place, data.items.length - 1) : item,
      method: parameters.get(`${prefix}method`) ?? "",
      variant: parameters.get(`${prefix}map`) ?? "",
    };
  });
  $("compare").checked = parameters.has("other-item");
  $("follow").value = state.follow = parameters.get("follow") === "t" ? "t" : "step";
  arrangePanes();
  const step = Number(parameters.get("step") ?? NaN);
  if (!Number.isNaN(step)) state.step = Math.max(0, Math.round(step));
  state.step ??= data.items[panes[0].chosen.item].start;
  await load(...visible());
}

// Controls.

function arrangePanes() {
  $("follow-label").hidden = !$("compare").checked;
  $("panes").classList.toggle("two", $("compare").checked);
  $("panes").replaceChildren(...visible().map((pane) => pane.root));
}

$("step").oninput = () => goTo(Number($("step").value));
$("opacity").oninput = () => { state.opacity = Number($("opacity").value) / 100; drawAll(); };
$("smooth").onchange = () => { state.smooth = $("smooth").checked; drawAll(); };
for (const name of ["background", "range", "values", "follow"]) {
  $(name).onchange = () => { state[name] = $(name).value; drawAll(); };
}
$("compare").onchange = () => {
  arrangePanes();
  load(...visible());
};

let playing = 0;
function togglePlay() {
  clearInterval(playing);
  playing = playing ? 0 : setInterval(() => goTo((state.step + 1) % stepCount()), 300);
  $("play").textContent = playing ? "Stop" : "Play";
}
$("play").onclick = togglePlay;

document.onkeydown = (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.closest("input, select, button, summary, pre, canvas, .scroll")) return;
  const target = { ArrowLeft: state.step - 1, ArrowRight: state.step + 1, Home: 0, End: stepCount() - 1 }[event.key];
  if (target === undefined && event.key !== " ") return;
  event.preventDefault();
  if (event.key === " ") togglePlay();
  else goTo(target);
  if (panes[0].item) state.announce(stepText());
};

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light");
const labelTheme = () => { $("theme").textContent = theme() === "dark" ? "Light theme" : "Dark theme"; };
$("theme").onclick = () => {
  document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
  labelTheme();
};
prefersDark.onchange = labelTheme;
labelTheme();

$("opacity").value = 100 * state.opacity;
onhashchange = (event) => readAddress(event.newURL);
await readAddress(location.href);
document.documentElement.dataset.ready = "yes";
