// Blind judging: two images without a name. Which is whose stays in the kernel until the last answer.

function render({ model, el }) {
  const node = root(el, "judge", "Blind judging");
  const status = element("p", { class: "dkto-status", role: "status", "aria-live": "polite" });
  const bar = element("progress", { "aria-label": "questions answered" });
  const alert = element("div", { class: "dkto-alert", role: "alert" });
  const question = element("p", { class: "dkto-question" });
  const prompt = element("p", { class: "dkto-prompt" });
  const images = Object.fromEntries(["left", "right"].map((side) => [side, element("img", { alt: `${side} image` })]));
  const pair = pairOf(images, answer);
  const undoButton = element("button", { type: "button", text: "undo (z)", "aria-keyshortcuts": "z", on: { click: () => model.send({ type: "undo" }) } });
  const result = element("div", { class: "dkto-result" });
  const stage = element("div", { tabindex: "0", role: "group", "aria-label": "pair to judge; the arrows choose, z takes back" }, prompt, question, pair);
  let asked = null;

  function answer(side) {
    const number = model.get("number");
    if (number < 0 || asked === number) return;
    asked = number;
    model.send({ type: "answer", number, side });
    stage.focus();
  }

  shortcuts(node, { ArrowLeft: () => answer("left"), ArrowRight: () => answer("right"), z: () => model.send({ type: "undo" }) });

  function draw() {
    asked = null;
    const number = model.get("number"), done = number < 0;
    status.textContent = `${model.get("answered")} of ${model.get("total")} answered`;
    bar.max = model.get("total");
    bar.value = model.get("answered");
    alert.textContent = model.get("message");
    question.textContent = done ? "" : model.get("question");
    prompt.textContent = model.get("prompt");
    pair.hidden = done;
    node.dataset.number = number;
    for (const [side, image] of Object.entries(images)) showPicture(image, model.get(side));
    const found = model.get("result");
    result.replaceChildren();
    if (!found.rows) return;
    const chart = element("img", { class: "dkto-chart", alt: `Bar chart. ${found.text}` });
    showPicture(chart, found.chart);
    result.append(element("p", { text: found.text }),
      element("table", {}, element("tr", {}, ...found.head.map((text) => element("th", { scope: "col", text }))),
        ...found.rows.map((row) => element("tr", {}, ...row.map((text) => element("td", { text }))))), chart);
  }

  node.append(element("div", { class: "dkto-row" }, bar, status, undoButton), stage, alert, result);
  const undo = listen(model, ["number", "answered", "left", "right", "prompt", "result", "message"], settled(0, draw));
  draw();
  return undo;
}

export default { render };
