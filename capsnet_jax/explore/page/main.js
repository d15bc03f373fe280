// The page: what the user does, and what it asks the server.

import { ask, Refused, Unreachable, untilReachable } from "./api.js";
import { Network } from "./network.js";
import { Pad } from "./pad.js";
import { drawPixels, fromBase64, sample, toBase64 } from "./pixels.js";

const MODEL = "api/model";
const PAUSE = 900; // milliseconds of a step in `Play`
const QUIET = 700; // milliseconds without a change before a prediction is announced
const find = (selector) => document.querySelector(selector);
const sliders = ["rotate", "right", "down", "scale", "noise"].map((name) => find(`#${name}`));
const units = { rotate: "°", scale: "×" };

const state = { step: Infinity, view: "group", focus: null, pinned: null, image: null };
let info, pad, networks = [];
let fill = 20 / 28; // share of an image that its drawing takes, as in MNIST

function say(text) {
  find("#message").textContent = text ?? "";
  find("#message").hidden = !text;
}

// Runs a task again after it ends, if it was asked for meanwhile, and reports errors.
function coalesced(task) {
  let [isBusy, isDue] = [false, false];
  return async () => {
    isDue = true;
    if (isBusy) return;
    isBusy = true;
    try {
      while (isDue) {
        isDue = false;
        await task();
      }
    } catch (error) {
      report(error); // not awaited, as it asks for this task again once the server answers
    } finally {
      isBusy = false;
    }
  };
}

let isWaiting = false;
async function report(error) {
  if (!(error instanceof Refused || error instanceof Unreachable)) throw error;
  say(error.message);
  if (!(error instanceof Unreachable) || isWaiting) return;
  isWaiting = true;
  find("#networks").classList.add("stale"); // what is shown may be of an earlier drawing
  const found = await untilReachable(MODEL);
  isWaiting = false;
  find("#networks").classList.remove("stale");
  if (JSON.stringify(found) !== JSON.stringify(info)) location.reload();
  say(null);
  route();
}

const route = coalesced(async () => {
  const settings = Object.fromEntries(sliders.map((slider) => [slider.id, slider.valueAsNumber]));
  settings.fill = find("#fit").checked && pad.kind !== "example" ? fill : null;
  const bytes = sample(pad.canvas, info.image_shape, settings);
  const isEmpty = sample(pad.canvas, info.image_shape, { ...settings, noise: 0 }).every((value) => value < 8);
  find("#invitation").hidden = !isEmpty || pad.kind !== "drawing";
  state.image = isEmpty ? null : toBase64(bytes);
  if (isEmpty) {
    networks.forEach((network) => network.clear());
    announce();
    return;
  }
  networks.forEach((network) => network.wait());
  const start = performance.now();
  for (const network of networks) {
    network.show(await ask("api/route", { model: network.description.name, image: state.image }), bytes);
    network.draw(state);
  }
  const time = Math.round(performance.now() - start);
  find("#time").textContent = `Routed in ${time} ms.`;
  find("#time").dataset.milliseconds = time;
  say(null);
  announce();
  complete();
});

const complete = coalesced(async () => {
  for (const network of networks) await network.complete(state);
});

function redraw() {
  for (const network of networks) network.draw(state);
  for (const button of find("#steps").children) {
    button.setAttribute("aria-pressed", Number(button.dataset.step) === shownStep());
  }
  complete();
}

let quiet;
function announce() {
  clearTimeout(quiet);
  quiet = setTimeout(() => {
    find("#prediction").textContent = networks.map((network) => {
      const name = networks.length > 1 ? `${network.description.name}: ` : "";
      if (network.isEmpty) return `${name}Nothing drawn yet.`;
      return `${name}${network.element.querySelector(".verdict").textContent}.`;
    }).join(" ");
  }, QUIET);
}

const lastStep = () => Math.max(...networks.map((network) => network.description.iterations.length)) - 1;
const shownStep = () => Math.min(state.step, lastStep());

function buildSteps() {
  const longest = networks.map((network) => network.description.iterations).sort((a, b) => b.length - a.length)[0];
  find("#steps").replaceChildren(...longest.map((number, step) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = number;
    button.dataset.step = step;
    button.setAttribute("aria-label", `Iteration ${number}`);
    button.addEventListener("click", () => {
      stop();
      state.step = step === lastStep() ? Infinity : step;
      redraw();
    });
    return button;
  }));
  find("#stepper").hidden = longest.length === 1;
}

let playing = null;
function stop() {
  clearInterval(playing);
  playing = null;
  find("#play").textContent = "Play";
}

function play() {
  if (playing !== null) return stop();
  const last = lastStep();
  state.step = 0;
  redraw();
  find("#play").textContent = "Stop";
  playing = setInterval(() => {
    state.step = state.step + 1 >= last ? Infinity : state.step + 1;
    if (state.step === Infinity) stop();
    redraw();
  }, PAUSE);
}

