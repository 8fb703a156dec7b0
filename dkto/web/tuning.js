// Section 3: the tuning, live, with its control on shuffled likes.

async function runTuning() {
  const { settings, shuffled } = state.tuning, images = state.pool.filter((image) => image.liked !== undefined), places = images.map((image) => state.pool.indexOf(image));
  let liked = images.map((image) => image.liked);
  if (shuffled) liked = random(settings.seed + 99).shuffle(liked);
  const likes = images.map(({ prompt, latents }, i) => ({ prompt, latents, liked: liked[i] }));
  const began = performance.now(), { beta, gamma, method, steps, rate, warmup, seed, utility } = settings;
  const values = { beta, gamma, method, steps, rate, warmup, seed, utility, formula: utility === "own" ? settings.formula : undefined };
  Object.assign(state, { log: [], tuned: null, held: freshHeld(), pairs: [], answers: [] });
  redraw("tuning", "held", "blind", "take");
  const { lora, steps: done } = await state.machine.call("tune", { likes, settings: values }, (record) => {
    state.log.push({ ...record, rows: record.rows.map((row) => places[row]) });
    redraw("curve", "live");
  });
  const ms = performance.now() - began, fileOf = (side) => state.machine.call("file", { lora, side });
  const file = await fileOf(0), disliked = method === "contrast" ? await fileOf(1) : null;
  state.tuned = { lora, file, disliked, settings: { ...settings }, shuffled, steps: done, ms };
  state.tuning = null;
  say(`Tuned in ${(state.tuned.ms / 1000).toFixed(0)} seconds. Now move the slider, then compare blind.`);
  redraw("judging", "tuning", "live", "held", "blind", "take");
}

function startTuning(shuffled) {
  state.tuning = { settings: { ...state.settings }, shuffled, utility: utilityNow() };
  say(shuffled ? "Tuning on shuffled likes." : "Tuning.");
  redraw("judging", "tuning");
  work();
}

function rewardsPlot() {
  const plot = axes("Rewards of liked and disliked samples and the reference point", 240);
  function draw() {
    const theme = getComputedStyle(plot.canvas), colour = (name) => theme.getPropertyValue(`--dkto-${name}`).trim();
    const colours = { desirable: colour("like"), undesirable: colour("dislike"), reference_point: colour("soft") };
    const x = state.log.map((step) => step.step), steps = Math.max(10, (state.tuning ?? state.tuned)?.settings.steps ?? state.settings.steps);
    const values = [smoothed(state.log, 1), smoothed(state.log, -1), state.log.map((step) => step.point)];
    const curves = Object.fromEntries(Object.keys(REWARD_ROLES).map((role, i) => [role, [x, values[i]]]));
    drawRewards(plot, curves, colours, { x: [0, steps], y: span(values, -0.5, 0.5) });
  }
  return { node: plot.canvas, draw };
}

function buildTuning() {
  const method = choice("method", METHODS, state.settings.method, (value) => set({ method: value }));
  const steps = choice("steps", { 60: "60", 100: "100", 120: "120" }, "100", (value) => set({ steps: Number(value) }));
  const tune = button("Tune", () => startTuning(false), { class: "dkto-main", id: "tune" });
  const shuffle = button("Shuffle my likes, then tune", () => startTuning(true), { id: "shuffle" });
  const stop = button("Stop", () => state.machine?.call("stop"), { id: "stop" });
  const why = element("p", { class: "note" }), bar = element("progress", { "aria-label": "steps of the tuning", max: 100, value: 0 });
  const verdict = element("p", { class: "health", role: "status" }), curve = ridingCurve("Samples of the last four steps on the utility"), rewards = rewardsPlot();
  const live = element("div", {}, bar, verdict, element("div", { class: "two" }, rewards.node, curve.node));
  host("tuning").append(element("div", { class: "dkto-row" }, method.node, steps.node, tune, shuffle, stop), why, live);
  const before = parts.curve;
  parts.curve = () => { before(); curve.draw(); };
  parts.live = () => {
    const run = state.tuning ?? state.tuned, last = state.log[state.log.length - 1];
    live.hidden = !state.log.length;
    if (live.hidden) return;
    bar.max = run.settings.steps;
    bar.value = last.step;
    rewards.draw();
    if (state.tuning && last.step % 5) return; // a sentence that changes with every step cannot be read
    const utility = run.utility ?? utilityNow(), found = health(state.log, utility.slope, run.settings.method);
    verdict.dataset.state = found.state;
    verdict.textContent = `${state.tuning ? `Step ${last.step} of ${run.settings.steps}. ` : ""}${found.text}`;
    rewards.node.setAttribute("aria-label", `Rewards over the steps. ${found.text}`);
  };
  parts.tuning = () => {
    const given = judged(), likes = given.filter((image) => image.liked).length, enough = likes > 0 && likes < given.length;
    let sound = true;
    try { utilityNow(); } catch { sound = false; }
    const drawn = state.pool.length && state.pool.length >= state.drawing;
    tune.disabled = shuffle.disabled = !state.machine || !enough || !sound || !drawn || Boolean(state.tuning);
    stop.disabled = !state.tuning;
    method.select.value = state.settings.method;
    showChoice(steps.select, state.settings.steps);
    why.textContent = state.tuned?.kept ? "What you see is a run that was kept: a rule liked dark backgrounds." : state.lacks ? "The model cannot run here." : !drawn ? "First draw the images." : !enough ? "Tuning needs at least one like and one dislike; ten of each show something." : given.length < state.pool.length ? `${state.pool.length - given.length} images have no answer and are left out.`
      : "Shuffled likes are the control: the same images, with nothing to learn. What they achieve is chance.";
    parts.live();
  };
}
