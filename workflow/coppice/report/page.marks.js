// The marks of the first chart: Plotly draws its frame and zooms; the marks are drawn here, because to hide and move
// five hundred that stand already takes a small part of the time of new traces.

const RING = 10; // pixels: radius of the ring around a chosen mark
const REACH = 18; // pixels from the pointer to the mark that it means
const layer = {
  root: svg("svg", { class: "marks" }),
  models: new Map(),
  points: new Map(),
  spots: new Map(),
  bottom: null,
  top: null,
};

function buildMarks() {
  layer.bottom = svg("g");
  layer.top = svg("g");
  const groups = models.map((model) => {
    const bars = svg("path", { class: "intervals", fill: "none", "stroke-width": 1.5, "stroke-opacity": 0.6 });
    const group = svg("g", { style: `color: ${inColor(model)}`, stroke: "currentColor" }, bars);
    layer.models.set(model, { group, bars });
    return group;
  });
  layer.root.append(layer.bottom, ...groups, layer.top);
  for (const node of nodes) {
    const point = svg("path", {
      class: "point",
      d: PATHS[shapeOf(node)],
      fill: recovered(node) ? "currentColor" : "none",
      "stroke-width": 1.5,
      display: "none",
      "data-node": node.node,
    });
    layer.models.get(node.model).group.append(point);
    layer.points.set(node.node, point);
  }
  layer.tip = make("div", { class: "tip", hidden: true, "aria-hidden": "true" });
  layer.pointed = svg("circle", {
    r: RING,
    fill: "none",
    stroke: "currentColor",
    "stroke-width": 1.2,
    display: "none",
  });
}

/** Shows these points and no others: [{node, x, y}]; `front`: those that the stairs join. */
function drawMarks(points, front, ranges, layout) {
  const place = pixels(ranges, layout);
  const { width, height, margin } = layout;
  const box = { x: margin.l, y: margin.t, width: width - margin.l - margin.r, height: height - margin.t - margin.b };
  for (const [name, value] of Object.entries(box)) layer.root.setAttribute(name, value);
  layer.root.style.translate = `${box.x}px ${box.y}px`;
  layer.margin = margin;
  layer.spots = new Map(points.map((point) => [point.node.node, place(point)]));
  for (const [name, point] of layer.points) {
    const spot = layer.spots.get(name);
    point.setAttribute("display", spot ? "inline" : "none");
    if (spot) point.setAttribute("transform", `translate(${round(spot[0] - 7)},${round(spot[1] - 7)})`);
  }
  for (const [model, { bars }] of layer.models) {
    bars.setAttribute("d", state.intervals ? intervalPath(points, model, ranges, place) : "");
  }
  layer.bottom.replaceChildren(stairs(front, ranges, place), joins(points));
  layer.top.replaceChildren(
    ...rings(),
    ...(state.names ? namesOf(points, front, ranges, layout, place) : []),
    layer.pointed,
  );
  leave();
}

const round = (value) => Math.round(10 * value) / 10;

/** Where a point lies in the chart, in pixels from its left and upper edge. */
function pixels(ranges, { width, height, margin }) {
  const along = (value, [low, high], log) =>
    log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  const [wide, tall] = [width - margin.l - margin.r, height - margin.t - margin.b];
  const [logX, logY] = [isLog("x"), isLog("y")];
  return ({ x, y }) => [along(x[0], ranges.x, logX) * wide, (1 - along(y[0], ranges.y, logY)) * tall];
}

/** The intervals of one model's points, as one broken line. */
function intervalPath(points, model, ranges, place) {
  let path = "";
  for (const { node, x, y } of points) {
    if (node.model !== model) continue;
    const at = ([low, high]) => [place({ x: [low[0]], y: [low[1]] }), place({ x: [high[0]], y: [high[1]] })];
    const [down, up] = clipped(y, ranges.y);
    const [left, right] = clipped(x, ranges.x);
    if (y[1] !== null)
      path += segment(
        at([
          [x[0], down],
          [x[0], up],
        ]),
      );
    if (x[1] !== null)
      path += segment(
        at([
          [left, y[0]],
          [right, y[0]],
        ]),
      );
  }
  return path;
}

const segment = ([[x, y], [toX, toY]]) => `M${round(x)} ${round(y)}L${round(toX)} ${round(toY)}`;

