// A utility typed as text, such as "tanh(x / 2)": the grammar of dkto.objective.formula, parsed and never evaluated.

const FUNCTIONS = {
  abs: Math.abs, arctan: Math.atan, exp: Math.exp, expm1: Math.expm1, log: Math.log, log1p: Math.log1p, logsigmoid: (x) => -softplus(-x),
  relu: (x) => Math.max(x, 0), sigmoid, sinh: Math.sinh, softplus, sqrt: Math.sqrt, tanh: Math.tanh,
};
const FUNCTIONS_OF_TWO = { maximum: Math.max, minimum: Math.min };
const CONSTANTS = { pi: Math.PI, e: Math.E };
const OPERATORS = { "+": (a, b) => a + b, "-": (a, b) => a - b, "*": (a, b) => a * b, "/": (a, b) => a / b };

// The function of x that a formula says; an Error in one sentence where it says anything else.
function compileFormula(text) {
  const refuse = (why) => { throw new Error(`the formula ${JSON.stringify(text.slice(0, 60))} cannot be used: ${why}`); };
  if (text.length > 200) refuse(`it has ${text.length} signs, more than 200`);
  const parts = text.match(/\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+|[A-Za-z_]\w*|\*\*|[-+*/(),]|\S/g) ?? [];
  if (parts.length > 100) refuse(`it has ${parts.length} parts, more than 100`);
  if (!parts.includes("x")) refuse("it does not depend on x");
  let at = 0;
  const take = (part) => (parts[at] === part ? parts[at++] : null);
  const need = (part) => take(part) ?? refuse(`expected ${part}, got ${parts[at] ?? "its end"}`);
  const chain = (next, signs) => () => {
    let left = next();
    while (signs.includes(parts[at])) {
      const operate = OPERATORS[parts[at++]], [first, second] = [left, next()];
      left = (x) => operate(first(x), second(x));
    }
    return left;
  };
  function signed() {
    if (take("-")) { const inner = signed(); return (x) => -inner(x); }
    if (take("+")) return signed();
    const base = atom();
    if (!take("**")) return base;
    const sign = take("-") ? -1 : 1, power = sign * Number(parts[at++]);
    if (!(Math.abs(power) <= 10)) refuse("the exponent of a power must be a number from -10 to 10");
    return (x) => base(x) ** power;
  }
  function atom() {
    const part = parts[at++];
    if (part === "(") { const inner = sum(); need(")"); return inner; }
    if (part === "x") return (x) => x;
    if (Object.hasOwn(CONSTANTS, part)) return () => CONSTANTS[part];
    if (/^[\d.]/.test(part)) {
      const number = Number(part);
      return number <= 1e6 ? () => number : refuse(`a number must be at most 1e6, got ${part}`);
    }
    const one = Object.hasOwn(FUNCTIONS, part) && FUNCTIONS[part], two = Object.hasOwn(FUNCTIONS_OF_TWO, part) && FUNCTIONS_OF_TWO[part];
    if (!one && !two) refuse(part === undefined ? "it ends too early" : `${part} is not known; known: x, ${[...Object.keys(CONSTANTS), ...Object.keys(FUNCTIONS), ...Object.keys(FUNCTIONS_OF_TWO)].join(", ")}`);
    need("(");
    const first = sum();
    if (two) need(",");
    const second = two && sum();
    need(")");
    return two ? (x) => two(first(x), second(x)) : (x) => one(first(x));
  }
  const sum = chain(chain(signed, ["*", "/"]), ["+", "-"]);
  const found = sum();
  if (at < parts.length) refuse(`${parts[at]} is not expected there`);
  return found;
}

// A utility of one's own, with its slope; it must be finite and increasing where the page uses it.
function utilityFromText(text, reach = 16) {
  const value = compileFormula(text), step = 1e-4, slope = (x) => (value(x + step) - value(x - step)) / (2 * step);
  for (let x = -reach; x <= reach; x += 1 / 16) {
    if (!Number.isFinite(value(x)) || !Number.isFinite(slope(x))) throw new Error(`the utility ${text} must be finite from -${reach} to ${reach}, but is not at x = ${x}`);
    if (slope(x) < -1e-6) throw new Error(`the utility ${text} must be increasing, but falls at x = ${x}`);
  }
  if (value(reach) <= value(-reach)) throw new Error(`the utility ${text} must be increasing, but is constant`);
  return { value, slope, sign: "inside" };
}
