// The toy to touch. Clouds of the grid are here already; the button lets the kernel train, and the cloud follows.

function render({ model, el }) {
  const node = root(el, "playground", "Toy playground");
  const colours = model.get("colours"), world = model.get("world"), choices = model.get("choices");
  const roles = { desirable: "liked", undesirable: "disliked" };
  const [low, high] = [world.low, world.high];
  const state = { method: "kahneman_tversky", beta: 10, gamma: 0.8, clamp: true, flip: 0 };
  const means = structuredClone(model.get("means"));
  let cloud = new Float32Array(0), target = cloud, from = cloud, began = 0, frame = 0;

  const canvas = element("canvas", { role: "img", "aria-label": "samples of the model" });
  const context = canvas.getContext("2d");
  const field = element("div", { class: "dkto-field" }, canvas);
  const status = element("p", { class: "dkto-status", role: "status", "aria-live": "polite" });
  const alert = element("div", { class: "dkto-alert", role: "alert" });
  const train = element("button", { type: "button", class: "dkto-main", text: "Train it now", on: { click: () => { train.disabled = true; model.send({ type: "train", settings: state, means }); } } });
  const alone = model.get("alone") ?? ""; // why nothing can be trained; a kernel trains
  train.disabled = Boolean(alone);
  const home = element("button", { type: "button", text: "Put the Gaussians back", disabled: Boolean(alone), on: { click: () => { Object.assign(means, structuredClone(world.start)); draw(); show(); } } });

  function setting(name, label, values, toText = String) {
    const options = Object.fromEntries(values.map((value) => [value, toText(value)]));
    const made = choice(`${label} `, options, state[name], (value) => { state[name] = name === "method" ? value : Number(value); show(); });
    made.select.dataset.setting = name;
    return made.node;
  }
  const clampId = identifier();
  const clamp = element("input", { type: "checkbox", id: clampId, checked: true, "data-setting": "clamp" });
  clamp.addEventListener("change", () => { state.clamp = clamp.checked; show(); });

  function key() {
    const flip = `flip=${state.flip}`;
    if (state.method === "sft") return `sft ${flip}`;
    if (state.method === "dpo") return `dpo beta=${state.beta} ${flip}`;
    return `${state.method} beta=${state.beta} gamma=${state.gamma} clamp=${state.clamp ? "yes" : "no"} ${flip}`;
  }
  const points = (view) => new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  const atHome = () => Object.keys(roles).every((role) => means[role].every((x, i) => Math.abs(x - world.start[role][i]) < 1e-9));
  const x = (value) => ((value - low[0]) / (high[0] - low[0])) * canvas.clientWidth;
  const y = (value) => (1 - (value - low[1]) / (high[1] - low[1])) * canvas.clientHeight;

  function draw() {
    const size = canvas.clientWidth;
    if (!size) return;
    const ratio = Math.min(window.devicePixelRatio || 1, 3);
    canvas.style.height = `${size}px`;
    if (canvas.width !== Math.round(size * ratio)) canvas.width = canvas.height = Math.round(size * ratio);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = "#ffffff";
    context.fillRect(0, 0, size, size);
    context.strokeStyle = "#bbbbbb";
    context.strokeRect(0.5, 0.5, size - 1, size - 1);
    const circle = (mean, radius, colour, dash) => {
      context.strokeStyle = colour;
      context.setLineDash(dash);
      context.lineWidth = 2;
      context.beginPath();
      context.arc(x(mean[0]), y(mean[1]), (radius / (high[0] - low[0])) * size, 0, 7);
      context.stroke();
      context.setLineDash([]);
    };
    const [px, py, ps] = world.pretraining;
    circle([px, py], 2 * ps, colours.pretraining, [2, 4]);
    circle(means.desirable, 2 * world.std, colours.desirable, []);
    circle(means.undesirable, 2 * world.std, colours.undesirable, [7, 4]);
    context.fillStyle = colours.model;
    context.globalAlpha = 0.4;
    for (let i = 0; i < cloud.length; i += 2) context.fillRect(x(cloud[i]) - 1, y(cloud[i + 1]) - 1, 2.2, 2.2);
    context.globalAlpha = 1;
    for (const [role, handle] of Object.entries(handles)) {
      handle.style.left = `${x(means[role][0])}px`;
      handle.style.top = `${y(means[role][1])}px`;
      handle.setAttribute("aria-label", `${roles[role]} Gaussian at ${short(means[role][0])}, ${short(means[role][1])}; arrows move it`);
    }
  }

  // Same noise for every setting: each point walks from its old to its new place.
  function walkTo(next) {
    cancelAnimationFrame(frame);
    from = cloud.length === next.length ? cloud : next;
    target = next;
    began = performance.now();
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const step = (now) => {
      const share = still ? 1 : Math.max(0, Math.min(1, (now - began) / 350));
      cloud = target.map((value, i) => from[i] + (value - from[i]) * share);
      draw();
      if (share < 1) frame = requestAnimationFrame(step);
    };
    step(began);
  }

  function tell(what, shown) {
    let near = 0, count = 0;
    const distance = (i, role) => (shown[i] - means[role][0]) ** 2 + (shown[i + 1] - means[role][1]) ** 2;
    for (let i = 0; i < shown.length; i += 2) { count += 1; if (!(distance(i, "desirable") <= distance(i, "undesirable"))) near += 1; }
    status.textContent = `${what}: ${Math.round((100 * near) / Math.max(1, count))} % of ${count} samples lie nearer to the disliked centre`;
    canvas.setAttribute("aria-label", `samples of the model. ${status.textContent}`);
  }

  const titled = (key) => key.replace(/^\S+/, (name) => choices.titles[name] ?? name);

  function show() {
    const clouds = model.get("clouds"), name = key();
    node.dataset.key = name;
    if (!atHome()) { status.textContent = "The Gaussians were moved: press Train it now."; return; }
    if (!clouds[name]) { status.textContent = "This setting is not in the grid: press Train it now."; return; }
    const next = points(clouds[name]);
    walkTo(next);
    tell(titled(name), next);
  }

  function showTrained() {
    const trained = model.get("trained");
    if (!trained.points) return;
    const next = points(trained.points);
    node.dataset.step = trained.step;
    node.dataset.frames = Number(node.dataset.frames ?? 0) + 1;
    walkTo(next);
    tell(`${titled(trained.key)}, trained now, step ${trained.step}`, next);
  }

  const handles = Object.fromEntries(Object.entries(roles).map(([role, word]) => {
    const handle = element("button", { type: "button", class: "dkto-handle", "data-role": role, disabled: Boolean(alone), text: word === "liked" ? "+" : "−" });
    handle.style.color = colours[role];
    const place = (px, py) => {
      means[role] = [px, py].map((value, i) => Math.round(Math.min(high[i], Math.max(low[i], value)) * 100) / 100);
      draw();
      show();
    };
    handle.addEventListener("pointerdown", (event) => { handle.setPointerCapture(event.pointerId); event.preventDefault(); handle.focus(); });
    handle.addEventListener("pointermove", (event) => {
      if (!handle.hasPointerCapture(event.pointerId)) return;
      const box = canvas.getBoundingClientRect();
      place(low[0] + ((event.clientX - box.left) / box.width) * (high[0] - low[0]), low[1] + (1 - (event.clientY - box.top) / box.height) * (high[1] - low[1]));
    });
    handle.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [-0.02, 0], ArrowRight: [0.02, 0], ArrowUp: [0, 0.02], ArrowDown: [0, -0.02] }[event.key];
      if (!move) return;
      event.preventDefault();
      place(means[role][0] + move[0], means[role][1] + move[1]);
    });
    return [role, handle];
  }));
  field.append(...Object.values(handles));

  node.append(
    element("div", { class: "dkto-stage" }, field,
      element("div", { class: "dkto-controls" },
        setting("method", "method", choices.method, (name) => choices.titles[name]), setting("beta", "beta (per unit of mean squared error)", choices.beta),
        setting("gamma", "gamma, share of liked samples", choices.gamma),
        setting("flip", "label noise", choices.flip, (v) => `${100 * v} % wrong`),
        element("div", {}, clamp, element("label", { for: clampId, text: " keep the reference point at or above 0" })),
        element("div", { class: "dkto-row" }, train, home), status, alert,
        element("p", {}, element("b", { text: "+" }), " liked, ", element("b", { text: "−" }), ` disliked${alone ? "" : ": drag them, or use the arrow keys"}; dotted: pretraining; black: the model's samples. Circles are 2σ.`), element("p", { class: "dkto-status", text: alone }))));
  const undo = [
    listen(model, ["trained"], showTrained),
    listen(model, ["clouds"], show),
    listen(model, ["means"], () => { Object.assign(means, structuredClone(model.get("means"))); draw(); }),
    listen(model, ["busy", "message"], () => { train.disabled = model.get("busy"); alert.textContent = model.get("message"); if (!model.get("busy")) train.disabled = false; }),
  ];
  const observer = new ResizeObserver(draw);
  observer.observe(canvas);
  cloud = points(model.get("clouds").base);
  requestAnimationFrame(() => { draw(); show(); });
  return () => {
    undo.forEach((call) => call());
    observer.disconnect();
    cancelAnimationFrame(frame);
  };
}

export default { render };