/** The ends of an interval, not far beyond the chart, and positive where a logarithm is taken of them. */
const clipped = ([, low, high], [bottom, top]) => [
  Math.max(low, Math.min(bottom, low > 0 ? low : bottom)),
  Math.min(high, top * 10),
];

/** The boundary of what the front reaches. */
function stairs(front, ranges, place) {
  const { x, y } = corners(front, ranges);
  const spots = x.map((value, step) => place({ x: [value], y: [y[step]] }).map(round));
  return svg("path", {
    class: "stairs",
    d: spots.length ? `M${spots.map((spot) => spot.join(" ")).join("L")}` : "",
    fill: "none",
    stroke: "var(--muted)",
    "stroke-width": 1.4,
    "stroke-dasharray": "5 4",
  });
}

/** The corners of the front's steps, in the axes' values. */
function corners(front, ranges) {
  const [worstX, worstY] = [ranges.x[lowerIsBetter(state.x) ? 1 : 0], ranges.y[lowerIsBetter(state.y) ? 1 : 0]];
  const [x, y] = [[], []];
  front.forEach((point, place) => {
    x.push(point.x[0], point.x[0]);
    y.push(place ? front[place - 1].y[0] : worstY, point.y[0]);
  });
  if (front.length) {
    x.push(worstX);
    y.push(front.at(-1).y[0]);
  }
  return { x, y };
}

/** Thin lines between shown nodes that the quality upwards (or else across) does not tell apart. */
function joins(points) {
  const id = isQuality(state.y) ? state.y : state.x;
  const found = state.join
    ? (study.alike?.[id] ?? []).filter(([a, b]) => layer.spots.has(a) && layer.spots.has(b))
    : [];
  const d = found.map(([a, b]) => segment([layer.spots.get(a), layer.spots.get(b)])).join("");
  return svg("path", { class: "joins", d, fill: "none", stroke: "var(--join)" });
}

/** Rings around the chosen nodes. */
function rings() {
  return [state.a, state.b]
    .filter((name) => layer.spots.has(name))
    .map((name) => {
      const [cx, cy] = layer.spots.get(name);
      return svg("circle", { class: "ring", cx, cy, r: RING, fill: "none", stroke: "var(--ink)", "stroke-width": 1.6 });
    });
}

/** Names beside the chosen nodes and the front's, where they hide nothing. */
function namesOf(points, front, ranges, layout, place) {
  const isChosen = ({ node }) => node.node === state.a || node.node === state.b;
  const taken = [...[...layer.spots.values()].map((spot) => around(spot, 6, 6)), ...risers(front, ranges, place)];
  return [...points.filter(isChosen), ...front.filter((point) => !isChosen(point))].flatMap((point) => {
    const text = shortName(point.node);
    const [x, y] = layer.spots.get(point.node.node);
    const spot = roomFor(text, [x, y], taken, layout);
    if (!spot) return [];
    const [anchor, vertical, right, up] = spot;
    const away = isChosen(point) ? RING / 7 : 1; // beside the ring
    const baseline = y - away * up + { top: 11, middle: 4, bottom: -3 }[vertical];
    return svg("text", { class: "name", x: round(x + away * right), y: round(baseline), "text-anchor": anchor }, text);
  });
}

/** The upright parts of the stairs, as narrow boxes that a name should not cross. */
function risers(front, ranges, place) {
  const { x, y } = corners(front, ranges);
  return front.map((_, step) => {
    const [first, second] = [2 * step, 2 * step + 1].map((at) => place({ x: [x[at]], y: [y[at]] }));
    return [first[0] - 1, Math.min(first[1], second[1]), first[0] + 1, Math.max(first[1], second[1])];
  });
}

const around = ([x, y], wide, tall) => [x - wide, y - tall, x + wide, y + tall];
const overlap = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];

// Where a name may stand beside its point: which of its ends, and how many pixels it is moved right and up.
const SPOTS = [
  ["start", "middle", 9, 0],
  ["end", "middle", -9, 0],
  ["middle", "bottom", 0, 8],
  ["middle", "top", 0, -8],
  ["start", "bottom", 6, 5],
  ["end", "top", -6, -5],
  ["end", "bottom", -6, 5],
  ["start", "top", 6, -5],
];

