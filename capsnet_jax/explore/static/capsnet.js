// A capsule network with dynamic routing, for one image: its forward pass, and the gradient that tells which pixels
// voted. Arrays are flat, with axes in the order of the JAX model: i = primary capsules, d = their pose size,
// o = classes, h = their pose size.

// The length of a pose after each squashing function, and its derivative, from the norm before.
const SQUASHES = {
  none: { length: (norm) => norm, slope: () => 1 },
  squash: { length: (norm) => norm ** 2 / (1 + norm ** 2), slope: (norm) => (2 * norm) / (1 + norm ** 2) ** 2 },
  exponential: { length: (norm) => -Math.expm1(-norm), slope: (norm) => Math.exp(-norm) },
};

const relu = (values) => values.map((value) => Math.max(0, value));
const sigmoid = (value) => 1 / (1 + Math.exp(-value));

export class CapsNet {
  #convolutions; // of the stem, and of the primary capsules
  #transform; // [i d o h]
  #sizes; // i, d, o, h
  #decoder;
  #squash;
  #hasLogits; // whether activations of primary capsules have a channel of their own

  // Weights are one after the other in a buffer, in the order below.
  constructor({ type, image_size, convolutions, transform, decoder, squash, activation }, buffer) {
    const weights = type === "float16" ? Float32Array.from(new Uint16Array(buffer), fromHalf) : new Float32Array(buffer);
    let start = 0;
    const take = (shape) => weights.subarray(start, (start += shape.reduce((size, side) => size * side)));
    let grid = image_size;
    const convolution = ({ shape, stride }) => {
      const layer = new Convolution(grid, shape, stride, take(shape), take(shape.slice(3)));
      grid = layer.grid;
      return layer;
    };
    this.#convolutions = convolutions.map(convolution);
    this.#transform = take(transform);
    this.#sizes = transform;
    grid = [1, 1];
    this.#decoder = decoder.map(convolution);
    this.#squash = SQUASHES[squash];
    this.#hasLogits = activation === "sigmoid";
  }

  // Activations of the primary capsules; class capsules and couplings after each number of routing iterations.
  trace(image, iterations) {
    const { poses, activations } = this.#encode(image);
    return { activations, steps: this.#route(this.#votes(poses), iterations) };
  }

  // How much each pixel contributes to what a class receives, the sum over i of coupling times activation: the gradient
  // of this sum, with couplings as constants, times the pixel; absolute values are added over channels.
  voters(image, iterations, step, label) {
    const [number, size, classes] = this.#sizes;
    const { inputs, raw, poses, activations } = this.#encode(image);
    const { couplings } = this.#route(this.#votes(poses), iterations)[step];
    const gradients = new Float32Array(raw.length);
    const channels = raw.length / number;
    for (let i = 0; i < number; i++) {
      const coupling = couplings[i * classes + label];
      if (this.#hasLogits) {
        gradients[i * channels + size] = coupling * activations[i] * (1 - activations[i]);
      } else {
        const pose = raw.subarray(i * size, (i + 1) * size);
        const norm = Math.hypot(...pose);
        const factor = (coupling * this.#squash.slope(norm)) / (norm || 1);
        gradients.set(pose.map((value) => factor * value), i * size);
      }
    }
    const gradient = this.#convolutions.reduceRight(
      (above, convolution, place) => convolution.backward(inputs[place], above), gradients);
    const depth = image.length / (this.#convolutions[0].size[0] * this.#convolutions[0].size[1]);
    const contributions = new Float32Array(image.length / depth);
    image.forEach((value, place) => (contributions[Math.floor(place / depth)] += Math.abs(value * gradient[place])));
    return contributions;
  }

  // The image of a class, from its pose.
  decode(pose, label) {
    const [, , classes, size] = this.#sizes;
    const capsules = new Float32Array(classes * size);
    capsules.set(pose, label * size);
    const [first, second, last] = this.#decoder;
    return last.forward(relu(second.forward(relu(first.forward(capsules))))).map(sigmoid);
  }

  // What each convolution reads, what the last one returns, and primary capsules.
  #encode(image) {
    const [number, size] = this.#sizes;
    const [primary, ...stem] = [...this.#convolutions].reverse();
    const inputs = [image];
    for (const convolution of stem.reverse()) inputs.push(relu(convolution.forward(inputs.at(-1))));
    const raw = primary.forward(inputs.at(-1));
    const capsules = squashed(raw, number, size, this.#squash);
    if (this.#hasLogits) capsules.activations.forEach((_, i, all) => (all[i] = sigmoid(raw[i * (size + 1) + size])));
    return { inputs, raw, ...capsules };
  }

  #votes(poses) {
    const [, size, classes, classSize] = this.#sizes;
    const row = classes * classSize;
    const votes = new Float32Array((poses.length / size) * row);
    poses.forEach((value, place) => {
      const [to, from] = [Math.floor(place / size) * row, place * row];
      for (let k = 0; k < row; k++) votes[to + k] += value * this.#transform[from + k];
    });
    return votes;
  }

  #route(votes, iterations) {
    const [number, , classes, size] = this.#sizes;
    const logits = new Float32Array(number * classes);
    const steps = [];
    for (let iteration = 1; iteration <= iterations.at(-1); iteration++) {
      const couplings = softmax(logits, classes);
      const sums = new Float64Array(classes * size);
      couplings.forEach((coupling, place) => {
        const to = (place % classes) * size;
        for (let h = 0; h < size; h++) sums[to + h] += coupling * votes[place * size + h];
      });
      const capsules = squashed(sums, classes, size, SQUASHES.squash);
      if (iterations.includes(iteration)) steps.push({ couplings, ...capsules });
      logits.forEach((_, place) => {
        const from = (place % classes) * size;
        for (let h = 0; h < size; h++) logits[place] += votes[place * size + h] * capsules.poses[from + h];
      });
    }
    return steps;
  }
}

// A convolution without padding. Inputs and outputs are [height width channels], kernels [rows columns channels features].
class Convolution {
  constructor(size, shape, stride, kernel, bias) {
    const grid = size.map((side, axis) => Math.floor((side - shape[axis]) / stride) + 1);
    Object.assign(this, { size, shape, stride, kernel, bias, grid });
  }

  forward(inputs) {
    const { kernel, bias } = this;
    const outputs = new Float32Array(this.grid[0] * this.grid[1] * bias.length);
    for (let start = 0; start < outputs.length; start += bias.length) outputs.set(bias, start);
    this.#visit(inputs, (input, weight, output) => {
      const value = inputs[input];
      for (let feature = 0; feature < bias.length; feature++) outputs[output + feature] += value * kernel[weight + feature];
    });
    return outputs;
  }

