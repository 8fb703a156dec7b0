// Shared by every instrument; dkto.widgets.base joins it in front of the instrument's own file.
// Data reach the page through textContent, attributes and canvas only: no string is ever parsed as HTML.

function element(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(options)) {
    if (key === "text") node.textContent = value;
    else if (key === "on") for (const [name, handler] of Object.entries(value)) node.addEventListener(name, handler);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  // JupyterLab takes arrows, Enter, z and more as its own shortcuts unless the focused element itself forbids it
  if (["input", "button", "select"].includes(tag) || "tabindex" in options) node.setAttribute("data-lm-suppress-shortcuts", "true");
  node.append(...children);
  return node;
}

let lastIdentifier = 0;
const identifier = () => `dkto-${Date.now().toString(36)}-${++lastIdentifier}`;

function root(el, name, label) {
  const node = element("section", { class: `dkto dkto-${name}`, "aria-label": label });
  el.append(node);
  return node;
}

// A labelled range input. `toText` shows a position, `fromPosition` turns it into the value.
function slider({ label, min, max, step, position, toText, onInput }) {
  const id = identifier();
  const output = element("output", { for: id });
  const input = element("input", { type: "range", id, min, max, step });
  const show = (value) => {
    input.value = value;
    output.textContent = toText(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", (event) => {
    output.textContent = toText(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
    onInput(Number(input.value), event);
  });
  show(position);
  return { node: element("div", { class: "dkto-slider" }, element("label", { for: id, text: label }), input, output), input, show };
}

// A labelled list of choices {value: text}.
function choice(label, options, value, onChange) {
  const id = identifier(), select = element("select", { id }, ...Object.entries(options).map(([key, text]) => element("option", { value: key, text })));
  select.value = value;
  select.addEventListener("change", () => onChange(select.value));
  return { node: element("div", { class: "field" }, element("label", { for: id, text: label }), select), select };
}

const short = (value) => {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e4 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
  return String(Number(value.toPrecision(3)));
};

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw) ?? raw;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
  return found;
}

