// The reader's choices, which the address holds

const GROUPS = [
  { key: "model", title: "Model", of: (node) => node.model },
  { key: "family", title: "Last step", of: (node) => node.family },
  { key: "composition", title: "Composition", of: (node) => node.composition },
  { key: "budget", title: "Recovery tokens", of: (node) => String(node.budget) },
];
const hasValues = (id) => nodes.some((node) => valueOf(id, node.node));
const usable = {
  sizes: sizes.filter(({ id }) => hasValues(id)),
  qualities: qualities.filter(({ id }) => hasValues(id)),
};
const TEXTS = {
  x: (usable.sizes[0] ?? usable.qualities[0])?.id ?? "",
  y: (usable.qualities[0] ?? usable.sizes[1] ?? usable.sizes[0])?.id ?? "",
  a: "",
  b: "",
  column: "",
  law: Object.keys(laws)[0] ?? "",
  theme: "",
};
const FLAGS = { xother: false, yother: false, front: false, intervals: true, join: true, names: true, excess: false };
const state = initial();

function initial() {
  return { ...TEXTS, ...FLAGS, off: Object.fromEntries(GROUPS.map(({ key }) => [key, new Set()])), runs: null };
}

/** The state as text: what differs from the initial one. */
function hashOf() {
  const parameters = new URLSearchParams();
  for (const key of Object.keys(TEXTS)) if (state[key] !== TEXTS[key]) parameters.append(key, state[key]);
  for (const key of Object.keys(FLAGS)) if (state[key] !== FLAGS[key]) parameters.append(key, state[key] ? "1" : "0");
  for (const { key } of GROUPS) for (const value of state.off[key]) parameters.append(`no-${key}`, value);
  for (const run of state.runs ?? []) parameters.append("run", run);
  if (state.runs?.size === 0) parameters.append("run", "");
  return parameters.toString();
}

/** Takes the state from the address and ignores what the study does not have. */
function readHash() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  Object.assign(state, initial());
  for (const key of Object.keys(TEXTS)) {
    if (parameters.has(key) && isKnown(key, parameters.get(key))) state[key] = parameters.get(key);
  }
  for (const key of Object.keys(FLAGS)) if (parameters.has(key)) state[key] = parameters.get(key) === "1";
  for (const { key } of GROUPS) state.off[key] = new Set(parameters.getAll(`no-${key}`));
  if (parameters.has("run")) state.runs = new Set(parameters.getAll("run").filter((run) => nodeOf.has(run)));
}

function isKnown(key, value) {
  if (key === "x" || key === "y") return measureOf.has(value);
  if (key === "a" || key === "b") return nodeOf.has(value);
  return key !== "law" || value === "" || value in laws;
}

function writeHash() {
  const text = hashOf();
  history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
}

// Several changes before the next frame are drawn once.
const waiting = new Set();
let scheduled = false;

/** Draws these parts before the next frame. */
function draw(...parts) {
  for (const part of parts) waiting.add(part);
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    const now = [...waiting];
    waiting.clear();
    scheduled = false;
    for (const part of now) part();
  });
}

let writing = 0;

/** Changes the state and redraws parts; the address, which is slow to write, follows after the frame. */
function change(changes, ...parts) {
  Object.assign(state, changes);
  draw(...parts);
  clearTimeout(writing);
  writing = setTimeout(writeHash, 50);
}
