// Like or dislike images. Every judgement goes to the kernel, which writes it down and sends the next images.

function render({ model, el }) {
  const node = root(el, "likes", "Like or dislike images");
  const status = element("p", { class: "dkto-status", role: "status", "aria-live": "polite" });
  const bar = element("progress", { "aria-label": "images seen" });
  const alert = element("div", { class: "dkto-alert", role: "alert" });
  const stage = element("div", { class: "dkto-stage", tabindex: "0", role: "group", "aria-label": "image to judge; right arrow likes, left arrow dislikes, space skips, z takes back" });
  let focused = -1; // the grid's image that keys judge
  let waiting = false; // single view: a judgement is under way

  const say = {
    like: () => judge("like"), dislike: () => judge("dislike"), skip: () => judge("skip"), undo: () => model.send({ type: "undo" }),
  };
  const button = (text, key, action, main) => element("button", { type: "button", class: main ? "dkto-main" : "", "aria-keyshortcuts": key, on: { click: () => { action(); stage.focus(); } }, text });
  const buttons = element("div", { class: "dkto-row" },
    button("← dislike", "ArrowLeft", say.dislike), button("like →", "ArrowRight", say.like, true),
    button("skip (space)", "Space", say.skip), button("undo (z)", "z", say.undo));
  const view = element("button", { type: "button", on: { click: () => { model.set("view", model.get("view") === "grid" ? "single" : "grid"); model.save_changes(); } } });
  const pager = element("div", { class: "dkto-row" });
  const strips = element("div", { class: "dkto-strips" }), mirror = element("div", { class: "dkto-mirror", role: "status" });

  function judge(judgement) {
    const index = model.get("view") === "grid" ? focused : model.get("current");
    if (index < 0 || waiting) return;
    waiting = model.get("view") !== "grid"; // a tile may be given the judgement it has, which changes nothing
    model.send({ type: "judge", index, judgement });
  }

  const move = (step) => {
    const tiles = [...stage.querySelectorAll(".dkto-tile")];
    tiles[Math.max(0, Math.min(tiles.length - 1, tiles.findIndex((t) => Number(t.dataset.index) === focused) + step))]?.focus();
  };
  const keys = { ...judgingKeys(say.like, say.dislike, say.undo), " ": say.skip, ArrowDown: () => move(1), ArrowUp: () => move(-1) };
  shortcuts(stage, keys, ["ArrowDown", "ArrowUp"]);

  function picture(item) {
    const image = element("img", { alt: item.prompt });
    showPicture(image, item.image);
    return image;
  }

  function drawSingle() {
    const item = model.get("shown").find((one) => one.index === model.get("current"));
    stage.className = "dkto-stage dkto-single";
    if (!item) stage.replaceChildren(element("p", { text: "All images are judged. Take one back with z, or go on to the training." }));
    else stage.replaceChildren(picture(item), element("p", { class: "dkto-prompt", text: item.prompt }));
  }

  function drawGrid() {
    const hadFocus = stage.contains(document.activeElement);
    stage.className = "dkto-stage";
    focused = model.get("current");
    const tiles = model.get("shown").map((item) =>
      element("figure", { class: "dkto-tile", tabindex: item.index === focused ? "0" : "-1", "data-index": item.index, "data-judgement": item.judgement, "aria-label": `${WORDS[item.judgement]}: ${item.prompt}`,
        on: { focus: (event) => { focused = Number(event.currentTarget.dataset.index); }, click: (event) => event.currentTarget.focus() } },
        picture(item), element("figcaption", {}, element("b", { text: `${WORDS[item.judgement]} ` }), element("span", { class: "dkto-prompt", text: item.prompt }))));
    stage.replaceChildren(element("div", { class: "dkto-grid" }, ...tiles));
    if (hadFocus) tiles.find((tile) => Number(tile.dataset.index) === focused)?.focus();
  }

  // What was liked and disliked last, and what the liked images share.
  function drawTaste() {
    const strip = model.get("strip"), shared = model.get("mirror"), missing = model.get("missing");
    strips.replaceChildren(...Object.entries(strip).filter(([, items]) => items.length).map(([kind, items]) =>
      element("div", { class: "dkto-strip", "data-judgement": kind }, element("b", { text: WORDS[kind] }), ...items.map(picture))));
    mirror.replaceChildren(
      element("p", { text: missing ? `Still asked for: ${missing}.` : shared.length ? "What parts your likes from your dislikes:" : "Enough to tune on. Nothing that is counted parts likes from dislikes yet." }),
      element("ul", {}, ...shared.map((text) => element("li", { text }))));
  }

  function draw() {
    waiting = false;
    const counts = model.get("counts"), seen = counts.like + counts.dislike + counts.skip;
    status.textContent = `seen ${seen} of ${model.get("total")}, liked ${counts.like}, disliked ${counts.dislike}, skipped ${counts.skip}`;
    bar.max = model.get("total");
    bar.value = seen;
    alert.textContent = model.get("message");
    const grid = model.get("view") === "grid";
    view.textContent = grid ? "one by one" : "as a grid";
    if (grid) drawGrid();
    else drawSingle();
    pager.hidden = !grid;
    const turn = (step) => () => { model.set("page", model.get("page") + step); model.save_changes(); };
    pager.replaceChildren(
      element("button", { type: "button", text: "previous page", disabled: model.get("page") === 0, on: { click: turn(-1) } }),
      ` page ${model.get("page") + 1} of ${model.get("pages")} `,
      element("button", { type: "button", text: "next page", disabled: model.get("page") + 1 >= model.get("pages"), on: { click: turn(1) } }));
  }

  node.append(
    element("div", { class: "dkto-row" }, bar, status, view),
    stage, buttons, pager, alert, strips, mirror,
    element("p", {}, element("kbd", { text: "→" }), " like, ", element("kbd", { text: "←" }), " dislike, ", element("kbd", { text: "space" }), " skip, ", element("kbd", { text: "z" }), " undo; in the grid ", element("kbd", { text: "↑" }), element("kbd", { text: "↓" }), " choose the image"),
  );
  const undo = [
    listen(model, ["shown", "current", "counts", "view", "message", "page"], settled(0, draw)),
    listen(model, ["strip", "mirror", "missing"], settled(0, drawTaste)),
  ];
  draw();
  drawTaste();
  return () => undo.forEach((call) => call());
}

export default { render };
