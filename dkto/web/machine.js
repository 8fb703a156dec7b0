// Between page and worker: what this browser can do, how the files arrive, questions and answers.

// A WebAssembly function with one instruction of SIMD; onnxruntime needs it, and no megabyte is fetched without it.
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11);

// Why the model cannot run in this browser, in a sentence; empty if it can.
function lacking() {
  if (typeof WebAssembly !== "object") return "This browser has no WebAssembly.";
  if (!WebAssembly.validate(SIMD)) return "This browser has no WebAssembly SIMD, which the model needs.";
  if (typeof DecompressionStream !== "function") return "This browser cannot unpack the model (it has no DecompressionStream).";
  if (typeof Worker !== "function") return "This browser has no workers.";
  if (navigator.deviceMemory && navigator.deviceMemory < 1) return "This device has less than 1 GB of memory.";
  return "";
}

// A file of the page: packed inside it, or beside it where it is served. Some servers unpack by themselves.
async function readFile(name) {
  const inside = document.getElementById(`file-${name}`);
  let bytes;
  if (inside) {
    const signs = atob(inside.textContent);
    inside.remove();
    bytes = new Uint8Array(signs.length); // `Uint8Array.from` would make a list of all signs first
    for (let i = 0; i < bytes.length; i++) bytes[i] = signs.charCodeAt(i);
  } else {
    const answer = await fetch(`files/${name}.gz`);
    if (!answer.ok) throw new Error(`${name} could not be fetched (${answer.status})`);
    bytes = new Uint8Array(await answer.arrayBuffer());
  }
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes.buffer;
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

// The model in its worker: `call(what, arguments, note)` answers as worker.js does.
async function startMachine(onDeath) {
  const names = ["runtime", "glue", "worker", "wasm", "weights", "about", "text", "unet", "vae", "step"];
  const found = await Promise.all(names.map(readFile)), file = Object.fromEntries(names.map((name, i) => [name, found[i]]));
  const text = (bytes) => new TextDecoder().decode(bytes), waiting = new Map();
  const script = URL.createObjectURL(new Blob([file.runtime, "\n", file.worker], { type: "text/javascript" }));
  const worker = new Worker(script);
  let last = 0;
  const die = (why) => {
    worker.terminate();
    for (const { no } of waiting.values()) no(new Error(why));
    waiting.clear();
    onDeath(why);
  };
  worker.onerror = (event) => { event.preventDefault(); die(event.message || "the worker ended"); };
  worker.onmessage = ({ data: { id, note, error, result } }) => {
    const one = waiting.get(id);
    if (!one) return;
    if (note) { one.note?.(note); return; }
    waiting.delete(id);
    if (error) one.no(new Error(error));
    else one.yes(result);
  };
  const call = (what, values = {}, note = null, handed = []) => new Promise((yes, no) => {
    waiting.set(++last, { yes, no, note });
    worker.postMessage({ id: last, do: what, ...values }, handed);
  });
  const started = call("start", {
    about: JSON.parse(text(file.about)), weights: file.weights, wasm: file.wasm,
    graphs: Object.fromEntries(["text", "unet", "vae", "step"].map((name) => [name, file[name]])),
    glue: `data:text/javascript;base64,${btoa(text(file.glue))}`, // a Blob's address of the page is not importable in a worker of file://
  }, null, ["weights", "wasm", "text", "unet", "vae", "step"].map((name) => file[name])); // handed over: a copy of them would stay in the page
  const late = new Promise((_, no) => { setTimeout(() => no(new Error("the model did not start within two minutes")), 120_000); });
  await Promise.race([started, late]);
  URL.revokeObjectURL(script);
  return { call, die };
}
