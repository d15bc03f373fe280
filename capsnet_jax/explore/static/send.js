// Answers the requests of the page in the browser, as ../explorer.py does on a server.

import { CapsNet } from "./capsnet.js";
import { fromBase64, toBase64 } from "./pixels.js";

const loaded = load().catch((error) => error);

export async function send(path, body) {
  const answers = await loaded;
  if (answers instanceof Error) return reply({ error: answers.message }, 503);
  await new Promise((resolve) => setTimeout(resolve)); // so that the browser first draws the stroke
  return reply(answers[path](body));
}

const reply = (answer, status = 200) => new Response(JSON.stringify(answer), { status });

async function load() {
  const [page, weights] = await Promise.all([read("model.json", "json"), read("weights.bin", "arrayBuffer")]);
  const network = new CapsNet(page.network, weights);
  const named = (name) => page.networks.find((each) => each.name === name);
  return {
    "api/model": () => page.model,
    "api/images": () => page.images,
    "api/network": ({ model }) => named(model),
    "api/route": ({ image, model }) => route(network, pixelsOf(image), named(model)),
    "api/voters": ({ image, model, step, class: label }) => {
      const contributions = network.voters(pixelsOf(image), named(model).iterations, step, label);
      const largest = contributions.reduce((most, value) => Math.max(most, value), 0) || 1;
      return { pixels: encoded(contributions.map((value) => value / largest)) };
    },
    "api/decode": ({ pose, class: label }) => ({ reconstruction: encoded(network.decode(pose, label)) }),
  };
}

async function read(name, kind) {
  const response = await fetch(new URL(name, import.meta.url)).catch(() => null);
  if (!response?.ok) throw new Error(`The file ${name} of this page cannot be loaded. Reload the page to try again.`);
  return response[kind]();
}

const pixelsOf = (image) => Float32Array.from(fromBase64(image), (value) => value / 255);
const encoded = (pixels) => toBase64(Uint8Array.from(pixels, (value) => Math.round(255 * value)));

function route(network, image, { iterations, decoder, pose_size, sources: { grid, groups } }) {
  const { activations, steps } = network.trace(image, iterations);
  const last = steps.at(-1);
  const label = last.activations.indexOf(Math.max(...last.activations));
  const pose = last.poses.subarray(label * pose_size, (label + 1) * pose_size);
  // What classes receive, added up over capsules i of the same place.
  const received = (couplings, number, placeOf) => {
    const classes = couplings.length / activations.length;
    const sums = new Float64Array(number * classes);
    couplings.forEach((coupling, index) => {
      const i = Math.floor(index / classes);
      sums[placeOf(i) * classes + (index % classes)] += activations[i] * coupling;
    });
    return rows(sums, classes);
  };
  return {
    primary: [...activations],
    sources: [...activations],
    steps: steps.map((step) => ({
      activations: [...step.activations],
      poses: rows(step.poses, pose_size),
      by_group: received(step.couplings, groups, (i) => i % groups),
      by_position: received(step.couplings, grid[0] * grid[1], (i) => Math.floor(i / groups)),
    })),
    reconstruction: decoder ? encoded(network.decode(pose, label)) : null,
  };
}

// A flat array as rows of this size.
function rows(values, size) {
  return Array.from({ length: values.length / size }, (_, row) => [...values.subarray(row * size, (row + 1) * size)]);
}
