// The drawing: by mouse, touch, pen or keyboard, or from an image.

import { drawPixels } from "./pixels.js";

const SIDE = 280; // pixels of the canvas along the larger side of the image, about
const LARGEST = 64e6; // bytes of an image file

export class Pad extends EventTarget {
  #canvas = document.querySelector("#drawing");
  #pen = document.querySelector("#pen");
  #context;
  #down = false; // whether the pen of the keyboard is down
  #place; // of the keyboard's pen
  #file = null; // the bitmap of an image file

  constructor([height, width, channels]) {
    super();
    this.shape = [height, width, channels];
    const times = Math.max(1, Math.round(SIDE / Math.max(height, width)));
    [this.#canvas.width, this.#canvas.height] = [width * times, height * times];
    this.#context = this.#canvas.getContext("2d", { willReadFrequently: true });
    this.#context.lineWidth = (Math.max(height, width) < 16 ? 0.13 : 0.085) * Math.min(width, height) * times;
    this.#context.lineCap = this.#context.lineJoin = "round";
    this.#context.strokeStyle = "white";
    this.#place = { x: this.#canvas.width / 2, y: this.#canvas.height / 2 };
    this.clear();
    this.#listen();
  }

  get canvas() {
    return this.#canvas;
  }

  // "drawing", "example" or "file"
  get kind() {
    return this.canvas.dataset.kind;
  }

  clear() {
    this.#start("drawing");
    this.#lift();
    this.#changed();
  }

  showExample(bytes, label) {
    this.#start("example");
    const small = document.createElement("canvas");
    drawPixels(small, bytes, this.shape);
    this.#context.imageSmoothingEnabled = false;
    this.#context.drawImage(small, 0, 0, this.canvas.width, this.canvas.height);
    this.#changed();
  }

  // Fits an image file into the drawing; a large photograph is scaled down here.
  async showFile(file) {
    if (file.size > LARGEST) throw new Error(`${file.name} has more than 64 MB; expected a smaller image.`);
    try {
      this.#file = await createImageBitmap(file);
    } catch {
      throw new Error(`${file.name} is not an image that this browser can read.`);
    }
    const image = this.#drawFile(false);
    const isLight = this.shape[2] !== 3 && borderOf(image) > 127; // ink on paper
    if (isLight) this.#drawFile(true);
    return isLight;
  }

  invert(isInverted) {
    if (this.kind === "file") this.#drawFile(isInverted);
  }

  #drawFile(isInverted) {
    this.#start("file");
    const { width, height } = this.canvas;
    const scale = Math.min(width / this.#file.width, height / this.#file.height);
    const [across, down] = [this.#file.width, this.#file.height].map((side) => Math.max(1, Math.round(scale * side)));
    const [left, top] = [Math.floor((width - across) / 2), Math.floor((height - down) / 2)];
    this.#context.imageSmoothingEnabled = true;
    this.#context.imageSmoothingQuality = "high";
    this.#context.drawImage(this.#file, left, top, across, down);
    const image = this.#context.getImageData(left, top, across, down);
    if (isInverted) {
      for (let place = 0; place < image.data.length; place++) {
        if (place % 4 !== 3) image.data[place] = 255 - image.data[place];
      }
      this.#context.putImageData(image, left, top);
    }
    this.#changed();
    return image;
  }

  #start(kind) {
    this.canvas.dataset.kind = kind;
    this.#context.fillStyle = "black";
    this.#context.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }

  #stroke(from, to) {
    this.#context.beginPath();
    this.#context.moveTo(from.x, from.y);
    this.#context.lineTo(to.x, to.y);
    this.#context.stroke();
    this.#changed();
  }

  #listen() {
    let last = null;
    const placeOf = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return {
        x: ((event.clientX - box.left) / box.width) * this.canvas.width,
        y: ((event.clientY - box.top) / box.height) * this.canvas.height,
      };
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.canvas.setPointerCapture(event.pointerId);
      last = placeOf(event);
      this.#stroke(last, last);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      for (const part of [...(event.getCoalescedEvents?.() ?? []), event]) {
        const place = placeOf(part);
        this.#stroke(last, place);
        last = place;
      }
    });
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => (last = null));
    this.canvas.addEventListener("keydown", (event) => this.#press(event));
    this.canvas.addEventListener("focus", () => this.#showPen());
    this.canvas.addEventListener("blur", () => this.#lift());
  }

  #press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const length = (this.canvas.height / 28) * (event.shiftKey ? 4 : 1);
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in moves) {
      const [across, down] = moves[event.key];
      const place = {
        x: Math.min(this.canvas.width, Math.max(0, this.#place.x + across * length)),
        y: Math.min(this.canvas.height, Math.max(0, this.#place.y + down * length)),
      };
      if (this.#down) this.#stroke(this.#place, place);
      this.#place = place;
    } else if (event.key === " ") {
      if (event.repeat) return event.preventDefault();
      this.#down = !this.#down;
      if (this.#down) this.#stroke(this.#place, this.#place);
    } else if (event.key === "Delete" || event.key === "Backspace") {
      this.clear();
    } else return;
    event.preventDefault();
    this.#showPen();
  }

  #showPen() {
    this.#pen.hidden = !this.canvas.matches(":focus-visible");
    this.#pen.classList.toggle("down", this.#down);
    this.#pen.style.left = `${(100 * this.#place.x) / this.canvas.width}%`;
    this.#pen.style.top = `${(100 * this.#place.y) / this.canvas.height}%`;
  }

  #lift() {
    this.#down = false;
    this.#pen.hidden = true;
  }
}

// Mean brightness of the border of an image.
function borderOf({ data, width, height }) {
  let [sum, number] = [0, 0];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (x > 0 && y > 0 && x < width - 1 && y < height - 1) continue;
      const place = 4 * (y * width + x);
      sum += (data[place] + data[place + 1] + data[place + 2]) / 3;
      number++;
    }
  }
  return sum / number;
}
