// One node

const nodeView = { active: 0, matching: nodes };

function buildNode() {
  const section = byId("node");
  nodeView.search = make("input", {
    type: "search",
    placeholder: "Find a node",
    "aria-label": "Find a node",
    oninput: listNodes,
    onkeydown: (event) => event.key === "ArrowDown" && (event.preventDefault(), nodeView.list.focus()),
  });
  nodeView.list = make("div", {
    class: "list",
    role: "listbox",
    tabindex: "0",
    id: "node-list",
    "aria-label": "Nodes",
    onkeydown: moveInList,
  });
  nodeView.body = make("div", { class: "node-body" });
  section.append(
    heading("node", "Node details"),
    make("div", { class: "columns" }, make("div", { class: "finder" }, nodeView.search, nodeView.list), nodeView.body),
  );
  listNodes();
}

/** The nodes that match the search, indented as in the tree. */
function listNodes() {
  const query = nodeView.search.value.trim().toLowerCase();
  nodeView.matching = nodes.filter(({ node }) => node.toLowerCase().includes(query));
  nodeView.active = Math.max(
    0,
    nodeView.matching.findIndex(({ node }) => node === state.a),
  );
  nodeView.list.replaceChildren(
    ...nodeView.matching.map((node, place) => {
      const text = query ? node.node : node.node.split("/").at(-1);
      return make(
        "div",
        {
          role: "option",
          id: `option-${place}`,
          style: query ? null : `--depth: ${node.depth}`,
          "aria-label": node.node,
          title: node.node,
          onclick: () => {
            nodeView.active = place;
            choose(node.node);
          },
        },
        mark(shapeOf(node), inColor(node.model), isRecovered(node)),
        make("span", {}, text),
      );
    }),
  );
  if (!nodeView.matching.length) nodeView.list.append(empty("No node name contains this text."));
  markInList();
}

function markInList() {
  [...nodeView.list.querySelectorAll("[role=option]")].forEach((option, place) => {
    option.setAttribute("aria-selected", String(nodeView.matching[place].node === state.a));
    option.classList.toggle("active", place === nodeView.active);
  });
  const active = byId(`option-${nodeView.active}`);
  active
    ? nodeView.list.setAttribute("aria-activedescendant", active.id)
    : nodeView.list.removeAttribute("aria-activedescendant");
}

/** Scrolls the list, never the page, until its active node is in sight. */
function scrollList() {
  const active = byId(`option-${nodeView.active}`);
  if (!active) return;
  const { list } = nodeView;
  const [top, bottom] = [active.offsetTop, active.offsetTop + active.offsetHeight];
  if (top < list.scrollTop) list.scrollTop = top;
  if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
}

function moveInList(event) {
  const last = nodeView.matching.length - 1;
  const places = {
    ArrowDown: nodeView.active + 1,
    ArrowUp: nodeView.active - 1,
    PageDown: nodeView.active + 10,
    PageUp: nodeView.active - 10,
    Home: 0,
    End: last,
  };
  if (event.key in places) {
    nodeView.active = Math.min(Math.max(places[event.key], 0), last);
    markInList();
    scrollList();
  } else if (["Enter", " "].includes(event.key) && last >= 0) {
    choose(nodeView.matching[nodeView.active].node);
  } else {
    return;
  }
  event.preventDefault();
}

function drawNode() {
  const place = nodeView.matching.findIndex(({ node }) => node === state.a);
  if (place >= 0) nodeView.active = place;
  markInList();
  if (!state.a) {
    nodeView.body.replaceChildren(
      empty(
        "Choose a node in the chart or in this list to see its recipe, size, quality and per-layer records.",
      ),
    );
    return;
  }
  scrollList();
  const node = nodeOf.get(state.a);
  nodeView.layers = make("div");
  fill(
    nodeView.body,
    make("h3", {}, node.node),
    badges(node),
    pathOf(node),
    valuesOf(node),
    alikeSentence(node),
    make("h4", {}, "How to reproduce it"),
    node.command ? copyable(node.command, `the command of ${node.node}`) : note("No command is recorded for it."),
    note(provenance(node)),
    nodeView.layers,
  );
  drawLayers();
}

