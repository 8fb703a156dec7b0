// The page begins: sections, the link's settings, the model.

function readLink() {
  const found = settingsOf(location.hash);
  if (found.group) {
    found.seed = found.group;
    found.card ??= 1 + (crypto.getRandomValues(new Uint8Array(1))[0] % 99);
    Object.assign(found, { ...tasteOfCard(found).settings, ...found });
    host("class-details").open = false;
  }
  set({ ...DEFAULTS, group: undefined, card: undefined, wrong: undefined, ...found });
  if (found.group) window.history.replaceState(null, "", fragmentOf(state.settings)); // a reload keeps the card
}

// Arrows and letters work wherever the focus is in no field: they judge until all is judged, then they compare.
function keysAnywhere(event) {
  if (document.activeElement?.matches("input, select, textarea, summary")) return;
  const open = state.pool.some((image) => image.liked === undefined);
  (open || !state.tuned ? parts.keysOfJudging : parts.keysOfBlind)(event);
}

async function begin() {
  say("Loading the model, 10 MB.");
  const began = performance.now();
  state.machine = await startMachine((why) => fallBack(`The model's worker ended (${why}).`));
  state.readyAfter = performance.now();
  say(`The model is ready (${((state.readyAfter - began) / 1000).toFixed(1)} seconds).`);
  redraw("judging", "tuning");
  work();
}

// Without the model: what the visitor has made stays; one who has no image yet sees a run that was kept.
async function fallBack(why) {
  Object.assign(state, { machine: null, lacks: why, tuning: null, drawing: state.pool.length });
  const rest = "Your images and answers are still here: save them below, and reload the page to begin again.";
  if (!state.pool.length) await showKeptRun();
  say(`${why} ${state.tuned?.kept ? "The page shows a run that was kept instead: move the slider and compare blind." : rest}`);
  redraw("judging", "tuning", "held", "blind", "take", "curve");
}

function startPage() {
  if (location.protocol === "file:" && !host("file-wasm")) { location.replace(`../teach_your_taste.html${location.hash}`); return; } // from disk nothing can be fetched
  state.held = freshHeld();
  buildPresets();
  buildFeelings();
  buildJudging();
  buildTuning();
  buildStrength();
  buildBlind();
  buildTaking();
  buildClassroom();
  readLink();
  redraw("presets", "feelings", "judging", "tuning", "held", "blind", "take");
  addEventListener("hashchange", readLink);
  addEventListener("keydown", keysAnywhere);
  const lacks = lacking();
  if (lacks) { fallBack(lacks); return; }
  const start = () => begin().catch((error) => fallBack(`The model could not be started (${error.message}).`));
  if (!navigator.connection?.saveData) { start(); return; }
  say("The model has 10 MB, and this device saves data.");
  const load = button("Load the model", () => { load.remove(); start(); }, { class: "dkto-main" });
  host("start").append(load);
}

startPage();
