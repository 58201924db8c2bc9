// The study

const study = JSON.parse(document.getElementById("study").textContent);
const nodes = [...study.nodes].sort((a, b) => byTree(a.node, b.node));
const nodeOf = new Map(nodes.map((node) => [node.node, node]));
const sizes = study.sizes ?? [];
const qualities = study.qualities ?? [];
const measureOf = new Map([...sizes, ...qualities].map((measure) => [measure.id, measure]));
const pairs = study.pairs ?? {};
const failures = study.failures ?? [];
const recoveries = [...(study.recoveries ?? [])].sort((a, b) => byTree(a.node, b.node));
const laws = study.laws ?? {};

// Colour shows the model and shape the last step.
const SERIES = 7; // the colours of page.css
const SHAPES = {
  dense: "star",
  prune: "triangle-up",
  decompose: "square",
  quantize: "diamond",
  recover: "circle",
  compensate: "cross",
};
const RUN_SHAPES = ["circle", "square", "diamond", "triangle-up", "cross", "star"];
const PATHS = {
  circle: "M7 2.2a4.8 4.8 0 1 0 .01 0Z",
  square: "M2.8 2.8H11.2V11.2H2.8Z",
  diamond: "M7 1.2 12.8 7 7 12.8 1.2 7Z",
  "triangle-up": "M7 1.8 12.6 11.6H1.4Z",
  cross: "M5.2 1.6H8.8V5.2H12.4V8.8H8.8V12.4H5.2V8.8H1.6V5.2H5.2Z",
  star: "M7 .8 8.6 5.1 13.2 5.3 9.6 8.1 10.8 12.6 7 10 3.2 12.6 4.4 8.1 .8 5.3 5.4 5.1Z",
};
const models = study.models.filter((model) => nodes.some((node) => node.model === model));
const colorOf = new Map(models.map((model, place) => [model, `series-${place % SERIES}`]));

/** Order of two nodes in the tree: by the steps of their paths, parents before children. */
function byTree(first, second) {
  const a = first.split("/");
  const b = second.split("/");
  const [one, other] = [study.models.indexOf(a[0]), study.models.indexOf(b[0])];
  if (one !== other) return one - other;
  for (let place = 0; place < Math.min(a.length, b.length); place++) {
    if (a[place] !== b[place]) return a[place] < b[place] ? -1 : 1;
  }
  return a.length - b.length;
}

/** [value, low, high] of a node by a measure, or null; the ends are null without an interval. */
function valueOf(id, name) {
  const values = study.values?.[id]?.[name];
  if (values) return values[0] === null ? null : values;
  const value = nodeOf.get(name)[id];
  return typeof value === "number" ? [value, null, null] : null;
}

const arrows = (composition) => composition.replaceAll(" > ", " \u2192 ");
const costs = sizes.map(({ id }) => id).filter((id) => id.includes("/")); // a cost's id names its evaluation
const isCost = (id) => costs.includes(id);
const mainMeasures = [...qualities, ...sizes.filter(({ id }) => !isCost(id))];
const costMeasures = sizes.filter(({ id }) => isCost(id));
const shapeOf = (node) => SHAPES[node.family] ?? "circle";
const isRecovered = (node) => node.budget > 0;
const shortName = (node) => node.recipe || `${node.model} (dense)`;
const isQuality = (id) => qualities.some((quality) => quality.id === id);
const better = (id) => measureOf.get(id).better; // "lower", "higher", or null if unknown
const lowerIsBetter = (id) => better(id) !== "higher";

/** The quality that the table of comparisons has instead: a loss is tested by its perplexity, in nats. */
const testedBy = (id) => {
  const perplexity = id.replace("/loss_", "/perplexity_");
  return isQuality(perplexity) ? perplexity : id;
};

/** Names of the nodes that a quality's tests do not distinguish from this one. */
function alikeOf(id, name) {
  const alike = (study.alike?.[id] ?? []).filter(([a, b]) => a === name || b === name);
  return [...new Set(alike.map(([a, b]) => (a === name ? b : a)))];
}