/** The first spot beside a point where a name of this length hides nothing, which is then taken; or null. */
function roomFor(text, [x, y], taken, { width, height, margin }) {
  const [wide, tall] = [text.length * 6.8, 14];
  const [right, bottom] = [width - margin.l - margin.r, height - margin.t - margin.b];
  for (const spot of SPOTS) {
    const left = x + spot[2] - { start: 0, middle: wide / 2, end: wide }[spot[0]];
    const top = y - spot[3] - { top: 0, middle: tall / 2, bottom: tall }[spot[1]];
    const box = [left, top, left + wide, top + tall];
    const inside = box[0] > 0 && box[1] > 0 && box[2] < right && box[3] < bottom;
    if (inside && !taken.some((other) => overlap(box, other))) {
      taken.push(box);
      return spot;
    }
  }
  return null;
}

/** Tells what is under the pointer, and chooses it at a click; a drag is Plotly's, which zooms. */
function listenToPointer() {
  let down = null;
  frontier.chart.addEventListener("pointermove", (event) => point(nearest(event)));
  frontier.chart.addEventListener("pointerleave", leave);
  frontier.chart.addEventListener("pointerdown", (event) => {
    down = event.button === 0 ? event : null;
  });
  addEventListener("pointerup", (event) => {
    const still = down && Math.hypot(event.clientX - down.clientX, event.clientY - down.clientY) < 5;
    const name = still ? nearest(down) : null;
    down = null;
    if (name) choose(name);
  });
}

/** The name of the shown node next to the pointer, or null. */
function nearest({ clientX, clientY }) {
  const box = frontier.chart.getBoundingClientRect();
  const [x, y] = [clientX - box.left - layer.margin.l, clientY - box.top - layer.margin.t];
  let [name, least] = [null, REACH];
  for (const [one, spot] of layer.spots) {
    const distance = Math.hypot(spot[0] - x, spot[1] - y);
    if (distance < least) [name, least] = [one, distance];
  }
  return name;
}

/** Shows what is told of a node beside its mark. */
function point(name) {
  if (name === layer.at) return;
  leave();
  if (!name) return;
  layer.at = name;
  const [x, y] = layer.spots.get(name);
  layer.pointed.setAttribute("cx", x);
  layer.pointed.setAttribute("cy", y);
  layer.pointed.setAttribute("display", "inline");
  frontier.chart.classList.add("pointing");
  fill(layer.tip, tipLines(frontier.points.find(({ node }) => node.node === name)));
  layer.tip.hidden = false;
  const left = x + layer.margin.l;
  const turned = left > frontier.width / 2; // to the side that has more room
  const across = turned ? `calc(${round(left - 14)}px - 100%)` : `${round(left + 14)}px`;
  layer.tip.style.translate = `${across} ${round(y + layer.margin.t - 12)}px`;
}

function leave() {
  layer.at = null;
  layer.tip.hidden = true;
  layer.pointed.setAttribute("display", "none");
  frontier.chart.classList.remove("pointing");
}

function tipLines({ node, x, y }) {
  const alike = isQuality(state.y) ? alikeOf(state.y, node.node) : [];
  const lines = [
    `${measureOf.get(state.x).title}: ${told(state.x, x)}`,
    `${measureOf.get(state.y).title}: ${told(state.y, y)}`,
    arrows(node.composition) + (node.budget ? `, ${counted(node.budget)} recovery tokens` : ""),
  ];
  if (alike.length)
    lines.push(`not told apart from ${alike.slice(0, 3).join(", ")}${alike.length > 3 ? " \u2026" : ""}`);
  return [make("b", {}, node.node), ...lines.map((line) => make("div", {}, line))];
}

/** Saves the chart as a picture, with the colours that it has now. */
function savePicture() {
  const picture = svg("svg", { xmlns: "http://www.w3.org/2000/svg" });
  for (const drawn of [frontier.chart.querySelector(".main-svg"), layer.root]) {
    const copy = drawn.cloneNode(true);
    const [own, copied] = [drawn, copy].map((root) => [...root.querySelectorAll("path, circle, text, rect")]);
    copied.forEach((element, place) => {
      const style = getComputedStyle(own[place]);
      for (const name of ["fill", "stroke", "font-size", "font-family", "paint-order"])
        element.style[name] = style[name];
    });
    picture.append(copy);
  }
  const text = new XMLSerializer().serializeToString(picture);
  const address = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
  make("a", { href: address, download: `${study.study}.svg` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
