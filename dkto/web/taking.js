// Section 6, what a visitor can take along, and the part for a class.

const pngOf = (pixels) => new Promise((resolve) => {
  imageCanvas("", pixels).toBlob(async (blob) => resolve(new Uint8Array(await blob.arrayBuffer())), "image/png");
});

async function likesZip() {
  const images = judged(), files = {}, rows = [["image", "prompt", "liked"]];
  for (const [k, image] of images.entries()) {
    const name = `${String(k).padStart(2, "0")}.png`;
    files[name] = await pngOf(image.pixels);
    rows.push([name, image.prompt, image.liked ? 1 : 0]);
  }
  return zipOf({ "likes.csv": new TextEncoder().encode(csvOf(rows)), ...files });
}
const linkTo = (settings) => location.href.split("#")[0] + fragmentOf(settings);
const linkNow = () => {
  const { group, count, steps, card, ...alone } = state.settings;
  return linkTo(group ? { group, count, steps } : { ...alone, count, steps }); // a class's link is for everybody
};

function buildTaking() {
  const likes = button("Likes and images (likes.zip)", async () => saveAs("likes.zip", await likesZip(), "application/zip"), { id: "save-likes" });
  const lora = button("The LoRA (safetensors)", () => saveAs("pytorch_lora_weights.safetensors", state.tuned.file), { id: "save-lora" });
  const disliked = button("The LoRA of the dislikes", () => saveAs("disliked_lora_weights.safetensors", state.tuned.disliked), { id: "save-disliked" });
  const link = element("input", { type: "text", class: "link", readonly: true, id: identifier() }), copied = element("span", { role: "status", class: "note" });
  const copy = button("Copy", async () => {
    link.select();
    try { await navigator.clipboard.writeText(link.value); copied.textContent = "Copied."; } catch { copied.textContent = "Select the link and copy it."; }
  });
  host("take").append(element("div", { class: "dkto-row" }, likes, lora, disliked), element("label", { for: link.id, text: "A link with these settings; no image and no answer is in it" }), element("div", { class: "dkto-row" }, link, copy, copied));
  parts.take = () => {
    likes.disabled = !judged().length;
    lora.disabled = disliked.disabled = !state.tuned?.file || Boolean(state.tuning);
    disliked.hidden = !state.tuned?.disliked;
    link.value = linkNow();
    copied.textContent = "";
  };
}

// A class's cards: which taste a number stands for depends on the class, so that no number gives it away.
const tasteOfCard = ({ group, card }) => Object.values(TASTES)[random(1000 * group + card).below(Object.keys(TASTES).length)];

function buildClassroom() {
  const group = element("input", { type: "number", id: identifier(), min: 1, max: 999_999, value: 1 + (crypto.getRandomValues(new Uint32Array(1))[0] % 9999) });
  const link = element("input", { type: "text", class: "link", readonly: true, id: identifier() });
  const show = () => { link.value = linkTo({ group: group.value, count: 24, steps: 60 }); };
  group.addEventListener("input", show);
  show();
  const codes = element("textarea", { id: identifier(), rows: 4, spellcheck: "false" }), table = element("div");
  codes.addEventListener("input", () => table.replaceChildren(...classTable(codes.value)));
  host("classroom").append(
    element("div", { class: "dkto-row" }, element("div", { class: "field" }, element("label", { for: group.id, text: "number of the class" }), group)),
    element("label", { for: link.id, text: "link for the class" }), element("div", { class: "dkto-row" }, link),
    element("label", { for: codes.id, text: "codes of the results, one a line" }), codes, table);
}

// The table of pasted codes, and one interval over all their answers.
function classTable(text) {
  const lines = text.split(/[\s,;]+/).filter(Boolean), found = lines.map((line) => ({ line, result: readCode(line) }));
  const good = found.filter(({ result }) => result).map(({ result }) => result), wrong = found.filter(({ result }) => !result).map(({ line }) => line);
  if (!found.length) return [];
  const sum = (name) => good.reduce((total, one) => total + one[name], 0), all = { wins: sum("wins"), losses: sum("losses"), ties: sum("ties") };
  const row = (cells, tag = "td") => element("tr", {}, ...cells.map((cell) => element(tag, { text: String(cell), scope: tag === "th" ? "col" : null })));
  const cards = good.map((one) => row([one.card, tasteOfCard(one).title, one.wins, one.losses, one.ties]));
  const decided = all.wins + all.losses, [low, high] = decided ? wilson(all.wins, decided) : [0, 1];
  return [
    ...(good.length ? [element("table", {}, row(["card", "taste", "tuned preferred", "base preferred", "no difference"], "th"), ...cards)] : []),
    element("p", { class: "result", role: "status", text: decided ? `The class preferred the tuned models on ${all.wins} of ${decided} pairs: ${percent(all.wins / decided)} % [${percent(low)}, ${percent(high)}].` : "No pair with a difference yet." }),
    ...(wrong.length ? [element("p", { class: "dkto-alert", text: `Not a code, or mistyped: ${wrong.slice(0, 5).join(", ").slice(0, 100)}` })] : []),
  ];
}