function badges(node) {
  const words = [arrows(node.composition), ...(node.traits ?? [])];
  if (node.budget) words.push(`${formatCount(node.budget)} recovery tokens`);
  return make(
    "p",
    { class: "badges" },
    [...new Set(words)].map((word) => make("span", {}, word)),
  );
}

function provenance(node) {
  const parts = [`seed ${node.seed}`];
  if (node.wall_seconds) parts.push(`computed in ${duration(node.wall_seconds)}`);
  if (node.recovered_share !== null && node.recovered_share !== undefined) {
    parts.push(`recovery regained ${Math.round(100 * node.recovered_share)}% of the loss increase`);
  }
  if (node.fingerprint) parts.push(`fingerprint ${node.fingerprint.slice(0, 12)}`);
  const text = `${parts.join(", ")}.`;
  return text[0].toUpperCase() + text.slice(1);
}

const duration = (seconds) =>
  seconds < 90
    ? `${formatNumber(seconds, 2)} s`
    : seconds < 5400
      ? `${formatNumber(seconds / 60, 2)} min`
      : `${formatNumber(seconds / 3600, 2)} h`;

/** The steps from the dense model to the node, with their options. */
function pathOf(node) {
  const color = inColor(node.model);
  const start = make(
    "li",
    {},
    mark(SHAPES.dense, color, false),
    make("b", {}, node.model),
    make("small", {}, "dense model"),
  );
  const steps = (node.path ?? []).map(({ step, method, family, options }) => {
    const chosen = Object.entries(options ?? {}).filter(([, value]) => value !== null);
    const list = () =>
      make(
        "dl",
        {},
        chosen
          .map(([name, value]) => [
            make("dt", {}, name),
            make("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value)),
          ])
          .flat(),
      );
    return make(
      "li",
      {},
      mark(SHAPES[family] ?? "circle", color, family === "recover"),
      make("b", {}, step),
      make("small", {}, `${family}: ${method}`),
      chosen.length ? foldable(plural(chosen.length, "option"), list).details : null,
    );
  });
  return make("ol", { class: "path", "aria-label": "Recipe" }, start, steps);
}

/** Its qualities, sizes and (folded) costs, next to those of its dense model. */
function valuesOf(node) {
  const dense = node.depth && nodeOf.has(node.model) ? node.model : null;
  const row = (measure) => {
    const own = valueOf(measure.id, node.node);
    const before = dense && valueOf(measure.id, dense);
    return (
      own && [
        withUnit(measure),
        formatValue(measure.id, own[0]),
        uncertainty(measure.id, own),
        ...(dense
          ? [before ? formatValue(measure.id, before[0]) : "", before?.[0] ? ratioTo(measure, own[0], before[0]) : ""]
          : []),
      ]
    );
  };
  const titles = (ends) => ["measure", "value", ends, ...(dense ? ["dense model", "change"] : [])];
  const [main, other] = [mainMeasures, costMeasures].map((measures) => measures.map(row).filter(Boolean));
  return [
    main.length
      ? table(titles("95% interval"), main, 1, `Sizes and qualities of ${node.node}`)
      : empty("This node has no measurements."),
    other.length
      ? foldable(`Costs, measured and simulated (${other.length})`, () => table(titles(OF_REPEATS), other)).details
      : null,
  ];
}

const ratioTo = (measure, value, before) =>
  measure.log || before > 2 ? `\u00d7${formatNumber(value / before)}` : formatSigned(value - before);

function alikeSentence(node) {
  const items = qualities.flatMap(({ id, title }) => {
    const names = alikeOf(id, node.node);
    return names.length
      ? [
          make(
            "li",
            {},
            `${title}: `,
            names.flatMap((name, place) => [place ? ", " : "", nodeButton(name)]),
          ),
        ]
      : [];
  });
  const title = make("h4", {}, "Not significantly different from");
  return items.length ? make("div", {}, title, make("ul", {}, items)) : null;
}