// One pair of axes on a canvas. `draw(spec)` paints lines, bars and vertical marks at once.
function axes(label, height = 230) {
  const canvas = element("canvas", { role: "img", "aria-label": label, class: "dkto-canvas" });
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  let last = null;

  function draw(spec) {
    last = spec;
    const width = canvas.clientWidth;
    if (!width) return;
    const ratio = Math.min(window.devicePixelRatio || 1, 3);
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const theme = getComputedStyle(canvas), themed = (name, colour) => theme.getPropertyValue(`--dkto-${name}`).trim() || colour;
    const paper = themed("paper", "#ffffff"), ink = themed("ink", "#333333"), grid = themed("grid", "#e6e6e6");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = paper;
    context.fillRect(0, 0, width, height);
    const left = 52, right = 16, top = spec.title ? 22 : 8, bottom = 36;
    const [x0, x1] = spec.x, [y0, y1] = spec.y;
    const px = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
    const py = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);
    context.font = "12px sans-serif";
    context.lineWidth = 1;
    context.textAlign = "center";
    context.textBaseline = "top";
    for (const value of ticks(x0, x1, Math.max(2, Math.min(8, width / 60)))) {
      context.strokeStyle = value === 0 ? "#999999" : grid;
      context.beginPath();
      context.moveTo(px(value), top);
      context.lineTo(px(value), height - bottom);
      context.stroke();
      context.fillStyle = ink;
      context.fillText(short(value), px(value), height - bottom + 4);
    }
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const value of ticks(y0, y1, 5)) {
      context.strokeStyle = value === 0 ? "#999999" : grid;
      context.beginPath();
      context.moveTo(left, py(value));
      context.lineTo(width - right, py(value));
      context.stroke();
      context.fillStyle = ink;
      context.fillText(spec.yText ? spec.yText(value) : short(value), left - 5, py(value));
    }
    context.fillStyle = ink;
    context.textAlign = "center";
    context.textBaseline = "bottom";
    context.fillText(spec.xLabel ?? "", (left + width - right) / 2, height - 3);
    context.save();
    context.translate(12, (top + height - bottom) / 2);
    context.rotate(-Math.PI / 2);
    context.textBaseline = "middle";
    context.fillText(spec.yLabel ?? "", 0, 0);
    context.restore();
    if (spec.title) {
      context.textBaseline = "top";
      context.fillStyle = ink;
      context.font = "bold 12px sans-serif";
      context.fillText(spec.title, (left + width - right) / 2, 4);
      context.font = "12px sans-serif";
    }
    context.save();
    context.beginPath();
    context.rect(left, top, width - left - right, height - top - bottom);
    context.clip();
    for (const bar of spec.bars ?? []) {
      context.globalAlpha = bar.alpha ?? 1;
      context.fillStyle = bar.colour;
      const from = py(0), to = py(bar.y);
      context.fillRect(px(bar.x0), Math.min(from, to), Math.max(1, px(bar.x1) - px(bar.x0) - 0.5), Math.abs(to - from));
    }
    context.globalAlpha = 1;
    for (const mark of spec.marks ?? []) {
      context.strokeStyle = mark.colour;
      context.setLineDash([2, 3]);
      context.lineWidth = 1.5;
      context.beginPath();
      context.moveTo(px(mark.x), top);
      context.lineTo(px(mark.x), height - bottom);
      context.stroke();
    }
    for (const line of spec.lines ?? []) {
      context.strokeStyle = line.colour;
      context.lineWidth = line.width ?? 2;
      context.setLineDash(line.dash ?? []);
      context.beginPath();
      let open = false;
      for (let i = 0; i < line.x.length; i++) {
        const x = line.x[i], y = line.y[i];
        if (!Number.isFinite(y)) { open = false; continue; }
        const far = Math.max(-1e4, Math.min(1e4, py(y)));
        if (open) context.lineTo(px(x), far);
        else context.moveTo(px(x), far);
        open = true;
      }
      context.stroke();
    }
    for (const dot of spec.dots ?? []) {
      context.globalAlpha = dot.alpha ?? 1;
      context.fillStyle = dot.colour;
      if (!dot.radius) { context.fillRect(px(dot.x) - 1, py(dot.y) - 1, 2, 2); continue; }
      context.beginPath();
      context.arc(px(dot.x), py(dot.y), dot.radius, 0, 7);
      context.fill();
      context.strokeStyle = dot.ring ? ink : paper;
      context.lineWidth = dot.ring ? 2.5 : 1;
      context.setLineDash([]);
      context.stroke();
    }
    context.globalAlpha = 1;
    context.setLineDash([]);
    context.restore();
    if (spec.legend) {
      let y = top + 6;
      context.textAlign = "left";
      context.textBaseline = "middle";
      for (const entry of spec.legend) {
        const text = entry.label, w = context.measureText(text).width;
        context.globalAlpha = 0.8;
        context.fillStyle = paper;
        context.fillRect(left + 6, y - 2, w + 36, 16);
        context.globalAlpha = 1;
        context.strokeStyle = entry.colour;
        context.lineWidth = 2;
        context.setLineDash(entry.dash ?? []);
        context.beginPath();
        context.moveTo(left + 10, y + 6);
        context.lineTo(left + 34, y + 6);
        context.stroke();
        context.setLineDash([]);
        context.fillStyle = ink;
        context.fillText(text, left + 40, y + 6);
        y += 16;
      }
    }
  }

  const again = () => last && draw(last), dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", again);
  const observer = new ResizeObserver(again);
  observer.observe(canvas);
  return { canvas, draw, close: () => { observer.disconnect(); dark.removeEventListener("change", again); } };
}

