// Stable Diffusion and one step of Diffusion-KTO on onnxruntime's sessions. Knows no page: it runs in a worker and in Node.

const SIDE = 16, CHANNELS = 4, LATENT = CHANNELS * SIDE * SIDE, IMAGE = 64;
const pause = () => new Promise((resolve) => setTimeout(resolve)); // lets a message in, such as "stop"

// `about`: the layout, tokenizer and schedule of dkto.web.page; `graphs`: ONNX by name; `weights`: bytes off the wire.
async function makeEngine(ort, about, weights, graphs) {
  const blob = new Uint8Array(unpackWeights(weights, about.tensors).buffer);
  const encode = makeTokenizer(about.tokenizer), length = about.tokenizer.length;
  const cumulative = cumulativeAlphas(about.schedule), sessions = {}, contexts = new Map();
  const width = about.width, zeros = freshLora(about.lora, about.rank, 0).fill(0);
  const tensor = (data, shape) => new ort.Tensor("float32", data, shape), number = (x) => tensor(Float32Array.of(x), []);

  async function open(name) {
    sessions[name] ??= await ort.InferenceSession.create(new Uint8Array(graphs[name]), {
      executionProviders: ["wasm"], graphOptimizationLevel: "all", externalData: [{ path: about.blob, data: blob }],
    });
  }

  async function context(prompt) {
    if (!contexts.has(prompt)) {
      const ids = BigInt64Array.from(encode(prompt), BigInt);
      const found = await sessions.text.run({ ids: new ort.Tensor("int64", ids, [1, length]) });
      contexts.set(prompt, found.context.data.slice());
    }
    return contexts.get(prompt);
  }

  async function predict(x, t, c, lora, scale) {
    const n = t.length;
    const found = await sessions.unet.run({
      x: tensor(x, [n, CHANNELS, SIDE, SIDE]), t: tensor(t, [n]), c: tensor(c, [n, length, width]), lora: tensor(lora, [lora.length]), scale: number(scale),
    });
    return found.noise.data;
  }

  async function decode(z) {
    const { image } = await sessions.vae.run({ z: tensor(z, [1, CHANNELS, SIDE, SIDE]) }), area = IMAGE * IMAGE;
    const pixels = new Uint8ClampedArray(4 * area).fill(255);
    for (let p = 0; p < area; p++) for (let c = 0; c < 3; c++) pixels[4 * p + c] = Math.round(Math.min(Math.max(image.data[c * area + p] / 2 + 0.5, 0), 1) * 255);
    return pixels;
  }

  // {latents, pixels}: RGBA, from starting noise or a seed. `scale` goes from the base, 0, to the tuned model, 1, and beyond.
  // Two adapters behind one another, of liked and of disliked images, are contrasted: `scale` is the strength of the contrast.
  async function draw({ prompt, seed, noise = random(seed).normal(LATENT), scale = 0, lora = zeros, guidance = about.guidance, steps = about.steps }) {
    const { timesteps, step } = solver(steps, cumulative), x = noise.slice(), guided = new Float32Array(LATENT), two = lora.length > zeros.length;
    const c = Float32Array.from([...(await context("")), ...(await context(prompt))]);
    for (let i = 0; i < steps; i++) {
      const both = new Float32Array(2 * LATENT);
      both.set(x);
      both.set(x, LATENT);
      const found = await predict(both, Float32Array.of(timesteps[i], timesteps[i]), c, two ? zeros : lora, two ? 0 : scale);
      for (let k = 0; k < LATENT; k++) guided[k] = found[k] + guidance * (found[LATENT + k] - found[k]);
      if (two && scale) {
        const prompted = c.subarray(c.length / 2), sides = [];
        for (const side of [0, 1]) sides.push(await predict(x, Float32Array.of(timesteps[i]), prompted, adapter(lora, side), 1));
        for (let k = 0; k < LATENT; k++) guided[k] += scale * (sides[0][k] - sides[1][k]);
      }
      step(i, x, guided);
    }
    return { latents: x, pixels: await decode(x) };
  }

  // Errors, rewards and the gradient of one batch {x_t, t, c, target, sign}; `felt` is {table, inside, batchPoint, weight}.
  async function kto(batch, lora, beta, felt) {
    const n = about.batch, shape = [n, CHANNELS, SIDE, SIDE], reference = new Float32Array(n);
    const base = await predict(batch.x_t, batch.t, batch.c, zeros, 0);
    for (let i = 0; i < n; i++) {
      let sum = 0;
      for (let k = i * LATENT; k < (i + 1) * LATENT; k++) sum += (base[k] - batch.target[k]) ** 2;
      reference[i] = sum / LATENT;
    }
    const found = await sessions.step.run({
      x_t: tensor(batch.x_t, shape), t: tensor(batch.t, [n]), c: tensor(batch.c, [n, length, width]), target: tensor(batch.target, shape),
      reference_error: tensor(reference, [n]), sign: tensor(felt.sign ?? batch.sign, [n]), weight: tensor(new Float32Array(n).fill(felt.weight ?? 1), [n]),
      beta: number(beta), table: tensor(felt.table, [felt.table.length]), inside: number(felt.inside),
      batch_point: number(felt.batchPoint ?? 1), given_point: number(0), lora: tensor(lora, [lora.length]),
    });
    const reward = Array.from(found.error.data, (error, i) => beta * (reference[i] - error));
    return { gradient: found.gradient.data, reward, point: found.point.data[0], pull: Array.from(found.pull.data) };
  }

  // The slope of a utility as the table that the step's graph reads: the very function that draws the curve trains.
  const table = (slope) => Float32Array.from({ length: about.knots }, (_, i) => slope(-about.reach + (2 * about.reach * i) / (about.knots - 1)));

  // What a method gives the step's graph. SFT is the error of liked images alone, whatever the reward.
  function feeling({ method, utility, beta }) {
    if (method === "sft") return { table: table(() => 1), inside: 1, sign: new Float32Array(about.batch).fill(1), weight: 1 / beta };
    return { table: table(utility.slope), inside: utility.sign === "inside" ? 1 : 0 };
  }

  // Rows of a batch as dkto's biased sampler draws them: liked with chance gamma. Then noise, timesteps and prompts.
  async function drawBatch(likes, gamma, next) {
    const n = about.batch, groups = [likes.filter((row) => !row.liked), likes.filter((row) => row.liked)];
    const batch = { x_t: new Float32Array(n * LATENT), t: new Float32Array(n), c: new Float32Array(n * length * width), target: next.normal(n * LATENT), sign: new Float32Array(n), rows: [] };
    for (let i = 0; i < n; i++) {
      const group = groups[next() < gamma ? 1 : 0], row = group[next.below(group.length)], t = next.below(cumulative.length);
      const kept = Math.sqrt(cumulative[t]), added = Math.sqrt(1 - cumulative[t]);
      for (let k = 0; k < LATENT; k++) batch.x_t[i * LATENT + k] = kept * row.latents[k] + added * batch.target[i * LATENT + k];
      batch.t[i] = t;
      batch.sign[i] = row.liked ? 1 : -1;
      batch.c.set(await context(row.prompt), i * length * width);
      batch.rows.push(likes.indexOf(row));
    }
    return batch;
  }

  // The adapter of the liked images, 0, or of the disliked ones, 1, of those that `contrast` puts behind one another.
  const adapter = (lora, side) => lora.slice(side * zeros.length, (side + 1) * zeros.length);

  // Fine-tune one adapter on the liked images and one on the disliked ones, each for half of the steps.
  async function contrast(likes, settings, tell, stopped) {
    const half = Math.ceil(settings.steps / 2), both = new Float32Array(2 * zeros.length);
    let done = 0;
    for (const side of [0, 1]) {
      const theirs = likes.map((row) => ({ ...row, liked: row.liked === (side === 0) })), before = done;
      const note = (record) => tell({ ...record, step: before + record.step, sign: record.sign.map((sign) => (side ? -sign : sign)) });
      const { lora, steps } = await tune(theirs, { ...settings, method: "sft", steps: side ? settings.steps - half : half }, note, stopped);
      both.set(lora, side * zeros.length);
      done += steps;
    }
    return { lora: both, steps: done };
  }

  // Tune a fresh LoRA; `tell` gets a record a step, `stopped()` ends it between two steps.
  async function tune(likes, settings, tell, stopped) {
    if (settings.method === "contrast") return contrast(likes, settings, tell, stopped);
    await open("step");
    const lora = freshLora(about.lora, about.rank, settings.seed), state = adamw(lora.length), next = random(settings.seed + 1);
    const felt = feeling(settings), gamma = settings.method === "sft" ? 1 : settings.gamma;
    let step = 0;
    for (; step < settings.steps && !stopped(); step++) {
      const batch = await drawBatch(likes, gamma, next), found = await kto(batch, lora, settings.beta, felt);
      const norm = update(lora, found.gradient, state, settings.rate * Math.min(1, (step + 1) / settings.warmup));
      tell({ step: step + 1, reward: found.reward, point: found.point, pull: found.pull, sign: Array.from(batch.sign), rows: batch.rows, norm });
      await pause();
    }
    return { lora, steps: step };
  }

  for (const name of ["text", "unet", "vae"]) await open(name);
  return { open, encode, context, draw, kto, table, feeling, tune, file: (lora, side = 0) => loraFile(adapter(lora, side), about.lora, about.rank) };
}
