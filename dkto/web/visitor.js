// A visitor for tests: judges by a rule, tunes, and compares on prompts and noise that were not shown.

async function simulatedVisitor({ taste, seed, beta, gamma, steps, count = 40, method = "kto", utility = "kahneman_tversky", shuffled = false, again = 2 }) {
  const call = state.machine.call, pool = [];
  for (let k = 0; k < count; k++) {
    const prompt = PROMPTS.train[k % PROMPTS.train.length];
    pool.push({ prompt, ...(await call("draw", { prompt, seed: 1000 * seed + k })) });
  }
  const rule = judgedBy(taste, pool.map((image) => image.pixels)), liked = shuffled ? random(seed + 99).shuffle(rule) : rule, log = [];
  const settings = { method, utility, beta, gamma, steps, seed, rate: DEFAULTS.rate, warmup: DEFAULTS.warmup };
  const { lora } = await call("tune", { likes: pool.map(({ prompt, latents }, i) => ({ prompt, latents, liked: liked[i] })), settings }, (record) => log.push(record));
  const measures = [];
  for (let round = 0; round < again; round++) {
    for (const [k, prompt] of PROMPTS.held.entries()) {
      const values = [];
      for (const scale of [0, 1]) values.push(TASTES[taste].measure((await call("draw", { prompt, seed: 900_000_000 + 1000 * seed + 100 * round + k, scale, lora })).pixels));
      measures.push(values);
    }
  }
  const wins = measures.filter(([before, after]) => after > before).length;
  return {
    wins, n: measures.length, before: mean(measures.map((m) => m[0])), after: mean(measures.map((m) => m[1])),
    health: health(log, CLOSED_FORMS[utility].slope, method), agree: liked.filter((value, i) => value === rule[i]).length,
  };
}
