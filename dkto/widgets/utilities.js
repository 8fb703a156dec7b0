// Utilities in closed form, for curves and for training in a page; dkto.objective.utilities holds the same in torch.

const sigmoid = (x) => (x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x)));
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));

// U and U' of the built-in utilities, and whether the sign of a sample is inside or outside of U; a test compares them.
const CLOSED_FORMS = {
  kahneman_tversky: { value: sigmoid, slope: (x) => sigmoid(x) * sigmoid(-x), sign: "inside" },
  loss_averse: { value: (x) => -softplus(-x), slope: (x) => sigmoid(-x), sign: "inside" },
  risk_seeking: { value: softplus, slope: sigmoid, sign: "outside" },
  risk_seeking_literal: { value: softplus, slope: sigmoid, sign: "inside" },
  exponential: { value: Math.exp, slope: Math.exp, sign: "outside" },
  linear: { value: (x) => x, slope: () => 1, sign: "inside" },
};
