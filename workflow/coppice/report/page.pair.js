// Two nodes

const duel = { tests: new Map(), decoded: new Map() };
const isPair = (a, b) => state.a === a && state.b === b;

function buildPair() {
  const section = byId("pair");
  section.append(heading("pair", "Two nodes side by side"));
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
  duel.a = chooser("A", options, state.a, set("a"));
  duel.b = chooser("B", options, state.b, set("b"));
  duel.quality = chooser(
    "Measured by",
    [["", usable.qualities.map(({ id, title }) => [id, title])]],
    state.quality,
    (value) => change({ quality: value }, drawPair),
  );
  const swap = quiet("swap", () => change({ a: state.b, b: state.a }, drawFrontier, drawNode, drawPair));
  duel.body = make("div", { "aria-live": "polite" });
  section.append(make("div", { class: "controls" }, duel.a.label, duel.b.label, swap, duel.quality.label), duel.body);
}

function drawPair() {
  if (!duel.body) return;
  duel.a.select.value = state.a;
  duel.b.select.value = state.b;
  duel.quality.select.value = state.quality;
  if (!state.a || !state.b || state.a === state.b) {
    duel.body.replaceChildren(
      empty(
        state.a && state.a === state.b
          ? "A and B are the same node."
          : "Choose two nodes: here, " +
              "or by two clicks in the chart. Their difference is tested over the items that both were measured on.",
      ),
    );
    return;
  }
  const test = make("div", {}, note("Testing their difference \u2026"));
  fill(duel.body, test, everyQuality(), sideBySide());
  if (state.quality) showTest(test, state.quality, state.a, state.b);
  else fill(test, empty("No quality was measured."));
}

/** Fills an element with the test of two nodes, once it is made, if they are still the ones chosen. */
async function showTest(element, id, a, b) {
  const test = await testOf(id, a, b);
  if (!isPair(a, b) || state.quality !== id) return;
  if (!test) return fill(element, empty(untested(id, a, b)));
  fill(element, verdict(test), flipsOf(test));
  if (test.differences && !test.flips && test.differences.some((one) => one !== 0)) {
    duel.chart = make("div", { class: "chart", id: "pair-chart", role: "img" });
    element.append(duel.chart);
    drawDifferences(test);
  }
  element.append(note(testNote(test)));
}

/** The items of a node by a quality that has some, or null; decoded once. */
function itemsOf(id, name) {
  const text = study.items?.[id]?.nodes?.[name];
  if (!text) return null;
  const key = `${id} ${name}`;
  if (!duel.decoded.has(key)) duel.decoded.set(key, floats(text));
  return duel.decoded.get(key);
}

/** The paired test of A minus B: from the items where both have them, else from the study's table, else null. */
async function testOf(id, a, b) {
  const key = JSON.stringify([id, a, b]);
  const found = duel.tests.get(key) ?? (await fromItems(id, a, b)) ?? fromTable(id, a, b);
  if (found && isPair(a, b)) duel.tests.set(key, found);
  return found;
}

async function fromItems(id, a, b) {
  const [first, second] = [itemsOf(testedBy(id), a), itemsOf(testedBy(id), b)];
  if (!first || !second) return null;
  const { unit, weights } = study.items[testedBy(id)];
  const shared = [...first.keys()].filter((item) => !Number.isNaN(first[item]) && !Number.isNaN(second[item]));
  if (!shared.length) return null;
  const every = weights ? floats(weights) : null;
  const differences = Float64Array.from(shared, (item) => first[item] - second[item]);
  const tokens = Float64Array.from(shared, (item) => (every ? every[item] : 1));
  const weighted = differences.map((one, item) => one * tokens[item]);
  const test = await pairedBootstrap(weighted, tokens, study.seed ?? 0, () => isPair(a, b));
  if (!test) return null;
  const flips = unit === RIGHT_OR_WRONG ? flipsBetween(shared, first, second) : null;
  return { id, a, b, ...test, differences, flips, source: "items", adjusted: rowOf(id, a, b)?.p_adjusted ?? null };
}

/** Counts of right and wrong answers, from B to A: lost ones B had right and A has wrong. */
function flipsBetween(shared, first, second) {
  const count = (one, other) => shared.filter((item) => first[item] === one && second[item] === other).length;
  const [lost, gained] = [count(0, 1), count(1, 0)];
  return { both: count(1, 1), neither: count(0, 0), lost, gained, p: mcnemar(lost, gained) };
}

