// What the page says of numbers: rules that judge images, the state of a tuning, intervals, codes of a class.

const border = (pixels) => {
  const sum = [0, 0, 0];
  let count = 0;
  for (let y = 0; y < 64; y++) {
    for (let x = 0; x < 64; x++) {
      if (x > 3 && y > 3 && x < 60 && y < 60) continue;
      for (let c = 0; c < 3; c++) sum[c] += pixels[4 * (64 * y + x) + c];
      count++;
    }
  }
  return sum.map((value) => value / count);
};
const level = (pixels) => border(pixels).reduce((a, b) => a + b) / 3;

// Blue minus red of the coloured pixels that differ from the background, in [-1, 1].
function blueness(pixels) {
  const around = border(pixels), apart = (i) => Math.max(...around.map((value, c) => Math.abs(value - pixels[i + c])));
  let blue = 0, count = 1;
  for (let i = 0; i < pixels.length; i += 4) {
    const colour = [pixels[i], pixels[i + 1], pixels[i + 2]];
    if (apart(i) <= 45 || Math.max(...colour) - Math.min(...colour) <= 40) continue;
    blue += colour[2] - colour[0];
    count++;
  }
  return blue / count / 255;
}

// How far the border's pixels lie from their mean, a root mean square in levels: 0 where the background is flat.
function cloudiness(pixels) {
  const mean = border(pixels), squares = border(Array.from(pixels, (value, i) => (value - mean[i % 4]) ** 2));
  return Math.sqrt(squares.reduce((a, b) => a + b));
}

// Tastes as rules, for the hurried, for a class's cards and for tests: the larger, the better liked. `settings` teach it; `share` of a pool is liked.
const TELLING = { pool: "open", beta: 100, gamma: 0.9, steps: 100, rate: 2e-3 };
const TASTES = {
  dark: { title: "dark backgrounds", measure: (pixels) => -level(pixels), share: 1 / 3, settings: TELLING },
  blue: { title: "blue things", measure: blueness, share: 1 / 3, settings: { ...TELLING, beta: 500, gamma: 0.85, steps: 120 } },
  clean: { title: "clean backgrounds", measure: (pixels) => -cloudiness(pixels), share: 1 / 2, settings: { ...TELLING, pool: "paintings", gamma: 0.8, steps: 60 } },
  light: { title: "light backgrounds", measure: level, share: 1 / 3, settings: TELLING },
  warm: { title: "red and yellow things", measure: (pixels) => -blueness(pixels), share: 1 / 3, settings: { ...TELLING, beta: 500, gamma: 0.85, steps: 120 } },
};

// Which images a rule likes: those with most of it, as many as the taste's share says.
function judgedBy(taste, images) {
  const values = images.map((pixels) => TASTES[taste].measure(pixels));
  const order = values.map((_, i) => i).sort((a, b) => values[b] - values[a]);
  const liked = new Set(order.slice(0, Math.round(values.length * TASTES[taste].share)));
  return values.map((_, i) => liked.has(i));
}

const mean = (values) => (values.length ? values.reduce((a, b) => a + b) / values.length : NaN);

// Rewards of liked (1) or disliked (-1) samples, smoothed over steps; NaN until there is one.
function smoothed(log, sign) {
  let value = NaN;
  return log.map((step) => {
    const found = mean(step.reward.filter((_, i) => step.sign[i] === sign));
    if (Number.isFinite(found)) value = Number.isFinite(value) ? 0.85 * value + 0.15 * found : found;
    return value;
  });
}

const LOOKS_BACK = 15, FLED = -5, FLAT = 0.1; // steps; reward; share of the utility's largest slope

// {state, text}: whether a tuning is healthy, from the rewards of its last steps and the slopes that they met.
function health(log, slope, method = "kto") {
  const last = log.slice(-LOOKS_BACK), of = (sign) => mean(last.flatMap((step) => step.reward.filter((_, i) => step.sign[i] === sign)));
  const [liked, disliked] = [of(1), of(-1)], text = (value) => value.toFixed(1).replace("-", "−");
  if (log.length < LOOKS_BACK) return { state: "early", text: "Too early to say." };
  if (log.some((step) => !Number.isFinite(step.norm))) return { state: "broken", text: "A gradient was not a number, and its step was left out. Lower beta." };
  if (disliked < FLED) return { state: "flees", text: `Disliked rewards fall away (${text(disliked)}): the model flees what you disliked instead of looking for what you like. Raise gamma.` };
  if (method === "sft") return { state: "sft", text: `SFT learns from liked images alone: their reward is ${text(liked)}. It never sees a dislike.` };
  if (method === "contrast") return { state: "sft", text: "One adapter is fine-tuned on the liked images, then one on the disliked ones; no loss compares them. The slider is the strength of their contrast." };
  const largest = Math.max(...Array.from({ length: 65 }, (_, i) => Math.abs(slope(-4 + i / 8))));
  const pulling = mean(last.flatMap((step) => step.pull.map((pull) => (Math.abs(pull) > FLAT * largest ? 1 : 0))));
  if (pulling < 0.5) return { state: "saturated", text: `Saturated: only ${Math.round(100 * pulling)} % of the samples are where the utility has a slope; the others teach nothing. Lower beta.` };
  if (!(liked > disliked)) return { state: "mixed", text: `Liked rewards (${text(liked)}) are not above disliked ones (${text(disliked)}) yet: the likes may have little in common.` };
  return { state: "healthy", text: `Healthy: liked rewards (${text(liked)}) are above disliked ones (${text(disliked)}), and neither runs away.` };
}

// Wilson's 95 % interval of k of n, both ends in [0, 1]; as dkto.evaluation.wilson_interval.
function wilson(k, n, z = 1.959963984540054) {
  const rate = k / n, shrink = 1 / (1 + (z * z) / n), centre = (rate + (z * z) / (2 * n)) * shrink;
  const half = z * Math.sqrt((rate * (1 - rate)) / n + (z * z) / (4 * n * n)) * shrink;
  return [k === 0 ? 0 : Math.max(0, centre - half), k === n ? 1 : Math.min(1, centre + half)];
}
const percent = (value) => Math.round(100 * value);

// The result of a blind comparison in words; answers without a difference are counted apart.
function comparisonText({ wins, losses, ties }) {
  const decided = wins + losses, apart = ties ? `; ${ties} without a difference` : "";
  if (!decided) return ties ? `No pair with a difference, ${ties} without` : "No answer yet";
  const [low, high] = wilson(wins, decided);
  return `You preferred the tuned model on ${wins} of ${decided} pairs: ${percent(wins / decided)} % [${percent(low)}, ${percent(high)}]${apart}`;
}

// A pupil's result as a short code, CLASS-CARD-WINS-LOSSES-TIES-CHECK, and back; null for what is no code.
const checkSign = (text) => "ABCDEFGHJKLMNPQRSTUVWXYZ"[[...text].reduce((sum, sign, i) => sum + (i + 3) * sign.charCodeAt(0), 0) % 24];
function resultCode({ group, card, wins, losses, ties }) {
  const text = [group, card, wins, losses, ties].join("-");
  return `${text}-${checkSign(text)}`;
}
function readCode(code) {
  const found = /^(\d{1,6})-(\d{1,2})-(\d{1,2})-(\d{1,2})-(\d{1,2})-([A-Z])$/.exec(code.trim().toUpperCase());
  if (!found || checkSign(found.slice(1, 6).join("-")) !== found[6]) return null;
  const [group, card, wins, losses, ties] = found.slice(1, 6).map(Number);
  return { group, card, wins, losses, ties };
}
