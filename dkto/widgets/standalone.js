// An instrument in a page without a kernel. What it asks of Python is greyed; a typed utility is compiled here.

function standalone(packed) {
  const unpack = (value) => {
    if (value === null || typeof value !== "object") return value;
    if (typeof value.base64 === "string") return new DataView(Uint8Array.from(atob(value.base64), (sign) => sign.charCodeAt(0)).buffer);
    if (Array.isArray(value)) return value.map(unpack);
    return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, unpack(inner)]));
  };
  const state = unpack(packed), listeners = new Map(), own = new Set();
  const set = (name, value) => {
    state[name] = value;
    for (const handler of listeners.get(`change:${name}`) ?? []) handler();
  };
  function define(name, formula) {
    const utility = utilityFromText(formula);
    if (!/^[A-Za-z_]\w{0,39}$/.test(name)) throw new Error("the name of a utility must be one word, such as mine");
    if (Object.hasOwn(CLOSED_FORMS, name) && !own.has(name)) throw new Error(`${name} is a built-in utility: choose another name`);
    CLOSED_FORMS[name] = utility;
    own.add(name);
    const curve = { name, title: name, formula: `U(x) = ${formula}`, sign: utility.sign, colour: "#8c564b", dash: [9, 3] };
    set("curves", [...state.curves.filter((one) => one.name !== name), curve]);
    set("utility", name);
  }
  const model = {
    get: (name) => state[name],
    set: (name, value) => { state[name] = value; },
    on: (event, handler) => listeners.set(event, [...(listeners.get(event) ?? []), handler]),
    off: (event, handler) => listeners.set(event, (listeners.get(event) ?? []).filter((one) => one !== handler)),
    save_changes() {},
    send({ type, name, formula }) {
      let message = "";
      try { if (type === "utility") define(name, formula); } catch (error) { message = error.message; }
      set("message", message);
    },
  };
  const el = document.querySelector(".dkto-alone:not([data-drawn])"); // scripts of a page run in its order
  el.dataset.drawn = "yes";
  render({ model, el });
}
