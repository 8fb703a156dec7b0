// What the page knows, the model's work one piece after another, and small parts of its look.

const PROMPTS = window.DKTO_POOLS; // {train, held, compared} by pool, of dkto.web.page
const state = {
  settings: { ...DEFAULTS }, preset: "own",
  machine: null, lacks: "", // why the model cannot run; a kept run is shown then
  prompts: PROMPTS.open, // those of the images that are drawn
  pool: [], drawing: 0, // images to judge {prompt, pixels, latents, liked, wrong}; how many are asked for
  log: [], tuning: null, tuned: null, // records of the last tuning; the one under way; {lora, settings, shuffled, ms}
  held: [], position: 1, // {prompt, at: Map from strength to pixels}
  pairs: [], answers: [], // blind comparison
};
const parts = {}; // redraw functions of the sections, by name
const redraw = (...names) => names.forEach((name) => parts[name]?.());
const host = (id) => document.getElementById(id);
const say = (text) => { host("status").textContent = text; };

const utilityNow = () => (state.settings.utility === "own" ? utilityFromText(state.settings.formula) : CLOSED_FORMS[state.settings.utility]);
const HELD_POSITIONS = [1, 0, 0.5, 1.5, 0.25, 0.75, 1.25], PAIRS = 12;
const promptOf = (k) => state.prompts.compared[k % state.prompts.compared.length]; // of a pair
const seedOf = { pool: (k) => 1000 * state.settings.seed + k, held: (k) => 500_000_000 + 1000 * state.settings.seed + k, pair: (k) => 700_000_000 + 1000 * state.settings.seed + k };

// The next piece of work for the model, by what the visitor waits for; null if there is none.
function nextJob() {
  const draw = (values) => state.machine.call("draw", { ...values, lora: state.tuned?.lora });
  if (state.tuning) return runTuning;
  if (state.pool.length < state.drawing) return async () => {
    const k = state.pool.length, { train } = state.prompts, prompt = train[k % train.length];
    addImage({ prompt, ...(await draw({ prompt, seed: seedOf.pool(k) })) });
  };
  if (!state.tuned) return null;
  const tuned = state.tuned;
  const holds = (position) => {
    const k = state.held.findIndex((one) => !one.at.has(position));
    return k >= 0 && (async () => {
      const { pixels } = await draw({ prompt: state.held[k].prompt, seed: seedOf.held(k), scale: position });
      if (state.tuned === tuned) { state.held[k].at.set(position, pixels); redraw("held"); }
    });
  };
  const asked = state.answers.length, pair = () => state.pairs.length < Math.min(PAIRS, asked + 2) && (async () => {
    const k = state.pairs.length, prompt = promptOf(k), seed = seedOf.pair(k);
    const base = await draw({ prompt, seed }), other = await draw({ prompt, seed, scale: 1 });
    if (state.tuned !== tuned) return;
    state.pairs.push({ prompt, base: base.pixels, tuned: other.pixels, tunedLeft: (crypto.getRandomValues(new Uint8Array(1))[0] & 1) === 1 });
    redraw("blind");
  });
  return holds(state.position) || pair() || HELD_POSITIONS.map(holds).find(Boolean) || null;
}

let working = false;
async function work() {
  if (working || !state.machine) return;
  working = true;
  try { for (let job = nextJob(); job && state.machine; job = nextJob()) await job(); }
  catch (error) { if (state.machine) { state.tuning = null; say(`This did not work: ${error.message}`); redraw("judging", "tuning"); } }
  finally { working = false; }
}

// A number that a link brings, and the list has not, becomes a choice of it.
function showChoice(select, value, text = String(value)) {
  if (![...select.options].some((option) => option.value === String(value))) select.append(element("option", { value, text }));
  select.value = String(value);
}

function paint(canvas, pixels) {
  const context = canvas.getContext("2d");
  if (pixels) context.putImageData(new ImageData(new Uint8ClampedArray(pixels), IMAGE_SIDE, IMAGE_SIDE), 0, 0);
  else context.clearRect(0, 0, IMAGE_SIDE, IMAGE_SIDE);
}
const IMAGE_SIDE = 64;
function imageCanvas(label, pixels) {
  const canvas = element("canvas", { width: IMAGE_SIDE, height: IMAGE_SIDE, class: "image", role: "img", "aria-label": label });
  if (pixels) paint(canvas, pixels);
  return canvas;
}

const button = (text, onClick, options = {}) => element("button", { type: "button", text, on: { click: onClick }, ...options });
function set(values) {
  Object.assign(state.settings, values);
  redraw("feelings", "judging", "tuning", "take");
}
