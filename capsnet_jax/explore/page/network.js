// One network: its ribbons, classes, maps of primary capsules, and reconstruction.

import { ask } from "./api.js";
import { colour, drawPixels, fromBase64 } from "./pixels.js";
import { drawRibbons, scaleOf } from "./ribbons.js";

const MOST_CLASSES = 12; // in the diagram; of more, the most active ones
const MOST_SOURCES = 16;
const ROW = 38; // pixels
const MOTION = 400; // milliseconds from step to step
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class Network {
  #result = null; // the answer to the last drawing
  #bytes; // and that drawing
  #shown = null; // what is drawn of ribbons now, which may be between two steps
  #frame = 0;
  #offsets;
  #part;
  #info;
  #classes; // in the diagram
  #decodedFor = null;
  #votedFor = null;

  constructor(description, info, { onFocus, onPin, onPose }) {
    this.description = description;
    this.#info = info;
    this.element = document.querySelector("#network").content.firstElementChild.cloneNode(true);
    this.#part = (selector) => this.element.querySelector(selector);
    this.#offsets = new Array(description.pose_size).fill(0);
    this.#classes = info.classes.map((_, index) => index).slice(0, MOST_CLASSES);
    const { routing, iterations, name, layers, primary } = description;
    const times = iterations.length > 1 ? `${iterations.at(-1)} iterations` : "one step";
    this.#part("h3").textContent = name.startsWith(routing) ? name : `${name} (${routing})`;
    this.#part("h4").textContent =
      `Primary capsules: ${primary.groups} groups of ${primary.grid.join(" × ")}` + (layers > 1 ? `, below ${layers} layers` : "");
    this.element.setAttribute("aria-label", `${name}, routing ${routing}, ${times}`);
    this.#buildRows(onFocus, onPin);
    this.#buildPoses(onPose);
    this.clear();
  }

  // The class that reconstruction and votes are of: the predicted one, unless another one is chosen.
  classFor({ focus, pinned, step }) {
    return focus ?? pinned ?? this.predicted(step)[0];
  }

  predicted(step) {
    const { activations } = this.#step(step);
    const order = activations.map((_, index) => index).sort((a, b) => activations[b] - activations[a]);
    return order.slice(0, this.#info.labels_per_image);
  }

  get isEmpty() {
    return this.#result === null;
  }

  clear() {
    this.#result = this.#shown = this.#decodedFor = this.#votedFor = null;
    this.element.classList.add("empty");
    this.#part(".verdict").textContent = "Nothing drawn yet";
    this.#part(".ribbons").replaceChildren();
    this.#part(".shown").textContent = "Draw, or choose a test image, to see what each class receives.";
    for (const picture of this.element.querySelectorAll("figure canvas")) {
      [picture.height, picture.width] = this.#info.image_shape;
      picture.setAttribute("aria-label", "Nothing drawn yet");
      picture.nextElementSibling.textContent = "";
    }
    this.#showRows(this.#info.classes.map(() => 0), []);
    const { primary } = this.description;
    this.#drawMaps(new Array(primary.groups * primary.grid[0] * primary.grid[1]).fill(0));
    this.#part(".nodes").replaceChildren();
  }

  // Says that an answer is awaited, which takes seconds while the network is being compiled.
  wait() {
    if (this.isEmpty) this.#part(".verdict").textContent = "Routing …";
  }

  show(result, bytes) {
    this.#result = result;
    this.#bytes = bytes;
    this.#shown = this.#decodedFor = this.#votedFor = null;
    this.element.classList.remove("empty");
    this.#drawMaps(result.primary);
  }

  draw(state) {
    if (this.isEmpty) return;
    const { activations } = this.#step(state.step);
    this.#chooseClasses();
    const predicted = this.predicted(state.step);
    const names = this.#info.classes;
    this.#part(".verdict").innerHTML = "<b></b> <span></span>";
    this.#part(".verdict b").textContent = predicted.map((index) => names[index]).join(" ");
    this.#part(".verdict span").textContent =
      `activation ${predicted.map((index) => activations[index].toFixed(2)).join(", ")}`;
    this.#showRows(activations, predicted, state.pinned);
    this.#drawFlow(state);
  }

  // Asks for what depends on the chosen class and pose, if it changed.
  async complete(state) {
    if (this.isEmpty) return;
    const [result, step, name] = [this.#result, this.#stepIndex(state.step), this.description.name];
    const label = this.classFor(state);
    const title = this.#info.classes[label];
    const voted = `${label} ${step}`;
    if (voted !== this.#votedFor) {
      const { pixels } = await ask("api/voters", { model: name, image: state.image, class: label, step });
      if (result !== this.#result) return;
      this.#votedFor = voted;
      drawPixels(this.#part(".seen"), this.#bytes, this.#info.image_shape, fromBase64(pixels));
      this.#caption(".seen", `Pixels that voted for ${title}`);
    }
    const pose = this.#step(state.step).poses[label].map((value, index) => value + this.#offsets[index]);
    const decoded = `${label} ${pose}`;
    if (this.description.decoder && decoded !== this.#decodedFor) {
      const { reconstruction } = await ask("api/decode", { model: name, class: label, pose });
      if (result !== this.#result) return;
      this.#decodedFor = decoded;
      this.#drawReconstruction(reconstruction, title);
    }
  }

  #drawReconstruction(reconstruction, title) {
    drawPixels(this.#part(".reconstruction"), fromBase64(reconstruction), this.#info.image_shape);
    this.#caption(".reconstruction", `Reconstruction of ${title}`);
  }

  #caption(picture, text) {
    this.#part(picture).setAttribute("aria-label", text);
    this.#part(picture).nextElementSibling.textContent = text;
  }

  #stepIndex(step) {
    return Math.min(step, this.description.iterations.length - 1);
  }

  #step(step) {
    return this.#result.steps[this.#stepIndex(step)];
  }

  #buildRows(onFocus, onPin) {
    for (const place of this.#classes.keys()) {
      const row = document.createElement("button");
      row.type = "button";
      row.className = "row";
      row.innerHTML = '<span class="name"></span><span class="bar"><i></i></span><span class="value"></span>';
      row.addEventListener("pointerenter", () => onFocus(this.#classes[place]));
      row.addEventListener("pointerleave", () => onFocus(null));
      row.addEventListener("focus", () => row.matches(":focus-visible") && onFocus(this.#classes[place]));
      row.addEventListener("blur", () => onFocus(null));
      row.addEventListener("click", () => onPin(this.#classes[place]));
      this.#part(".rows").append(row);
    }
    this.#part(".diagram").style.height = `${this.#height}px`;
  }

  #buildPoses(onPose) {
    const fieldset = this.#part(".poses");
    if (!this.description.decoder) {
      this.#part(".decoded").remove();
      fieldset.replaceWith(Object.assign(document.createElement("p"), {
        className: "note", textContent: "This model has no decoder, so there are no reconstructions.",
      }));
      return;
    }
    const inputs = this.#offsets.map((_, index) => {
      const label = document.createElement("label");
      label.innerHTML = '<span></span> <input type="range" min="-0.5" max="0.5" step="0.01" value="0">';
      label.firstChild.textContent = index + 1;
      const input = label.querySelector("input");
      input.setAttribute("aria-label", `Add to dimension ${index + 1} of the pose`);
      input.addEventListener("input", () => {
        this.#offsets[index] = input.valueAsNumber;
        onPose();
      });
      fieldset.querySelector("div").append(label);
      return input;
    });
    fieldset.querySelector("button").addEventListener("click", () => {
      this.#offsets.fill(0);
      for (const input of inputs) input.value = 0;
      onPose();
    });
  }

  get #height() {
    return Math.max(8, this.#classes.length) * ROW;
  }

  #chooseClasses() {
    if (this.#info.classes.length <= MOST_CLASSES) return;
    const { activations } = this.#result.steps.at(-1);
    const order = activations.map((_, index) => index).sort((a, b) => activations[b] - activations[a]);
    this.#classes = order.slice(0, MOST_CLASSES).sort((a, b) => a - b);
  }

  #showRows(activations, predicted, pinned) {
    [...this.#part(".rows").children].forEach((row, place) => {
      const index = this.#classes[place];
      const [name, value] = [this.#info.classes[index], activations[index].toFixed(2)];
      row.classList.toggle("predicted", predicted.includes(index));
      row.setAttribute("aria-pressed", pinned === index);
      row.setAttribute("aria-label", `Class ${name}, activation ${value}`);
      row.querySelector(".name").textContent = name;
      row.querySelector("i").style.width = `${100 * Math.min(1, Math.max(0, activations[index]))}%`;
      row.querySelector(".value").textContent = value;
    });
  }

  #drawMaps(values) {
    const { groups, grid } = this.description.primary;
    const maps = this.#part(".maps");
    maps.setAttribute("aria-label", `Lengths of the primary capsules of ${groups} groups, by position`);
    while (maps.childElementCount < groups) maps.append(document.createElement("canvas"));
    const largest = Math.max(...values, 1e-9);
    [...maps.children].forEach((canvas, group) => {
      drawMap(canvas, grid, (position) => values[position * groups + group] / largest);
    });
  }

  #drawFlow({ step, view, focus, pinned }) {
    const { grid, groups } = this.description.sources;
    const all = this.#result.steps.map((each) => (view === "group" ? each.by_group : each.by_position));
    const totals = all.at(-1).map((row) => row.reduce((sum, value) => sum + value, 0));
    const strongest = totals.map((_, index) => index).sort((a, b) => totals[b] - totals[a]).slice(0, MOST_SOURCES);
    const sources = strongest.sort((a, b) => a - b);
    const height = this.#height;
    const slot = height / sources.length;
    const rowHeight = height / this.#classes.length;
    const steps = all.map((received) => sources.map((source) => this.#classes.map((o) => received[source][o])));
    const isOn = (place) => this.#classes[place] === this.classFor({ step, focus, pinned });
    const geometry = {
      first: steps[0],
      scale: scaleOf(steps, 0.92 * slot, 0.92 * rowHeight),
      sourceCentres: sources.map((_, place) => (place + 0.5) * slot),
      classCentres: this.#classes.map((_, place) => (place + 0.5) * rowHeight),
      height,
      isOn,
    };
    this.#drawNodes(view, sources, slot, totals);
    this.#animate(steps[this.#stepIndex(step)], geometry);
    const word = view === "group" ? "groups" : "positions";
    const many = totals.length > sources.length ? `the ${sources.length} strongest of ${totals.length} ${word}` : word;
    const received = all[this.#stepIndex(step)];
    const whole = received.flat().reduce((sum, value) => sum + value, 0) || 1;
    const shares = this.#classes.map((o) => [o, received.reduce((sum, row) => sum + row[o], 0) / whole]);
    const described = shares.sort((a, b) => b[1] - a[1]).slice(0, 3);
    const text = described.map(([o, share]) => `${this.#info.classes[o]}: ${Math.round(100 * share)} %`).join(", ");
    this.#part(".ribbons").setAttribute("aria-label", `Ribbons from ${many}; classes receive: ${text}`);
    const of = this.description.layers > 1 ? "capsules below the classes" : "primary capsules";
    this.#part(".shown").textContent =
      `From ${many} of ${groups * grid[0] * grid[1]} ${of}. The largest shares that classes receive: ${text}.`;
  }

  #drawNodes(view, sources, slot, totals) {
    const { grid, groups } = this.description.sources;
    const values = this.#result.sources;
    const [largest, most] = [Math.max(...values, 1e-9), Math.max(...totals, 1e-9)];
    const nodes = this.#part(".nodes");
    while (nodes.childElementCount < sources.length) nodes.append(document.createElement("canvas"));
    while (nodes.childElementCount > sources.length) nodes.lastChild.remove();
    [...nodes.children].forEach((canvas, place) => {
      const source = sources[place];
      canvas.style.height = `${Math.min(36, slot - 2)}px`;
      drawMap(canvas, grid, (position) => {
        if (view === "group") return values[position * groups + source] / largest;
        return position === source ? 0.25 + (0.75 * totals[source]) / most : 0;
      });
    });
  }

  #animate(target, geometry) {
    cancelAnimationFrame(this.#frame);
    const from = this.#shown;
    const paint = (received) => {
      this.#shown = received;
      drawRibbons(this.#part(".ribbons"), received, geometry);
    };
    const isSame = from?.length === target.length && from[0].length === target[0].length;
    if (!isSame || calm.matches) return paint(target);
    const start = performance.now();
    const move = (now) => {
      const share = Math.min(1, (now - start) / MOTION);
      const eased = 1 - (1 - share) ** 3;
      paint(target.map((row, i) => row.map((value, o) => from[i][o] + eased * (value - from[i][o]))));
      if (share < 1) this.#frame = requestAnimationFrame(move);
    };
    move(start);
  }
}

// Draws values in [0, 1] on a grid of positions.
function drawMap(canvas, [height, width], valueAt) {
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const [low, high] = [colour("--low"), colour("--high")];
  for (let position = 0; position < height * width; position++) {
    const value = Math.min(1, Math.max(0, valueAt(position)));
    for (let part = 0; part < 3; part++) image.data[4 * position + part] = low[part] + value * (high[part] - low[part]);
    image.data[4 * position + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}
