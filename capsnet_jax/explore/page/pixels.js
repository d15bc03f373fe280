// Images as bytes in the order height, width, channels, and canvases.

export function fromBase64(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

export function toBase64(bytes) {
  let text = "";
  for (let start = 0; start < bytes.length; start += 4096) {
    text += String.fromCharCode(...bytes.subarray(start, start + 4096));
  }
  return btoa(text);
}

// The three numbers of a colour of the style sheet, written as #rrggbb.
export function colour(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
}

// Draws an image, tinted where `heat`, a byte for each pixel, is large.
export function drawPixels(canvas, bytes, [height, width, channels], heat) {
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const accent = colour("--tint");
  for (let pixel = 0; pixel < width * height; pixel++) {
    const share = heat ? Math.sqrt(heat[pixel] / 255) : 0;
    const values = bytes.subarray(pixel * channels, (pixel + 1) * channels);
    const grey = values.reduce((sum, value) => sum + value, 0) / channels;
    for (let part = 0; part < 3; part++) {
      const value = channels === 3 ? values[part] : grey;
      image.data[4 * pixel + part] = heat ? (1 - share) * 0.6 * value + share * accent[part] : value;
    }
    image.data[4 * pixel + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

// The centre of the bright pixels, and the larger side of the box around them, in pixels of the canvas.
export function extentOf(canvas) {
  const { width, height } = canvas;
  const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  let [left, right, top, bottom, mass, across, down] = [width, -1, height, -1, 0, 0, 0];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const place = 4 * (y * width + x);
      const value = (data[place] + data[place + 1] + data[place + 2]) / 3;
      if (value < 64) continue;
      [left, right, top, bottom] = [Math.min(left, x), Math.max(right, x), Math.min(top, y), Math.max(bottom, y)];
      mass += value;
      across += value * (x + 0.5);
      down += value * (y + 0.5);
    }
  }
  return mass === 0 ? null : { x: across / mass, y: down / mass, side: Math.max(right - left, bottom - top) + 1 };
}

// What the model sees of a drawing, whose canvas has several pixels for each of the model's.
// `fill` is the share of the image that the larger side of the drawing should take, or null to leave it as it is.
export function sample(drawing, [height, width, channels], { rotate, right, down, scale, noise, fill }) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [drawing.width, drawing.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.translate((0.5 + right) * canvas.width, (0.5 + down) * canvas.height);
  context.rotate((rotate * Math.PI) / 180);
  context.scale(scale, scale);
  const extent = fill && extentOf(drawing);
  if (extent) {
    const larger = (fill * Math.min(canvas.width, canvas.height)) / extent.side;
    context.scale(larger, larger);
    context.translate(-extent.x, -extent.y);
  } else {
    context.translate(-canvas.width / 2, -canvas.height / 2);
  }
  context.drawImage(drawing, 0, 0);
  const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
  const times = canvas.width / width;
  const random = normal(1);
  const bytes = new Uint8Array(height * width * channels);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const sums = [0, 0, 0];
      for (let row = y * times; row < (y + 1) * times; row++) {
        for (let column = x * times; column < (x + 1) * times; column++) {
          for (let part = 0; part < 3; part++) sums[part] += data[4 * (row * canvas.width + column) + part];
        }
      }
      const means = sums.map((sum) => sum / times ** 2);
      const luma = 0.299 * means[0] + 0.587 * means[1] + 0.114 * means[2];
      for (let channel = 0; channel < channels; channel++) {
        const value = (channels === 3 ? means[channel] : luma) + 255 * noise * random();
        bytes[(y * width + x) * channels + channel] = Math.round(Math.min(255, Math.max(0, value)));
      }
    }
  }
  return bytes;
}

// Normal random numbers, always the same, so that noise grows smoothly with its slider.
function normal(seed) {
  let state = seed;
  const uniform = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state + 0.5) / 2 ** 32;
  };
  return () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
}