// The interval of all finite values with some room; at least from `low` to `high`, if given.
function span(values, low = Infinity, high = -Infinity) {
  const finite = values.flat().filter(Number.isFinite);
  [low, high] = [Math.min(low, ...finite), Math.max(high, ...finite)];
  if (!(low <= high)) return [0, 1];
  const room = 0.08 * (high - low) || 0.1 * Math.abs(high) || 0.1;
  return [low - room, high + room];
}

// Rewards over steps on axes; each of `curves` is [[step, ...], [reward, ...]], by its role.
const REWARD_ROLES = { desirable: ["liked", []], undesirable: ["disliked", [6, 3]], reference_point: ["reference point", [2, 3]] };
function drawRewards(plot, curves, colours, spec) {
  const line = (role) => { const [x, y] = curves[role] ?? [[], []]; return { x, y, colour: colours[role], dash: REWARD_ROLES[role][1], width: 2 }; };
  const legend = Object.entries(REWARD_ROLES).map(([role, [label, dash]]) => ({ label, colour: colours[role], dash }));
  plot.draw({ xLabel: "optimiser step", yLabel: "implicit reward", lines: Object.keys(REWARD_ROLES).map(line), legend, ...spec });
}

// Judgements in words, and the keys that give them, wherever images are liked or disliked.
const WORDS = { like: "liked", dislike: "disliked", skip: "skipped", "": "not judged" };
const judgingKeys = (like, dislike, takeBack) => ({ ArrowRight: like, l: like, ArrowLeft: dislike, d: dislike, z: takeBack });

// A short line that shows a curve's colour and dashes, for a legend.
function swatch(colour, dash = []) {
  const canvas = element("canvas", { width: 48, height: 16, class: "dkto-swatch", "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  context.strokeStyle = colour;
  context.lineWidth = 2;
  context.setLineDash(dash);
  context.beginPath();
  context.moveTo(0, 4);
  context.lineTo(24, 4);
  context.stroke();
  return canvas;
}

const LARGE = 128; // pixels of an image from which it is drawn smoothly

// Bytes of a PNG or JPEG as the source of an <img>; the last address of each image is given back when it changes.
function showPicture(image, bytes) {
  if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
  if (!bytes || !bytes.byteLength) {
    image.removeAttribute("src");
    return;
  }
  image.onload = () => { image.style.imageRendering = image.naturalWidth > LARGE ? "auto" : ""; };
  const first = bytes instanceof DataView ? bytes.getUint8(0) : new Uint8Array(bytes.buffer ?? bytes)[0];
  image.src = URL.createObjectURL(new Blob([bytes], { type: first === 0xff ? "image/jpeg" : "image/png" }));
}

// Keys of a part of the page, by their names: an action is called once a press, those of `repeating` as long as it lasts.
function shortcuts(node, actions, repeating = []) {
  const handle = (event) => {
    const action = actions[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (!event.repeat || repeating.includes(event.key)) action();
  };
  node.addEventListener("keydown", handle);
  return handle;
}

// Two images side by side as buttons, of which `answer` gets "left" or "right".
function pairOf(images, answer) {
  const button = (side, text) => element("button", { type: "button", "data-side": side, "aria-keyshortcuts": side === "left" ? "ArrowLeft" : "ArrowRight", on: { click: () => answer(side) } },
    images[side], element("span", { text }));
  return element("div", { class: "dkto-pair" }, button("left", "← left"), button("right", "right →"));
}

// Save bytes or text as a file of the visitor.
function saveAs(name, data, type) {
  const address = URL.createObjectURL(new Blob([data], { type }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

// Calls that may come often: only the last within `wait` milliseconds is made.
function settled(wait, call) {
  let timer = null;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), wait);
  };
}

// Listen to the kernel's changes; returns what undoes it when the view closes.
function listen(model, names, handler) {
  for (const name of names) model.on(`change:${name}`, handler);
  return () => { for (const name of names) model.off(`change:${name}`, handler); };
}
