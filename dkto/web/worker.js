// The worker's door: a message {id, do, ...} is answered by {id, result}, {id, note} on the way, or {id, error}.

let engine = null, stopped = false;
const utilityOf = (settings) => ({ ...settings, utility: settings.formula ? utilityFromText(settings.formula) : CLOSED_FORMS[settings.utility] });
const doors = {
  async start({ about, weights, graphs, wasm, glue }) {
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmBinary = wasm;
    ort.env.wasm.wasmPaths = { mjs: glue };
    engine = await makeEngine(ort, about, weights, graphs);
    ort.env.wasm.wasmBinary = undefined; // it is compiled
  },
  prepare: () => engine.open("step"),
  draw: (message) => engine.draw(message),
  async tune({ likes, settings }, tell) {
    stopped = false;
    return engine.tune(likes, utilityOf(settings), tell, () => stopped);
  },
  stop: async () => { stopped = true; },
  file: async ({ lora, side }) => engine.file(lora, side),
};

self.onmessage = async ({ data: message }) => {
  const answer = (more) => self.postMessage({ id: message.id, ...more });
  try { answer({ result: await doors[message.do](message, (note) => answer({ note })) }); }
  catch (error) { answer({ error: String(error?.message ?? error) }); }
};
