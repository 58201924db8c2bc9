// Two nodes

const pairView = {};

function buildPair() {
  const section = byId("pair");
  section.append(heading("pair", "Compare two nodes"));
  if (nodes.length < 2) {
    section.append(empty("The study has a single node so far."));
    return;
  }
  const groups = models.map((model) => [
    model,
    nodes.filter((node) => node.model === model).map(({ node }) => [node, node]),
  ]);
  const options = [["", [["", "Choose a node"]]], ...groups];
  const set = (key) => (value) => change({ [key]: value }, drawFrontier, drawNode, drawPair);
  pairView.a = chooser("A", options, state.a, set("a"));
  pairView.b = chooser("B", options, state.b, set("b"));
  const swap = quiet("swap", () => change({ a: state.b, b: state.a }, drawFrontier, drawNode, drawPair));
  pairView.body = make("div", { "aria-live": "polite" });
  section.append(make("div", { class: "controls" }, pairView.a.label, pairView.b.label, swap), pairView.body);
}

function drawPair() {
  if (!pairView.body) return;
  const { a, b } = state;
  pairView.a.select.value = a;
  pairView.b.select.value = b;
  if (a && b && a !== b) return fill(pairView.body, testsOf(a, b), sideBySide(a, b));
  const text = a && a === b ? "A and B are the same node." : "Choose two nodes here, or by two clicks in the chart.";
  fill(pairView.body, empty(text));
}

/** The row of the study's comparisons for a pair by a quality, as A minus B; undefined where it was not tested. */
function comparisonOf(id, a, b) {
  const rows = pairs[testedBy(id)] ?? [];
  const row = rows.find((one) => one.a === a && one.b === b);
  if (row) return row;
  const swapped = rows.find((one) => one.a === b && one.b === a);
  return (
    swapped && {
      ...swapped,
      difference: -swapped.difference,
      low: -swapped.high,
      high: -swapped.low,
      flips: swapped.flips && { ...swapped.flips, lost: swapped.flips.gained, gained: swapped.flips.lost },
    }
  );
}

const TEST_TITLES = ["quality", "verdict", "A minus B", "95% interval", "p", "Holm-adjusted p"];

/** The paired tests that the study has of two nodes, or the sentence that says why there is none. */
function testsOf(a, b) {
  const tested = usable.qualities
    .filter((quality) => testedBy(quality.id) === quality.id)
    .map((quality) => [quality, comparisonOf(quality.id, a, b)])
    .filter(([, row]) => row);
  if (!tested.length)
    return note(
      "These two nodes were not tested against each other: tables/comparisons.parquet holds each node against its " +
        "dense model, its parent and the next better node. The intervals below are those of each node alone.",
    );
  const rows = tested.map(([{ id, title }, row]) => [
    title,
    verdictOf(id, row),
    inPoints(row, [row.difference]),
    inPoints(row, [row.low, row.high]),
    formatP(row.p),
    formatP(row.p_adjusted),
  ]);
  return [
    table(TEST_TITLES, rows, 2, "Paired tests of the two nodes"),
    ...tested.map(([{ title }, { flips }]) => flips && note(flipsSentence(title, flips))).filter(Boolean),
    note(
      "Paired bootstrap over the items, from tables/comparisons.parquet. Intervals and raw p-values are per pair; " +
        "the Holm-adjusted p decides significance, so an interval that excludes 0 can still be non-significant.",
    ),
  ];
}

/** Differences with their unit; those of accuracies in percentage points. */
function inPoints({ unit }, values) {
  const accuracy = unit === "accuracy";
  const texts = values.map((value) => formatSigned(accuracy ? 100 * value : value));
  return `${texts.join(" to ")} ${accuracy ? "points" : unit}`;
}

function verdictOf(id, { difference, distinguishable }) {
  if (!distinguishable) return "not significantly different";
  if (!better(id)) return "significantly different";
  return difference < 0 === lowerIsBetter(id) ? "A is better" : "B is better";
}

const flipsSentence = (title, { lost, gained, p }) =>
  `${title}: ${plural(lost + gained, "answer")} differ; only B is right in ${lost}, only A in ${gained} ` +
  `(McNemar's exact ${formatP(p)}).`;

function sideBySide(a, b) {
  const both = [nodeOf.get(a), nodeOf.get(b)];
  const rowsOf = (measures) =>
    measures
      .map((measure) => [measure, ...both.map(({ node }) => valueOf(measure.id, node))])
      .filter(([, first, second]) => first || second)
      .map(([measure, ...values]) => [
        withUnit(measure),
        ...values.map((value) => value && interval(measure.id, value)),
      ]);
  const rows = [
    ["composition", ...both.map((node) => arrows(node.composition))],
    ["recovery tokens", ...both.map((node) => (node.budget ? formatCount(node.budget) : "none"))],
    ...rowsOf(mainMeasures),
  ];
  const titles = ["measure", `A: ${a}`, `B: ${b}`];
  const other = rowsOf(costMeasures);
  const repeated = costMeasures.some(({ id }) => both.some(({ node }) => (valueOf(id, node)?.[1] ?? null) !== null));
  const costTable = () =>
    make("div", {}, table(titles, other), repeated ? note(`\u00b1 is ${OF_REPEATS}, not half a 95% interval.`) : null);
  return make(
    "div",
    {},
    table(titles, rows, 1, "The two nodes next to each other"),
    other.length ? foldable(`Costs, measured and simulated (${other.length})`, costTable).details : null,
  );
}