/** The row of the study's table for the pair, turned to A minus B. */
function rowOf(id, a, b) {
  const rows = pairs[testedBy(id)] ?? [];
  const row = rows.find((one) => one.a === a && one.b === b);
  if (row) return row;
  const turned = rows.find((one) => one.a === b && one.b === a);
  return turned ? { ...turned, a, b, difference: -turned.difference, low: -turned.high, high: -turned.low } : null;
}

function fromTable(id, a, b) {
  const row = rowOf(id, a, b);
  return row && { id, ...row, source: "table", adjusted: row.p_adjusted, flips: null, differences: null };
}

/** Whether the nodes are told apart: by the study's adjusted test where it compared them, else by this test alone. */
function apart(test) {
  const row = rowOf(test.id, test.a, test.b);
  return row ? row.distinguishable : test.p < 0.05;
}

function itemUnit(test) {
  const unit = study.items?.[testedBy(test.id)]?.unit ?? test.unit ?? measureOf.get(test.id).unit;
  return unit === "nats/token" ? "nats per token" : unit === RIGHT_OR_WRONG ? "percentage points" : (unit ?? "");
}

function verdict(test) {
  const winner = test.difference < 0 === lowerIsBetter(test.id) ? "A" : "B";
  const title = measureOf.get(test.id).title;
  const answer = !apart(test)
    ? "These two are not told apart"
    : better(test.id)
      ? `${winner} is better`
      : "These two differ";
  const scale = itemUnit(test) === "percentage points" ? 100 : 1;
  const [difference, low, high] = [test.difference, test.low, test.high].map((value) => signed(scale * value));
  return make(
    "div",
    { class: "verdict" },
    make("p", { class: "answer" }, `${answer} by ${title}.`),
    make(
      "p",
      {},
      `A minus B: ${difference} ${itemUnit(test)}`,
      ", 95% interval of this pair alone: ",
      make("span", { class: "number" }, `${low} to ${high}`),
      `, ${chance(test.p)}`,
      test.items ? `, over ${several(test.items, "item")}` : "",
      ".",
      perplexityRatio(test),
    ),
  );
}

/** What a difference in nats a token means as a ratio of perplexities. */
function perplexityRatio(test) {
  const { metric } = measureOf.get(test.id);
  if (!metric?.startsWith("perplexity") || !itemUnit(test).startsWith("nats")) return "";
  const [value, low, high] = [test.difference, test.low, test.high].map((one) => shown(Math.exp(one)));
  return ` That is ${value} times B's perplexity (${low} to ${high}).`;
}

function testNote(test) {
  const parts = [
    test.source === "items"
      ? `A paired bootstrap over the items, ${RESAMPLES} resamples, made here; p is at least that of a paired t test.`
      : "From the study's table of comparisons.",
  ];
  if (test.adjusted !== null && test.adjusted !== undefined) {
    parts.push(
      `Adjusted for all pairs that the study compares (Holm), ${chance(test.adjusted)}, which decides; ` +
        "the interval and the p above are of this pair alone.",
    );
  } else {
    parts.push("This p is not adjusted for how many pairs you try.");
  }
  return parts.join(" ");
}

/** Why there is no test of A and B by a quality. */
function reasonAgainst(id, a, b) {
  const missing = [measured(id, a) ? null : "A", measured(id, b) ? null : "B"].filter(Boolean);
  if (missing.length) return missing.length === 2 ? "neither was measured" : `${missing[0]} was not measured`;
  if (study.items?.[testedBy(id)]) return "no shared items";
  if (pairs[testedBy(id)] || leftOut(id)) return "the study does not compare these two by it";
  return "no paired test is made by this quality";
}

/** The sentence on items that had no room on the page, where it is about this quality's. */
const leftOut = (id) => (study.items_left_out?.includes(testedBy(id)) ? study.items_left_out : "");

const untested = (id, a, b) =>
  `There is no paired test of these two by ${measureOf.get(id).title}: ` +
  `${reasonAgainst(id, a, b)}. ${leftOut(id)}`.trim();

/** McNemar's table of right and wrong answers. */
function flipsOf({ flips }) {
  if (!flips) return null;
  return make(
    "div",
    { class: "flips" },
    table(
      ["", "B right", "B wrong"],
      [["A right", flips.both, flips.gained].map(String), ["A wrong", flips.lost, flips.neither].map(String)],
      1,
      "Right and wrong answers of both",
    ),
    note(
      `${several(flips.lost + flips.gained, "answer")} differ: ${flips.lost} only B has right, ` +
        `${flips.gained} only A. ` +
        `McNemar's exact ${chance(flips.p)}.`,
    ),
  );
}

