// Presets, and section 1: utility, beta, gamma, and the curve on which samples ride.

function ridingCurve(label) {
  const plot = axes(label, 240);
  const HALF = 6, x = Float64Array.from({ length: 121 }, (_, i) => -HALF + i / 10);
  function draw() {
    let utility;
    try { utility = utilityNow(); } catch { return; }
    const theme = getComputedStyle(plot.canvas), colour = (name) => theme.getPropertyValue(`--dkto-${name}`).trim();
    const y = x.map(utility.value), low = Math.min(...y), high = Math.max(...y), room = 0.08 * (high - low);
    const dots = state.log.slice(-4).flatMap((step) => step.reward.map((reward, i) => {
      const gain = reward - step.point, felt = utility.sign === "inside" ? step.sign[i] * gain : gain, at = Math.max(-HALF, Math.min(HALF, felt));
      return { x: at, y: utility.value(at), radius: 5, alpha: 0.85, colour: colour(step.sign[i] > 0 ? "like" : "dislike"), ring: state.pool[step.rows?.[i]]?.wrong };
    }));
    plot.draw({
      x: [-HALF - 0.3, HALF + 0.3], y: [low - room, high + room], xLabel: "gain or loss, measured from the reference point", yLabel: "what is felt",
      lines: [{ x, y, colour: colour("ink"), width: 2.5 }], marks: [{ x: 0, colour: colour("soft") }], dots,
      legend: dots.length ? [{ label: "a liked sample", colour: colour("like") }, { label: "a disliked sample", colour: colour("dislike") }] : undefined,
    });
  }
  return { node: plot.canvas, draw };
}

function buildPresets() {
  const about = element("p", { class: "note", role: "status" });
  const buttons = Object.entries(PRESETS).map(([name, preset]) => button(preset.title, () => {
    state.preset = name;
    set({ ...DEFAULTS, seed: state.settings.seed, group: state.settings.group, card: state.settings.card, wrong: undefined, ...preset.settings });
    applyJudge();
    redraw("presets");
  }, { "data-preset": name }));
  host("presets").append(element("div", { class: "dkto-row" }, ...buttons), about);
  parts.presets = () => {
    for (const one of buttons) one.setAttribute("aria-pressed", String(one.dataset.preset === state.preset));
    about.textContent = PRESETS[state.preset].text;
  };
}

function buildFeelings() {
  const curve = ridingCurve("The utility over gains and losses");
  const utility = choice("utility", UTILITY_TITLES, state.settings.utility, (value) => set({ utility: value }));
  const formula = element("input", { type: "text", id: identifier(), maxlength: 200, spellcheck: "false", autocomplete: "off" });
  formula.addEventListener("input", () => set({ formula: formula.value }));
  const alert = element("div", { class: "dkto-alert", role: "alert" });
  const own = element("div", { class: "field" }, element("label", { for: formula.id, text: "U(x) =" }), formula);
  const beta = slider({ label: "beta: how much a reward counts", min: 0, max: 4, step: 0.05, position: 2, toText: (p) => short(toBeta(p)), onInput: (p) => set({ beta: toBeta(p) }) });
  const gamma = slider({ label: "gamma: chance that a sample is a liked one", min: 0.5, max: 0.99, step: 0.01, position: 0.9, toText: (p) => p.toFixed(2), onInput: (p) => set({ gamma: p }) });
  function toBeta(position) { return Number((10 ** position).toPrecision(2)); }
  host("feelings").append(element("div", { class: "two" }, element("div", { class: "controls" }, utility.node, own, alert, beta.node, gamma.node), curve.node));
  parts.feelings = () => {
    const { settings } = state;
    utility.select.value = settings.utility;
    own.hidden = settings.utility !== "own";
    if (formula.value !== settings.formula) formula.value = settings.formula;
    try { utilityNow(); alert.textContent = ""; } catch (error) { alert.textContent = error.message; }
    beta.show(Math.log10(settings.beta));
    gamma.show(settings.gamma);
    parts.curve();
  };
  parts.curve = curve.draw;
}
