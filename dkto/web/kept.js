// A run that was kept: one sheet of images, the answers and the log. It takes the model's place where that cannot run.

const PER_ROW = 12;
const KEPT_POSITIONS = [0, 0.5, 1, 1.5];

// The run on the screen, as dkto.web.keep writes it down; its pairs are drawn here.
async function keptRun() {
  const images = state.pool.map((image) => image.pixels);
  for (const position of KEPT_POSITIONS) images.push(...state.held.map((one) => one.at.get(position)));
  for (let k = 0; k < PAIRS; k++) {
    const values = { prompt: promptOf(k), seed: seedOf.pair(k), lora: state.tuned.lora };
    for (const scale of [0, 1]) images.push((await state.machine.call("draw", { ...values, scale })).pixels);
  }
  const sheet = element("canvas", { width: PER_ROW * IMAGE_SIDE, height: Math.ceil(images.length / PER_ROW) * IMAGE_SIDE }), context = sheet.getContext("2d");
  images.forEach((pixels, i) => context.putImageData(new ImageData(pixels, IMAGE_SIDE), (i % PER_ROW) * IMAGE_SIDE, Math.floor(i / PER_ROW) * IMAGE_SIDE));
  const rounded = (values) => values.map((value) => Number(value.toPrecision(4)));
  return {
    settings: state.settings, prompts: state.pool.map((image) => image.prompt), liked: state.pool.map((image) => image.liked),
    log: state.log.map((step) => ({ ...step, reward: rounded(step.reward), pull: rounded(step.pull), point: rounded([step.point])[0], norm: rounded([step.norm])[0] })),
    positions: KEPT_POSITIONS, sprite: sheet.toDataURL("image/png"),
  };
}

async function showKeptRun() {
  const kept = JSON.parse(host("kept").textContent), sheet = new Image();
  sheet.src = kept.sprite;
  await sheet.decode();
  const canvas = element("canvas", { width: sheet.width, height: sheet.height }), context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(sheet, 0, 0);
  let at = 0;
  const next = () => { const i = at++; return context.getImageData((i % PER_ROW) * IMAGE_SIDE, Math.floor(i / PER_ROW) * IMAGE_SIDE, IMAGE_SIDE, IMAGE_SIDE).data; };
  host("tiles").replaceChildren();
  Object.assign(state, { pool: [], drawing: 0, log: kept.log, answers: [], pairs: [], prompts: PROMPTS.open, held: PROMPTS.open.held.map((prompt) => ({ prompt, at: new Map() })) });
  kept.prompts.forEach((prompt, k) => addImage({ prompt, pixels: next(), liked: kept.liked[k] }));
  state.drawing = state.pool.length;
  for (const position of kept.positions) for (const one of state.held) one.at.set(position, next());
  for (let k = 0; k < PAIRS; k++) state.pairs.push({ prompt: promptOf(k), base: next(), tuned: next(), tunedLeft: (crypto.getRandomValues(new Uint8Array(1))[0] & 1) === 1 });
  state.tuned = { kept: true, settings: kept.settings, utility: CLOSED_FORMS[kept.settings.utility] };
}