/** How much the items differ, with zero and the mean's interval. */
function drawDifferences(test) {
  const width = widthOf(duel.chart);
  const layout = baseLayout(width, 220, { l: 52, r: 14, t: 26, b: 50 });
  const title = `A minus B of an item, ${itemUnit(test)}`;
  layout.xaxis = {
    title: axisTitle(title),
    gridcolor: themed("grid"),
    zeroline: false,
    tickfont: { color: themed("muted") },
  };
  layout.yaxis = {
    title: axisTitle("items"),
    gridcolor: themed("grid"),
    zeroline: false,
    tickfont: { color: themed("muted") },
    fixedrange: true,
  };
  const line = (x, color, dash) => ({
    type: "line",
    x0: x,
    x1: x,
    yref: "paper",
    y0: 0,
    y1: 1,
    line: { color, width: 1.5, dash },
  });
  layout.shapes = [
    {
      type: "rect",
      x0: test.low,
      x1: test.high,
      yref: "paper",
      y0: 0,
      y1: 1,
      line: { width: 0 },
      fillcolor: faint("series-1", 0.22),
    },
    line(0, themed("muted"), "4px,4px"),
    line(test.difference, themed("series-1"), "solid"),
  ];
  layout.annotations = [
    {
      x: test.difference,
      yref: "paper",
      y: 1,
      yanchor: "bottom",
      text: "mean and its 95% interval",
      showarrow: false,
      font: { size: 12, color: themed("ink") },
    },
  ];
  layout.bargap = 0.06;
  plot(
    duel.chart,
    [
      {
        type: "histogram",
        x: [...test.differences],
        nbinsx: 40,
        marker: { color: faint("series-0", 0.75) },
        hovertemplate: "%{x}: %{y} items<extra></extra>",
      },
    ],
    layout,
    { ...CONFIG, displayModeBar: false },
  );
  duel.chart.setAttribute(
    "aria-label",
    `Histogram of ${several(test.items, "item")}' differences, A minus B: mean ${shown(test.difference)}`,
  );
}

const ALONE = "of this pair alone";
const TESTED = ["quality", "verdict", "A minus B", `95% interval, ${ALONE}`, `p, ${ALONE}`, "p, adjusted"];

/** The paired test by every quality; the tests are made when the part is opened. */
function everyQuality() {
  const [a, b] = [state.a, state.b];
  const rowOfTest = ({ id, title }, test) =>
    test
      ? [
          title,
          apart(test) ? "told apart" : "not told apart",
          signed(test.difference),
          `${signed(test.low)} to ${signed(test.high)}`,
          chance(test.p),
          test.adjusted === null ? "" : chance(test.adjusted),
        ]
      : [title, reasonAgainst(id, a, b), "", "", "", ""];
  const made = async (element) => {
    const rows = [];
    for (const quality of usable.qualities) rows.push(rowOfTest(quality, await testOf(quality.id, a, b)));
    if (isPair(a, b)) fill(element, table(TESTED, rows, 2));
  };
  return folded("The test by every quality", () => {
    const element = make("div", {}, note("Testing \u2026"));
    made(element);
    return element;
  }).details;
}

function sideBySide() {
  const both = [nodeOf.get(state.a), nodeOf.get(state.b)];
  const rowsOf = (measures) =>
    measures
      .map((measure) => [measure, ...both.map(({ node }) => measured(measure.id, node))])
      .filter(([, a, b]) => a || b)
      .map(([measure, ...values]) => [
        withUnit(measure),
        ...values.map((value) => value && interval(measure.id, value)),
      ]);
  const rows = [
    ["composition", ...both.map((node) => arrows(node.composition))],
    ["recovery tokens", ...both.map((node) => (node.budget ? counted(node.budget) : "none"))],
    ...rowsOf(mainMeasures),
  ];
  const titles = ["measure", `A: ${state.a}`, `B: ${state.b}`];
  const other = rowsOf(costMeasures);
  const repeated = costMeasures.some(({ id }) => both.some(({ node }) => (measured(id, node)?.[1] ?? null) !== null));
  const costTable = () =>
    make("div", {}, table(titles, other), repeated ? note(`\u00b1 is ${OF_REPEATS}, not half a 95% interval.`) : null);
  return make(
    "div",
    {},
    table(titles, rows, 1, "The two nodes side by side"),
    other.length ? folded(`Costs, measured and simulated (${other.length})`, costTable).details : null,
  );
}