  // The gradient with respect to inputs that are not zero. Zeros pass none on: they come from ReLU, or are dark pixels.
  backward(inputs, gradients) {
    const { kernel, bias } = this;
    const result = new Float32Array(inputs.length);
    this.#visit(inputs, (input, weight, output) => {
      let sum = 0;
      for (let feature = 0; feature < bias.length; feature++) sum += kernel[weight + feature] * gradients[output + feature];
      result[input] += sum;
    });
    return result;
  }

  // Calls `visit` for each input that is not zero and each output position that reads it, with the place of the input,
  // and the places of the first of its weights and of the first output that they lead to.
  #visit(inputs, visit) {
    const { grid, size, stride, shape: [rows, columns, channels, features] } = this;
    const run = columns * channels; // inputs side by side that one row of the kernel covers
    for (let y = 0; y < grid[0]; y++) {
      for (let x = 0; x < grid[1]; x++) {
        const output = (y * grid[1] + x) * features;
        for (let row = 0; row < rows; row++) {
          const start = ((y * stride + row) * size[1] + x * stride) * channels;
          for (let k = 0; k < run; k++) {
            if (inputs[start + k] !== 0) visit(start + k, (row * run + k) * features, output);
          }
        }
      }
    }
  }
}

// Squashes poses, the first `size` of the values that each capsule has; activations are their lengths.
function squashed(values, number, size, { length }) {
  const [poses, activations] = [new Float32Array(number * size), new Float32Array(number)];
  const all = values.length / number;
  for (let capsule = 0; capsule < number; capsule++) {
    const pose = values.subarray(capsule * all, capsule * all + size);
    const norm = Math.hypot(...pose);
    activations[capsule] = length(norm);
    poses.set(pose.map((value) => value * (activations[capsule] / (norm || 1))), capsule * size);
  }
  return { poses, activations };
}

// Softmax of each row.
function softmax(logits, size) {
  const result = new Float32Array(logits.length);
  for (let start = 0; start < logits.length; start += size) {
    const row = logits.subarray(start, start + size);
    const largest = Math.max(...row);
    const powers = Array.from(row, (logit) => Math.exp(logit - largest));
    const total = powers.reduce((sum, power) => sum + power);
    result.set(powers.map((power) => power / total), start);
  }
  return result;
}

// A finite number from the 16 bits of its half-precision form.
function fromHalf(bits) {
  const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
  const size = exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24;
  return bits >> 15 ? -size : size;
}
