// What a visitor can set, telling states of it, and the link that holds it.

const METHODS = { kto: "Diffusion-KTO", sft: "SFT: liked images alone", contrast: "Guidance by dislikes: two adapters" };
const UTILITY_TITLES = {
  kahneman_tversky: "Kahneman-Tversky: sigmoid(x)", loss_averse: "loss-averse: log sigmoid(x)",
  risk_seeking: "risk-seeking: −log sigmoid(−x)", linear: "linear: x", own: "a formula of your own",
};
const POOLS = { open: "colour and background open", paintings: "half paintings on white or grey" };
const ABOUT_POOLS = {
  open: "The prompts leave colour and background open, so that your answers can decide them.",
  paintings: "Every second image is a painting on white or grey, whose background the model draws cloudy.",
};
const DEFAULTS = { ...TELLING, method: "kto", utility: "kahneman_tversky", formula: "tanh(x / 2)", count: 40, judge: "me", seed: 1, warmup: 5 };
const PRESETS = {
  own: { title: "My own taste", text: "You judge. Decide on a taste that a stranger could name, such as dark backgrounds or blue things, and keep to it. Like only what shows it clearly; a third of the images is enough.", settings: {} },
  clean: { title: "Clean backgrounds", text: "Half of the images are paintings on white or grey, and the model draws their backgrounds cloudy. Dislike what is cloudy, like the others. No like says what to avoid: only dislikes do, and SFT cannot learn it.", settings: TASTES.clean.settings },
  saturation: { title: "Saturation", text: "Beta is 30 times as large. Watch the dots: they soon leave the sloping part of the curve, and what lies on a flat part teaches nothing.", settings: { beta: 3000, judge: "dark" } },
  fleeing: { title: "Fleeing", text: "Gamma is 0.5, so that half of all samples are disliked. Watch the disliked rewards: they fall without end, and images go anywhere but where you want.", settings: { gamma: 0.5, judge: "dark" } },
  wrong: { title: "A wrong label", text: "A rule judges, and one clear like is flipped: its tile has a double frame, its dot a ring. Loss-averse, it pulls ever harder. Tune again with Kahneman-Tversky, which gives it up.", settings: { utility: "loss_averse", judge: "dark", wrong: true } },
};
const LIMITS = { beta: [1, 100_000], gamma: [0.5, 0.99], count: [2, 40], steps: [1, 200], seed: [0, 999_999], rate: [1e-5, 1e-1], warmup: [0, 50], group: [1, 999_999], card: [0, 99] };
const CHOICES = { pool: POOLS, method: METHODS, utility: UTILITY_TITLES, judge: { me: "", ...TASTES } };

// Settings of a link's fragment, "#beta=50&judge=dark"; what is not known or out of its range is left out.
function settingsOf(fragment) {
  const found = {};
  for (const [name, text] of new URLSearchParams(fragment.replace(/^#/, ""))) {
    if (Object.hasOwn(LIMITS, name)) {
      const value = Number(text), [low, high] = LIMITS[name];
      if (text !== "" && value >= low && value <= high) found[name] = value;
    } else if (Object.hasOwn(CHOICES, name)) {
      if (Object.hasOwn(CHOICES[name], text)) found[name] = text;
    } else if (name === "formula" && text.length <= 200) found.formula = text;
    else if (name === "wrong" && text === "true") found.wrong = true;
  }
  return found;
}

// The fragment of settings: what differs from the defaults.
function fragmentOf(settings) {
  const changed = Object.entries(settings).filter(([name, value]) => value !== DEFAULTS[name] && value !== undefined && value !== null && value !== false && (name !== "formula" || settings.utility === "own"));
  return changed.length ? `#${new URLSearchParams(changed.map(([name, value]) => [name, String(value)]))}` : "";
}