function add(description) {
  const network = new Network(description, info, {
    onFocus: (index) => {
      state.focus = index;
      redraw();
    },
    onPin: (index) => {
      state.pinned = state.pinned === index ? null : index;
      redraw();
    },
    onPose: complete,
  });
  networks.push(network);
  find("#networks").append(network.element);
  find("#networks").classList.toggle("two", networks.length > 1);
  buildSteps();
  redraw();
}

async function showBeside(name) {
  networks.splice(1).forEach((network) => network.element.remove());
  find("#networks").classList.remove("two");
  buildSteps();
  if (name) {
    say(`Preparing ${name} …`);
    try {
      const description = await ask("api/network", { model: name });
      say(null);
      add(description);
    } catch (error) {
      find("#beside").value = "";
      return report(error);
    }
  }
  redraw();
  route();
}

async function showExamples() {
  const { images, message } = await ask("api/images");
  find("#examples").replaceChildren(...images.map(({ pixels, label }, index) => {
    const button = document.createElement("button");
    const canvas = document.createElement("canvas");
    button.type = "button";
    button.title = label;
    button.setAttribute("aria-label", `Test image ${index + 1}, of class ${label}`);
    const bytes = fromBase64(pixels);
    drawPixels(canvas, bytes, info.image_shape);
    button.append(canvas);
    button.addEventListener("click", () => {
      find("#invert-label").hidden = true;
      pad.showExample(bytes, label);
    });
    return button;
  }));
  if (message) find("#examples").textContent = message;
  const [height, width, channels] = info.image_shape;
  const sides = images.map(({ pixels }) => sideOf(fromBase64(pixels), height, width, channels)).sort((a, b) => a - b);
  if (sides.length > 0) fill = Math.max(0.3, sides[Math.floor(sides.length / 2)] / Math.min(height, width));
}

// The larger side of the box around the bright pixels of an image.
function sideOf(bytes, height, width, channels) {
  let [left, right, top, bottom] = [width, -1, height, -1];
  bytes.forEach((value, place) => {
    if (value < 64) return;
    const [x, y] = [Math.floor(place / channels) % width, Math.floor(place / channels / width)];
    [left, right, top, bottom] = [Math.min(left, x), Math.max(right, x), Math.min(top, y), Math.max(bottom, y)];
  });
  return Math.max(right - left, bottom - top) + 1;
}

async function open(file) {
  if (!file) return;
  try {
    find("#invert").checked = await pad.showFile(file);
    find("#invert-label").hidden = false;
    say(null);
  } catch (error) {
    say(error.message);
  }
}

function listen() {
  pad.addEventListener("change", route);
  find("#clear").addEventListener("click", () => {
    find("#invert-label").hidden = true;
    pad.clear();
  });
  find("#file").addEventListener("change", (event) => {
    open(event.target.files[0]);
    event.target.value = "";
  });
  find("#fit").addEventListener("change", route);
  find("#invert").addEventListener("change", (event) => pad.invert(event.target.checked));
  const label = (slider) => {
    slider.nextElementSibling.textContent = `${slider.value}${units[slider.id] ?? ""}`;
  };
  for (const slider of sliders) {
    label(slider);
    slider.addEventListener("input", () => {
      label(slider);
      route();
    });
  }
  find("#reset").addEventListener("click", () => {
    for (const slider of sliders) {
      slider.value = slider.defaultValue;
      label(slider);
    }
    route();
  });
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      find("#pad").classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") open(event.dataTransfer.files[0]);
    });
  }
  for (const button of document.querySelectorAll("[data-view]")) {
    button.addEventListener("click", () => {
      state.view = button.dataset.view;
      for (const other of document.querySelectorAll("[data-view]")) {
        other.setAttribute("aria-pressed", other === button);
      }
      redraw();
    });
  }
  find("#play").addEventListener("click", play);
  find("#beside").addEventListener("change", (event) => showBeside(event.target.value));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", route);
}

async function start() {
  info = await ask(MODEL);
  const [first] = info.networks;
  const number = first.iterations.length > 1 ? `, ${first.iterations.at(-1)} iterations` : "";
  find("#about").textContent = `${first.name} · routing ${first.routing}${number}`;
  find("#beside").append(new Option("nothing", ""), ...info.names.slice(1).map((name) => new Option(name, name)));
  find("#beside").value = info.networks[1]?.name ?? "";
  find("#fit").checked = info.image_shape[2] !== 3;
  pad = new Pad(info.image_shape);
  info.networks.forEach(add);
  listen();
  route();
  await showExamples();
  for (const { name } of info.networks) await ask("api/network", { model: name }); // compiled while one starts to draw
}

start().catch(report);
