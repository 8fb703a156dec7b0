// A visitor for tests, in Node: judges by a rule, tunes, and compares on prompts and noise that were not shown.

const COMPARISONS = 24;

function makeVisitor(engine, pools) {
  const known = new Map(); // images of the base, which several visitors see
  const draw = async (prompt, seed, lora) => {
    const key = `${prompt} ${seed}`;
    if (lora) return engine.draw({ prompt, seed, scale: 1, lora });
    if (!known.has(key)) known.set(key, await engine.draw({ prompt, seed }));
    return known.get(key);
  };
  return async ({ taste, seed, shuffled = false, ...more }) => {
    const settings = { ...DEFAULTS, ...TASTES[taste].settings, ...more, seed }, { train, compared } = pools[settings.pool], pool = [], log = [], measures = [];
    for (let k = 0; k < settings.count; k++) pool.push({ prompt: train[k % train.length], ...(await draw(train[k % train.length], 1000 * seed + k)) });
    const rule = judgedBy(taste, pool.map((image) => image.pixels)), liked = shuffled ? random(seed + 99).shuffle(rule) : rule;
    const likes = pool.map(({ prompt, latents }, i) => ({ prompt, latents, liked: liked[i] })), utility = CLOSED_FORMS[settings.utility];
    const began = performance.now(), { lora } = await engine.tune(likes, { ...settings, utility }, (record) => log.push(record), () => false), ms = performance.now() - began;
    for (let k = 0; k < COMPARISONS; k++) {
      const prompt = compared[k % compared.length], at = 900_000_000 + 1000 * seed + k;
      measures.push([await draw(prompt, at), await draw(prompt, at, lora)].map((image) => TASTES[taste].measure(image.pixels)));
    }
    return {
      wins: measures.filter(([before, after]) => after > before).length, n: measures.length, before: mean(measures.map((m) => m[0])), after: mean(measures.map((m) => m[1])),
      health: health(log, utility.slope, settings.method), agree: liked.filter((value, i) => value === rule[i]).length, seconds: ms / 1000,
    };
  };
}
