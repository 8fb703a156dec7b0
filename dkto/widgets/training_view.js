// Live view of a training. The kernel sends curves and images; the page draws them and has two buttons.

const STATES = {
  ready: "ready", preparing: "preparing the images", running: "training", stopping: "stopping at a checkpoint",
  stopped: "stopped at a checkpoint; start goes on from it", finished: "finished", failed: "failed",
};

const SWAP_MS = 700; // slower than three a second, which can harm

function render({ model, el }) {
  const node = root(el, "training", "Training");
  const colours = model.get("colours");
  const status = element("p", { class: "dkto-status", role: "status", "aria-live": "polite" });
  const bar = element("progress", { "aria-label": "training steps done" });
  const alert = element("div", { class: "dkto-alert", role: "alert" });
  const result = element("p", { class: "dkto-result" });
  const start = element("button", { type: "button", class: "dkto-main", on: { click: () => { start.disabled = true; model.send({ type: "start" }); } } });
  const stop = element("button", { type: "button", text: "Stop at a checkpoint", on: { click: () => model.send({ type: "stop" }) } });
  const panels = { loss: axes("Loss over training steps", 210), rewards: axes("Rewards over training steps", 210) };
  const table = element("div", { class: "dkto-scroll" }), swaps = element("div", { class: "dkto-swaps" });

  function drawCurves() {
    const curves = model.get("curves"), [steps, loss] = curves.loss ?? [[], []];
    const x = [0, Math.max(10, steps.at(-1) ?? 0)];
    panels.loss.draw({ x, y: span([loss]), title: "Loss", xLabel: "optimiser step", yLabel: "loss (no unit)", lines: [{ x: steps, y: loss, colour: colours.model, width: 1.5 }] });
    const values = Object.keys(REWARD_ROLES).map((role) => curves[role]?.[1] ?? []);
    drawRewards(panels.rewards, curves, colours, { x, y: span(values), title: "Mean implicit reward" });
    node.dataset.updates = model.get("updates");
  }

  function drawState() {
    const state = model.get("state");
    node.dataset.state = state;
    status.textContent = `${STATES[state]}: step ${model.get("step")} of ${model.get("total")}`;
    bar.max = model.get("total");
    bar.value = model.get("step");
    start.textContent = model.get("start_label");
    start.disabled = !model.get("can_start");
    stop.disabled = state !== "running";
    alert.textContent = model.get("message");
    result.textContent = model.get("result");
  }

  // Large before and after in one place: a tile swaps them while the mouse or the focus is on it.
  let turning = null;
  function still() { clearInterval(turning); turning = null; }
  function swapping(prompt, before, after) {
    const image = element("img", { alt: "" }), name = element("b");
    let shown = "after";
    const show = (which) => {
      shown = which;
      showPicture(image, which === "after" ? after : before);
      image.alt = `${which}: ${prompt}`;
      name.textContent = `${which} `;
    };
    const swap = () => show(shown === "after" ? "before" : "after");
    const start = () => { if (!turning) { swap(); turning = setInterval(swap, SWAP_MS); } };
    const stop = () => { still(); show("after"); };
    show("after");
    return element("figure", { class: "dkto-swap", tabindex: "0", on: { mouseenter: start, mouseleave: stop, focus: start, blur: stop } },
      image, element("figcaption", {}, name, element("span", { class: "dkto-prompt", text: prompt })));
  }
  function drawSwaps(rows, prompts) {
    still();
    const [before, after] = ["before", "after"].map((label) => rows.find((row) => row.label === label));
    swaps.replaceChildren(...(before && after ? prompts.slice(0, after.images.length).map((prompt, i) => swapping(prompt, before.images[i], after.images[i])) : []));
  }

  function drawSamples() {
    const rows = model.get("samples"), prompts = model.get("prompts");
    drawSwaps(rows, prompts);
    if (!rows.length) return table.replaceChildren();
    const head = element("tr", {}, element("td"), ...prompts.map((prompt) => element("th", { class: "dkto-prompt", scope: "col", text: prompt })));
    const body = rows.map((row) =>
      element("tr", {}, element("th", { scope: "row", text: row.label }), ...row.images.map((bytes, i) => {
        const image = element("img", { alt: `${row.label}: ${prompts[i]}` });
        showPicture(image, bytes);
        return element("td", {}, image);
      })));
    table.replaceChildren(element("table", { "aria-label": "sample images" }, head, ...body));
  }

  node.append(element("div", { class: "dkto-row" }, start, stop, bar, status), alert,
    element("div", { class: "dkto-panels" }, panels.loss.canvas, panels.rewards.canvas), result, swaps, table);
  const undo = [
    listen(model, ["curves", "total"], drawCurves),
    listen(model, ["state", "step", "total", "can_start", "start_label", "message", "result"], drawState),
    listen(model, ["samples", "prompts"], drawSamples),
  ];
  drawCurves();
  drawState();
  drawSamples();
  return () => {
    undo.forEach((call) => call());
    still();
    Object.values(panels).forEach((panel) => panel.close());
  };
}

export default { render };
