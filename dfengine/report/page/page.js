// The page: what its controls say, what its address says, and the panes drawn accordingly.

const $ = (id) => document.getElementById(id);

const state = {
  step: 0, // of the first pane's image
  opacity: data.opacity,
  beneath: "preview",
  span: "step",
  values: "raw",
  smooth: true,
  follow: "step",
  pointer: null,
  point(pointer) {
    state.pointer = pointer;
    shown().forEach((pane) => pane.point(pointer));
  },
  say: (text) => { $("said").textContent = text; },
};

const panes = ["first", "second"].map((name) => new Pane(state, `${name} image`, changed, choose));
const shown = () => ($("compare").checked ? panes : panes.slice(0, 1));
const ready = () => shown().filter((pane) => pane.item);

/** The step that a pane shows: the first pane's, or the one of its own that comes nearest in t. */
function stepOf(pane) {
  if (pane === panes[0] || state.follow === "step") return state.step;
  return nearest(pane.item.timesteps, panes[0].item.timesteps[state.step]);
}

function nearest(timesteps, t) {
  const apart = timesteps.map((other) => Math.abs(other - t));
  return apart.indexOf(Math.min(...apart));
}

/** How many steps there are to go through: of the longest image, where others follow the step. */
function stepCount() {
  const counts = ready().map((pane) => pane.item.timesteps.length);
  return state.follow === "step" ? Math.max(1, ...counts) : counts[0];
}

/** Go to a step of a pane's image, once there is one. */
function choose(step, pane = panes[0]) {
  if (!panes[0].item) return;
  const first = panes[0].item.timesteps;
  const wanted = pane === panes[0] || state.follow === "step" ? step : nearest(first, pane.item.timesteps[step]);
  state.step = Math.max(0, Math.min(stepCount() - 1, wanted));
  draw();
}

/** The step that is shown, in words; an image with fewer steps stays at its last. */
function stepText() {
  const { timesteps } = panes[0].item;
  const step = Math.min(state.step, timesteps.length - 1);
  return `step ${step + 1} of ${timesteps.length}, t = ${timesteps[step]}`;
}

let waiting = false;
function draw() {
  if (waiting || !panes[0].item) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    state.step = Math.min(state.step, stepCount() - 1);
    $("step").max = stepCount();
    $("step").value = state.step + 1;
    $("step").setAttribute("aria-valuetext", stepText());
    $("step-text").textContent = stepText();
    const preview = $("beneath").options[0];
    preview.disabled = !ready().some((pane) => pane.item.previews.length);
    $("beneath").value = preview.disabled ? "image" : state.beneath;
    ready().forEach((pane) => pane.draw(stepOf(pane)));
    writeAddress();
  });
}

function drawAll() {
  ready().forEach((pane) => pane.drawStrip());
  draw();
}

/** A pane was given another image, method or map. */
async function changed(...which) {
  await Promise.all(which.map((pane) => pane.load()));
  if (which.some((pane) => !pane.item)) return; // a later choice is on its way
  drawAll();
}

// The address: what is not as it is by itself.

let due = 0;
/** The address follows what is shown within half a second: browsers refuse more than 100 changes in 30 seconds. */
function writeAddress() {
  due ||= setTimeout(() => {
    due = 0;
    if (location.protocol !== "about:") history.replaceState(null, "", `#${address()}`); // a frame may have none
  }, 400);
}

function address() {
  const said = new URLSearchParams({ step: state.step + 1 });
  ready().forEach((pane, place) => {
    const { item, method, variant } = pane.chosen;
    const before = place ? "other-" : "";
    if (item || place) said.set(`${before}item`, pane.item.number);
    if (method !== pane.item.methods[0]?.name) said.set(`${before}method`, method);
    if (variant) said.set(`${before}map`, variant);
  });
  if (state.follow === "t") said.set("follow", "t");
  return said;
}

async function readAddress(whole) {
  const said = new URLSearchParams(new URL(whole).hash.slice(1));
  panes.forEach((pane, place) => {
    const before = place ? "other-" : "";
    const item = data.items.findIndex((one) => String(one.number) === said.get(`${before}item`));
    pane.chosen = {
      item: item < 0 ? Math.min(place, data.items.length - 1) : item,
      method: said.get(`${before}method`) ?? "",
      variant: said.get(`${before}map`) ?? "",
    };
  });
  $("compare").checked = said.has("other-item");
  $("follow").value = state.follow = said.get("follow") === "t" ? "t" : "step";
  compare();
  const step = Number(said.get("step") ?? NaN);
  if (!Number.isNaN(step)) state.step = Math.max(0, Math.round(step) - 1);
  await changed(...shown());
}

// Controls.

function compare() {
  $("follow-label").hidden = !$("compare").checked;
  $("panes").classList.toggle("two", $("compare").checked);
  $("panes").replaceChildren(...shown().map((pane) => pane.root));
}

$("step").oninput = () => choose(Number($("step").value) - 1);
$("opacity").oninput = () => { state.opacity = Number($("opacity").value) / 100; drawAll(); };
$("smooth").onchange = () => { state.smooth = $("smooth").checked; drawAll(); };
for (const name of ["beneath", "span", "values", "follow"]) {
  $(name).onchange = () => { state[name] = $(name).value; drawAll(); };
}
$("compare").onchange = () => {
  compare();
  changed(...shown());
};

let playing = 0;
function play() {
  clearInterval(playing);
  playing = playing ? 0 : setInterval(() => choose((state.step + 1) % stepCount()), 300);
  $("play").textContent = playing ? "Stop" : "Play";
}
$("play").onclick = play;

document.onkeydown = (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.closest("input, select, button, summary, pre, canvas, .scroll")) return;
  const to = { ArrowLeft: state.step - 1, ArrowRight: state.step + 1, Home: 0, End: stepCount() - 1 }[event.key];
  if (to === undefined && event.key !== " ") return;
  event.preventDefault();
  if (event.key === " ") play();
  else choose(to);
  if (panes[0].item) state.say(stepText());
};

const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
const nameTheme = () => { $("theme").textContent = theme() === "dark" ? "Light page" : "Dark page"; };
$("theme").onclick = () => {
  document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
  nameTheme();
};
dark.onchange = nameTheme;
nameTheme();

$("opacity").value = 100 * state.opacity;
onhashchange = (event) => readAddress(event.newURL);
await readAddress(location.href);
document.documentElement.dataset.ready = "yes";
