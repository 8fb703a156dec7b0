// Section 2: images as they are drawn, judged by key, click or touch, or by a rule.

const answerOf = (image) => (image.liked === undefined ? "" : image.liked ? "like" : "dislike");
const judged = () => state.pool.filter((image) => image.liked !== undefined);
let current = -1; // the image that keys judge; -1 while none is left to judge
const history = []; // places of answers, for taking back

function addImage(image) {
  const k = state.pool.push(image) - 1;
  image.tile = element("button", { type: "button", class: "tile", on: { click: () => { current = k; judge(k, !image.liked); } } }, imageCanvas("", image.pixels));
  image.tile.firstChild.removeAttribute("role");
  image.tile.firstChild.removeAttribute("aria-label");
  host("tiles").append(image.tile);
  if (current < 0 && image.liked === undefined) current = k;
  if (state.pool.length === state.drawing) { applyJudge(); say("All images are drawn."); }
  redraw("judging");
}

function judge(k, liked) {
  const image = state.pool[k];
  if (!image || state.tuning) return;
  image.liked = liked;
  image.wrong = false;
  history.push(k);
  redraw("judging", "tuning", "take");
}
function judgeCurrent(liked) {
  if (!state.pool[current]) return;
  judge(current, liked);
  const open = state.pool.map((image, i) => (image.liked === undefined ? i : -1)).filter((i) => i >= 0);
  current = open.find((i) => i > current) ?? open[0] ?? -1;
  redraw("judging");
}
function takeBack() {
  const k = history.pop();
  if (k === undefined || state.tuning) return;
  state.pool[k].liked = undefined;
  current = k;
  redraw("judging", "tuning", "take");
}

// A rule judges all images; the preset of a wrong label flips the clearest like.
function applyJudge() {
  const { judge: taste, wrong } = state.settings;
  if (taste === "me" || !state.pool.length || state.tuning) return;
  const images = state.pool.map((image) => image.pixels), liked = judgedBy(taste, images);
  const values = images.map(TASTES[taste].measure), clearest = values.indexOf(Math.max(...values));
  state.pool.forEach((image, k) => {
    image.wrong = Boolean(wrong) && k === clearest;
    image.liked = liked[k] !== image.wrong;
  });
  current = -1;
  redraw("judging", "tuning", "take");
}

function drawImages() {
  state.prompts = PROMPTS[state.settings.pool];
  Object.assign(state, { pool: [], drawing: state.settings.count, log: [], tuned: null, held: freshHeld(), pairs: [], answers: [] });
  current = -1;
  history.length = 0;
  host("tiles").replaceChildren();
  say("Drawing; you can judge at once.");
  redraw("judging", "tuning", "curve", "held", "blind", "take");
  work();
}

// How long to tune: as long as the taste takes, shorter on few likes.
function stepsNow() {
  const { count, judge: taste } = state.settings, { settings } = TASTES[taste] ?? PRESETS[state.preset];
  return count < 40 ? 60 : settings.steps ?? DEFAULTS.steps;
}

function buildJudging() {
  const draw = button("Draw", drawImages, { class: "dkto-main", id: "draw" });
  const drawn = choice("prompts", POOLS, "open", (value) => set({ pool: value }));
  const count = choice("how many", { 40: "40 images", 24: "24, in a hurry" }, "40", (value) => { set({ count: Number(value) }); set({ steps: stepsNow() }); });
  const who = choice("who judges", { me: "I do", ...Object.fromEntries(Object.entries(TASTES).map(([key, { title }]) => [key, `a rule: ${title}`])) }, "me", (value) => { set({ judge: value, ...TASTES[value]?.settings }); set({ steps: stepsNow() }); applyJudge(); });
  const card = element("p", { class: "card" });
  const big = imageCanvas("the image to judge"), prompt = element("p", { class: "prompt" });
  const like = button("like →", () => judgeCurrent(true), { "aria-keyshortcuts": "ArrowRight L" }), dislike = button("← dislike", () => judgeCurrent(false), { "aria-keyshortcuts": "ArrowLeft D" });
  const undo = button("take back", takeBack, { "aria-keyshortcuts": "Z" });
  const stage = element("div", { class: "stage", tabindex: "0", role: "group", "aria-label": "image to judge; the right arrow likes, the left one dislikes, z takes back" },
    big, prompt, element("div", { class: "answers" }, dislike, like), undo);
  const counted = element("p", { class: "note", role: "status" }), tiles = element("div", { class: "tiles", id: "tiles", role: "group", "aria-label": "all images" });
  const area = element("div", { class: "judging" }, stage, tiles);
  host("likes").append(card, element("div", { class: "dkto-row" }, drawn.node, count.node, who.node, draw), counted, area);
  parts.keysOfJudging = shortcuts(area, judgingKeys(() => judgeCurrent(true), () => judgeCurrent(false), takeBack));
  parts.judging = () => {
    const { settings, pool, drawing } = state, image = pool[current], given = judged(), likes = given.filter((one) => one.liked).length;
    draw.disabled = !state.machine || Boolean(state.tuning) || pool.length < drawing;
    draw.textContent = pool.length < drawing ? `Drawing ${pool.length + 1} of ${drawing}` : pool.length ? "Draw again" : `Draw ${settings.count} images`;
    showChoice(count.select, settings.count, `${settings.count} images`);
    count.select.disabled = drawn.select.disabled = Boolean(settings.group);
    drawn.select.value = settings.pool;
    host("about-pool").textContent = ABOUT_POOLS[settings.pool];
    who.select.value = settings.judge;
    card.hidden = !settings.card;
    card.textContent = settings.card ? `Card ${settings.card}. Your secret taste: ${tasteOfCard(settings).title}. Judge by it, and tell nobody.` : "";
    area.hidden = !pool.length;
    for (const one of [like, dislike]) one.disabled = !image || Boolean(state.tuning);
    undo.disabled = !history.length || Boolean(state.tuning);
    if (pool.length) paint(big, (image ?? pool[pool.length - 1]).pixels);
    big.setAttribute("aria-label", image ? `${WORDS[answerOf(image)]}: ${image.prompt}` : "no image to judge");
    prompt.textContent = image ? image.prompt : pool.length < drawing ? "The next image is on its way." : "All are judged. A click changes an answer.";
    pool.forEach((one, k) => {
      const answer = answerOf(one);
      Object.assign(one.tile.dataset, { answer, sign: { like: "+", dislike: "−", "": "" }[answer], wrong: one.wrong ? "yes" : "" });
      one.tile.setAttribute("aria-label", `${WORDS[answer]}${one.wrong ? ", a wrong label" : ""}: ${one.prompt}`);
      if (k === current) one.tile.setAttribute("aria-current", "true");
      else one.tile.removeAttribute("aria-current");
    });
    counted.textContent = pool.length ? `${likes} liked, ${given.length - likes} disliked, ${pool.length - given.length} without an answer.` : "";
  };
}
