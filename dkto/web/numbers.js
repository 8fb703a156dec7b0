// Numbers without a network: weights off the wire, random numbers, the sampler's schedule, AdamW, a LoRA as a file.

const sizeOf = (tensor) => tensor.shape.reduce((a, b) => a * b, 1);

function halfToSingle() {
  const table = new Float32Array(65536);
  for (let h = 0; h < 65536; h++) {
    const sign = h >> 15 ? -1 : 1, exponent = (h >> 10) & 31, rest = h & 1023;
    table[h] = sign * (exponent === 0 ? rest * 2 ** -24 : exponent === 31 ? (rest ? NaN : Infinity) : (1 + rest / 1024) * 2 ** (exponent - 15));
  }
  return table;
}

// The blob of dkto.web.blob: all low bytes, then all high ones; transposes are made from what they transpose.
function unpackWeights(buffer, tensors) {
  const bytes = new Uint8Array(buffer), half = bytes.length / 2, single = halfToSingle();
  const last = tensors[tensors.length - 1], all = new Float32Array(last.offset + sizeOf(last));
  let at = 0;
  for (const tensor of tensors) {
    const out = all.subarray(tensor.offset, tensor.offset + sizeOf(tensor));
    if (tensor.transposed === undefined) {
      for (let i = 0; i < out.length; i++, at++) out[i] = single[bytes[at] | (bytes[half + at] << 8)];
      continue;
    }
    const [rows, columns] = tensor.shape;
    for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) out[i * columns + j] = all[tensor.transposed + j * rows + i];
  }
  if (at !== half) throw new Error(`the weights hold ${half} numbers, expected ${at}: the file is not whole, reload the page`);
  return all;
}

// mulberry32 and Box-Muller: the page's own numbers, equal on every machine
function random(seed) {
  let state = seed >>> 0;
  const next = () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  next.normal = (count) => Float32Array.from({ length: count }, () => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next()));
  next.below = (count) => Math.floor(next() * count);
  next.shuffle = (list) => {
    const out = [...list];
    for (let i = out.length - 1; i > 0; i--) {
      const j = next.below(i + 1);
      [out[i], out[j]] = [out[j], out[i]];
    }
    return out;
  };
  return next;
}

// Cumulative products of 1 - beta of Stable Diffusion's scaled-linear schedule.
function cumulativeAlphas({ beta_start, beta_end, num_train_timesteps }) {
  const [low, high] = [Math.sqrt(beta_start), Math.sqrt(beta_end)], found = new Float64Array(num_train_timesteps);
  let product = 1;
  for (let i = 0; i < found.length; i++) found[i] = product *= 1 - (low + ((high - low) * i) / (found.length - 1)) ** 2;
  return found;
}

// DPM-Solver++ (2M, midpoint), with leading timesteps as diffusers takes them over from DDIM's settings; the last sigma is 0.
function solver(steps, cumulative) {
  const ratio = Math.floor(cumulative.length / (steps + 1));
  const timesteps = Array.from({ length: steps }, (_, i) => (steps - i) * ratio + 1);
  const sigmas = [...timesteps.map((t) => Math.sqrt((1 - cumulative[t]) / cumulative[t])), 0];
  const split = (sigma) => { const alpha = 1 / Math.sqrt(sigma * sigma + 1); return [alpha, sigma * alpha]; };
  const lambda = (sigma) => { const [alpha, rest] = split(sigma); return Math.log(alpha) - Math.log(rest); };
  let before = null;
  function step(i, x, noise) { // changes x
    const [alpha, rest] = split(sigmas[i]), [nextAlpha, nextRest] = split(sigmas[i + 1]), clean = new Float32Array(x.length);
    for (let k = 0; k < x.length; k++) clean[k] = (x[k] - rest * noise[k]) / alpha;
    const h = sigmas[i + 1] === 0 ? Infinity : lambda(sigmas[i + 1]) - lambda(sigmas[i]);
    const shrink = nextRest / rest, gain = -nextAlpha * (Math.exp(-h) - 1);
    const second = before && i < steps - 1 ? (0.5 * h) / (lambda(sigmas[i]) - lambda(sigmas[i - 1])) : 0;
    for (let k = 0; k < x.length; k++) x[k] = shrink * x[k] + gain * (clean[k] + (second ? second * (clean[k] - before[k]) : 0));
    before = clean;
  }
  return { timesteps, step };
}

// torch's AdamW with its clipping of the gradient's norm to 1; returns that norm. `state` is {m, v, t}.
const adamw = (size) => ({ m: new Float32Array(size), v: new Float32Array(size), t: 0 });
function update(weights, gradient, state, rate, decay = 0.01) {
  state.t += 1;
  let norm = 0;
  for (const g of gradient) norm += g * g;
  norm = Math.sqrt(norm);
  if (!Number.isFinite(norm)) return norm; // as dkto train: the step is left out
  const clip = Math.min(1, 1 / (norm + 1e-6)), first = 1 - 0.9 ** state.t, second = Math.sqrt(1 - 0.999 ** state.t);
  for (let i = 0; i < gradient.length; i++) {
    const g = gradient[i] * clip;
    state.m[i] = 0.9 * state.m[i] + 0.1 * g;
    state.v[i] = 0.999 * state.v[i] + 0.001 * g * g;
    weights[i] = weights[i] * (1 - rate * decay) - (rate / first) * (state.m[i] / (Math.sqrt(state.v[i]) / second + 1e-8));
  }
  return norm;
}

// A LoRA's first values: A normal with deviation 1 / rank, B zero, as peft's "gaussian".
function freshLora(layers, rank, seed) {
  const flat = new Float32Array(layers[layers.length - 1].b + layers[layers.length - 1].rows * rank), next = random(seed);
  for (const layer of layers) flat.set(next.normal(rank * layer.columns).map((x) => x / rank), layer.a);
  return flat;
}

// The flat LoRA as the safetensors file that `load_lora_weights` of diffusers reads.
function loraFile(flat, layers, rank) {
  const header = {}, parts = [];
  let at = 0;
  for (const { name, a, b, rows, columns } of layers) {
    for (const [kind, shape, from] of [["lora_A", [rank, columns], a], ["lora_B", [rows, rank], b]]) {
      const size = shape[0] * shape[1];
      header[`unet.${name}.${kind}.weight`] = { dtype: "F32", shape, data_offsets: [at, at + 4 * size] };
      parts.push(flat.slice(from, from + size));
      at += 4 * size;
    }
  }
  let text = JSON.stringify(header);
  text += " ".repeat((8 - (text.length % 8)) % 8);
  const out = new Uint8Array(8 + text.length + at);
  new DataView(out.buffer).setBigUint64(0, BigInt(text.length), true);
  out.set(new TextEncoder().encode(text), 8);
  let offset = 8 + text.length;
  for (const part of parts) {
    out.set(new Uint8Array(part.buffer), offset);
    offset += part.byteLength;
  }
  return out;
}
