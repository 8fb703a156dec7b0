// Sections 4 and 5: from base to tuned by a slider, and the blind comparison.

// Held-out prompts without images, but for those of the base, which stay true as long as noise and prompt do.
const freshHeld = () => state.prompts.held.map((prompt, k) => {
  const { prompt: before, at = [] } = state.held[k] ?? {}, same = before === prompt && state.heldSeed === state.settings.seed;
  return { prompt, at: new Map([...at].filter(([position]) => same && position === 0)) };
});
const STRENGTHS = { 0: "base", 0.5: "half", 1: "tuned", 1.5: "beyond" };

function buildStrength() {
  const strength = slider({
    label: "strength of what was learned", min: 0, max: 1.5, step: 0.25, position: 1,
    toText: (value) => (STRENGTHS[value] ? `${value} (${STRENGTHS[value]})` : String(value)),
    onInput: (value) => { state.position = value; redraw("held"); work(); },
  });
  strength.input.id = "strength-slider";
  strength.node.querySelector("label").htmlFor = "strength-slider";
  const tiles = state.prompts.held.map((prompt) => {
    const canvas = imageCanvas(prompt), caption = element("figcaption"), figure = element("figure", {}, canvas, caption);
    return { canvas, caption, figure };
  });
  const empty = element("p", { class: "note", text: "After the tuning, the images are here." });
  const grid = element("div", { class: "held" }, ...tiles.map((tile) => tile.figure));
  host("strength").append(empty, element("div", { class: "wide-slider" }, strength.node), grid);
  parts.held = () => {
    state.heldSeed = state.settings.seed;
    const ready = state.held.some((one) => one.at.size) && Boolean(state.tuned);
    empty.hidden = ready;
    grid.hidden = !ready;
    strength.input.disabled = !ready;
    state.held.forEach((one, k) => {
      const nearest = [...one.at.keys()].sort((a, b) => Math.abs(a - state.position) - Math.abs(b - state.position))[0];
      const { canvas, caption, figure } = tiles[k];
      caption.textContent = one.prompt;
      figure.setAttribute("aria-busy", String(nearest !== state.position));
      canvas.setAttribute("aria-label", `${one.prompt}, strength ${nearest ?? state.position}`);
      if (nearest !== undefined) paint(canvas, one.at.get(nearest));
    });
  };
}

// Wins, losses and ties of the answers so far.
function tally() {
  const chose = state.answers.map((side, k) => (side === "none" ? 0 : (side === "left") === state.pairs[k].tunedLeft ? 1 : -1));
  return { wins: chose.filter((c) => c > 0).length, losses: chose.filter((c) => c < 0).length, ties: chose.filter((c) => c === 0).length };
}

function buildBlind() {
  const images = { left: imageCanvas("left image"), right: imageCanvas("right image") };
  const prompt = element("p", { class: "prompt", role: "status" });
  const pair = pairOf(images, answer);
  const none = button("no difference (↓)", () => answer("none"), { "aria-keyshortcuts": "ArrowDown" });
  const end = button("End here and show the result", () => { state.ended = true; redraw("blind", "take"); });
  const stage = element("div", { class: "blind", role: "group", tabindex: "0", "aria-label": "pair to compare; the arrows choose, the down arrow is no difference" }, prompt, pair, element("div", { class: "dkto-row" }, none, end));
  const empty = element("p", { class: "note", text: "After the tuning, twelve pairs are here." });
  const result = element("p", { class: "result", role: "status" }), about = element("p", { class: "note" }), code = element("p", { class: "card" }), key = element("ul", { class: "key" });
  host("blind").append(empty, stage, result, code, about, key);
  parts.keysOfBlind = shortcuts(stage, { ArrowLeft: () => answer("left"), ArrowRight: () => answer("right"), ArrowDown: () => answer("none") });

  function answer(side) {
    if (state.ended || state.answers.length >= state.pairs.length || state.answers.length >= PAIRS) return;
    state.answers.push(side);
    redraw("blind", "take");
    work();
  }
  const keyEntry = (one, k) => {
    const side = state.answers[k], chosen = side === "none" ? "" : (side === "left") === one.tunedLeft ? "tuned" : "base";
    const cell = (name) => element("figure", { class: chosen === name ? "preferred" : "" }, imageCanvas(`${name}, ${one.prompt}${chosen === name ? ", preferred" : ""}`, one[name]), element("figcaption", { text: chosen === name ? `${name}, preferred` : name }));
    return element("li", {}, element("div", {}, cell("base"), cell("tuned")), element("span", { class: "note", text: one.prompt }));
  };
  parts.blind = () => {
    const asked = state.answers.length, done = state.ended || asked >= PAIRS, now = state.pairs[asked];
    if (!asked) state.ended = false;
    empty.hidden = Boolean(state.tuned);
    stage.hidden = !state.tuned || (done && asked > 0);
    end.hidden = !asked;
    for (const one of [...pair.children, none]) one.disabled = !now;
    paint(images.left, now && (now.tunedLeft ? now.tuned : now.base));
    paint(images.right, now && (now.tunedLeft ? now.base : now.tuned));
    prompt.textContent = now ? `${asked + 1} of ${PAIRS}: ${now.prompt}` : state.tuned ? `${asked + 1} of ${PAIRS}: drawing` : "";
    const shown = done && asked > 0, found = tally();
    result.textContent = shown ? `${comparisonText(found)}.` : "";
    about.textContent = shown ? `In brackets: 95 % of such intervals hold the true share (Wilson). ${state.tuned?.shuffled ? "The likes were shuffled: expect one half." : "One half is chance."}` : "";
    code.hidden = !shown || !state.settings.group;
    code.textContent = code.hidden ? "" : `The code of your result: ${resultCode({ group: state.settings.group, card: state.settings.card ?? 0, ...found })}`;
    key.replaceChildren(...(shown ? state.pairs.slice(0, asked).map(keyEntry) : []));
  };
}
