// Utility explorer: every curve is computed here, so a slider needs no word from the kernel.

// A sampled function on [-limit, limit], linear between the samples.
function interpolated(view, limit) {
  const samples = new Float64Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  const last = samples.length - 1;
  return (x) => {
    const position = ((x + limit) / (2 * limit)) * last;
    const i = Math.max(0, Math.min(last - 1, Math.floor(position)));
    return samples[i] + (samples[i + 1] - samples[i]) * (position - i);
  };
}

const POINTS = 241;
const SETTINGS = ["beta", "reference_point", "desirable_weight", "undesirable_weight", "desirable_fraction", "utility", "largest_reward"];

function render({ model, el }) {
  const node = root(el, "explorer", "Utility explorer");
  const colours = model.get("colours");
  const state = Object.fromEntries(SETTINGS.map((name) => [name, model.get(name)]));
  let curves = [];
  let gaps = new Float32Array(0);
  let liked = new Uint8Array(0);

  const panels = {
    value: axes("Utilities over gains and losses"),
    slope: axes("Slopes of the utilities"),
    weight: axes("Weight of a liked and a disliked image"),
    rewards: axes("Rewards of the images under the slope"),
  };
  const legend = element("ul", { class: "dkto-legend", "aria-label": "utilities" });
  const alert = element("div", { class: "dkto-alert", role: "alert" });
  const readout = element("p", { class: "dkto-status", role: "status", "aria-live": "polite" });
  const tell = settled(400, (text) => { readout.textContent = text; });
  const sync = settled(150, () => {
    for (const name of SETTINGS) model.set(name, state[name]);
    model.save_changes();
  });

  const choose = element("select", { id: identifier() });
  choose.addEventListener("change", (event) => change("utility", choose.value, event));

  function change(name, value, event) {
    state[name] = value;
    drawMoving();
    const began = event.timeStamp;
    // after the frame: the message arrives once the frame was handed to the screen
    requestAnimationFrame(() => {
      const channel = new MessageChannel();
      channel.port1.onmessage = () => performance.measure("dkto-explorer", { start: began, end: performance.now() });
      channel.port2.postMessage(null);
    });
    sync();
  }

  const linear = (name, label, min, max, step) => {
    const made = slider({ label, min, max, step, position: state[name], toText: short, onInput: (value, event) => change(name, value, event) });
    made.refresh = () => made.show(state[name]);
    made.input.dataset.setting = name;
    return made;
  };
  const logarithmic = (name, label, min, max) => {
    const toValue = (position) => Number((10 ** position).toPrecision(3));
    const made = slider({ label, min, max, step: 0.02, position: Math.log10(state[name]), toText: (p) => short(toValue(p)), onInput: (p, event) => change(name, toValue(p), event) });
    made.refresh = () => made.show(Math.log10(state[name]));
    made.input.dataset.setting = name;
    return made;
  };
  const sliders = [
    logarithmic("beta", "beta: reward scale (per unit of mean squared error)", 0, 4.5),
    linear("reference_point", "reference point z (implicit reward)", -5, 5, 0.05),
    linear("desirable_weight", "weight of a liked image", 0.1, 4, 0.05),
    linear("undesirable_weight", "weight of a disliked image", 0.1, 4, 0.05),
    linear("desirable_fraction", "gamma: chance to draw a liked image", 0, 1, 0.01),
    linear("largest_reward", "half width of the plots (implicit reward)", 2, 40, 0.5),
  ];

  const nameField = element("input", { type: "text", id: identifier(), size: 12, value: "mine", spellcheck: "false" });
  const formulaField = element("input", { type: "text", id: identifier(), class: "dkto-formula", placeholder: "tanh(x/2)", spellcheck: "false" });
  const drawOwn = () => model.send({ type: "utility", name: nameField.value.trim(), formula: formulaField.value });
  for (const field of [nameField, formulaField]) field.addEventListener("keydown", (event) => { if (event.key === "Enter") drawOwn(); });
  const own = element("div", { class: "dkto-row dkto-own" },
    element("label", { for: nameField.id, text: "name" }), nameField,
    element("label", { for: formulaField.id, text: "U(x) =" }), formulaField,
    element("button", { type: "button", text: "Draw", on: { click: drawOwn } }));
  const file = element("input", { type: "file", id: identifier(), accept: ".csv,.jsonl" });
  file.addEventListener("change", async () => {
    const chosen = file.files[0];
    if (!chosen) return;
    if (chosen.size > model.get("largest_upload")) alert.textContent = `${chosen.name} has ${chosen.size} bytes, more than ${model.get("largest_upload")}`;
    else model.send({ type: "rewards", name: chosen.name, text: await chosen.text() });
  });
  file.disabled = Boolean(model.get("alone")); // no kernel reads it
  const save = element("button", { type: "button", text: "Save curves (CSV)", on: { click: saveCurves } });

  function chosen() {
    return curves.find((curve) => curve.name === state.utility) ?? curves[0];
  }

  // Weight of a sample in the gradient, per unit of beta; paper C.4, dkto.losses.effective_weight.
  function weight(curve, reward, sign) {
    const gain = reward - state.reference_point;
    const classWeight = sign > 0 ? state.desirable_weight : state.undesirable_weight;
    return sign * classWeight * curve.slope(curve.sign === "inside" ? sign * gain : gain);
  }

  function grid(count) {
    const half = state.largest_reward;
    return Float64Array.from({ length: count }, (_, i) => -half + (2 * half * i) / (count - 1));
  }

  function drawFixed() {
    const x = grid(POINTS), half = state.largest_reward;
    const line = (curve, map) => ({ x, y: x.map(map), colour: curve.colour, dash: curve.dash, width: curve.name === state.utility ? 3.5 : 1.8 });
    const xLabel = "gain or loss (implicit reward)";
    panels.value.draw({ x: [-half, half], y: [-1.15 * half, 1.15 * half], xLabel, yLabel: "utility U", lines: curves.map((c) => line(c, c.value)), title: "What is felt: U" });
    panels.slope.draw({ x: [-half, half], y: [-0.1, 2], xLabel, yLabel: "slope U'", lines: curves.map((c) => line(c, c.slope)), title: "What the model learns from: U'" });
  }

  let drawnFixed = "";
  function drawMoving() {
    const key = `${state.utility} ${state.largest_reward}`;
    if (key !== drawnFixed) { drawFixed(); drawnFixed = key; }
    const curve = chosen();
    if (!curve) return;
    const x = grid(POINTS), half = state.largest_reward;
    const marks = [{ x: state.reference_point, colour: colours.reference_point }];
    const up = x.map((r) => weight(curve, r, 1)), down = x.map((r) => weight(curve, r, -1));
    const most = Math.min(2, Math.max(0.3, ...up.map(Math.abs), ...down.map(Math.abs)) * 1.1);
    panels.weight.draw({
      x: [-half, half], y: [-most, most], marks, xLabel: "implicit reward", yLabel: "weight",
      title: `Pull on one image: ${curve.title}`,
      lines: [
        { x, y: up, colour: colours.desirable, width: 3 },
        { x, y: down, colour: colours.undesirable, width: 3 },
        { x, y: up.map((w) => w * state.desirable_fraction), colour: colours.desirable, dash: [3, 3], width: 1.5 },
        { x, y: down.map((w) => w * (1 - state.desirable_fraction)), colour: colours.undesirable, dash: [3, 3], width: 1.5 },
      ],
      legend: [
        { label: "liked", colour: colours.desirable },
        { label: "disliked", colour: colours.undesirable },
        { label: "× its chance to be drawn", colour: "#555555", dash: [3, 3] },
      ],
    });
    drawRewards(curve, x, up, down, marks);
  }

  function drawRewards(curve, x, up, down, marks) {
    const half = state.largest_reward, bins = 40;
    const counts = [new Float64Array(bins), new Float64Array(bins)], learning = [0, 0], totals = [0, 0];
    let outside = 0;
    const largest = Math.max(...up.map(Math.abs), ...down.map(Math.abs));
    for (let i = 0; i < gaps.length; i++) {
      const reward = gaps[i] * state.beta, side = liked[i] ? 0 : 1;
      totals[side] += 1;
      if (Math.abs(weight(curve, reward, liked[i] ? 1 : -1)) >= 0.1 * largest) learning[side] += 1;
      const bin = Math.floor(((reward + half) / (2 * half)) * bins);
      if (bin >= 0 && bin < bins) counts[side][bin] += 1;
      else outside += 1;
    }
    const share = counts.map((c, side) => c.map((n) => (totals[side] ? n / totals[side] : 0)));
    const top = Math.max(0.05, ...share[0], ...share[1]) * 1.25;
    const bars = [];
    for (const side of [0, 1]) {
      for (let bin = 0; bin < bins; bin++) {
        if (!share[side][bin]) continue;
        const x0 = -half + (2 * half * bin) / bins, x1 = x0 + (2 * half) / bins;
        const pulls = Math.abs(weight(curve, (x0 + x1) / 2, side ? -1 : 1)) >= 0.1 * largest;
        bars.push({ x0, x1, y: side ? -share[1][bin] : share[0][bin], colour: side ? colours.undesirable : colours.desirable, alpha: pulls ? 0.9 : 0.25 });
      }
    }
    const scale = (0.9 * top) / (largest || 1);
    panels.rewards.draw({
      x: [-half, half], y: [-top, top], marks, bars, xLabel: "implicit reward", yLabel: "share of images",
      yText: (value) => `${short(Math.abs(100 * value))}%`,
      title: `Which images learn: ${gaps.length ? model.get("source") : "no rewards yet"}`,
      lines: [
        { x, y: up.map((w) => w * scale), colour: "#000000", width: 2 },
        { x, y: down.map((w) => w * scale), colour: "#000000", width: 2 },
      ],
      legend: gaps.length ? [{ label: "weight (not to scale)", colour: "#000000" }] : undefined,
    });
    const percent = (n, all) => (all ? `${Math.round((100 * n) / all)} % of ${all}` : "none");
    const text = gaps.length
      ? `Learning, with at least a tenth of the largest weight: liked ${percent(learning[0], totals[0])}, disliked ${percent(learning[1], totals[1])}` +
        (outside ? `; ${outside} rewards lie outside the plot.` : ".")
      : `At the reference point: liked ${short(weight(curve, state.reference_point, 1))}, disliked ${short(weight(curve, state.reference_point, -1))}.`;
    tell(text);
    panels.rewards.canvas.setAttribute("aria-label", `Rewards of the images under the slope. ${text}`);
  }

  function saveCurves() {
    const curve = chosen(), x = grid(model.get("saved_points"));
    const head = ["x", ...curves.flatMap((c) => [`U:${c.name}`, `slope:${c.name}`]), "weight:liked", "weight:disliked", "drawn:liked", "drawn:disliked"];
    const rows = [head.join(",")];
    for (const value of x) {
      const up = weight(curve, value, 1), down = weight(curve, value, -1);
      rows.push([value, ...curves.flatMap((c) => [c.value(value), c.slope(value)]), up, down, up * state.desirable_fraction, down * (1 - state.desirable_fraction)].join(","));
    }
    saveAs("curves.csv", rows.join("\n") + "\n", "text/csv");
  }

  function readCurves() {
    const limit = model.get("table_limit");
    curves = model.get("curves").map((curve) => ({
      ...curve,
      value: CLOSED_FORMS[curve.name]?.value ?? interpolated(curve.value, limit),
      slope: CLOSED_FORMS[curve.name]?.slope ?? interpolated(curve.slope, limit),
    }));
    legend.replaceChildren(...curves.map((c) => element("li", {}, swatch(c.colour, c.dash), element("b", { text: c.title }), ` ${c.formula}`)));
    choose.replaceChildren(...curves.map((c) => element("option", { value: c.name, text: c.title })));
    choose.value = state.utility;
    drawnFixed = "";
    drawMoving();
  }

  function readRewards() {
    const [bytes, flags] = [model.get("gaps"), model.get("liked")];
    gaps = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
    liked = new Uint8Array(flags.buffer.slice(flags.byteOffset, flags.byteOffset + flags.byteLength));
    drawMoving();
  }

  function readSettings() {
    for (const name of SETTINGS) state[name] = model.get(name);
    sliders.forEach((made) => made.refresh());
    choose.value = state.utility;
    drawMoving();
  }

  node.append(
    element("div", { class: "dkto-row" }, element("label", { for: choose.id, text: "utility of the lower panels" }), choose, save),
    element("div", { class: "dkto-sliders" }, ...sliders.map((made) => made.node)),
    legend,
    element("div", { class: "dkto-panels" }, ...Object.values(panels).map((panel) => panel.canvas)),
    readout,
    element("fieldset", {}, element("legend", { text: "Your own utility and rewards" }), own,
      element("div", { class: "dkto-row" }, element("label", { for: file.id, text: "rewards from a file (CSV: reward, liked; or a run's metrics.jsonl)" }), file, element("span", { text: model.get("alone") ?? "" })), alert),
  );
  const undo = [
    listen(model, ["curves"], readCurves),
    listen(model, ["gaps", "liked", "source"], readRewards),
    listen(model, SETTINGS, readSettings),
    listen(model, ["message"], () => { alert.textContent = model.get("message"); }),
  ];
  alert.textContent = model.get("message");
  readCurves();
  readRewards();
  return () => {
    undo.forEach((call) => call());
    Object.values(panels).forEach((panel) => panel.close());
  };
}

export default { render };
