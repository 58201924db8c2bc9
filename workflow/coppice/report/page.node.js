// One node

const story = { active: 0, matching: nodes };

function buildNode() {
  const section = byId("node");
  story.search = make("input", {
    type: "search",
    placeholder: "Find a node",
    "aria-label": "Find a node",
    oninput: listNodes,
    onkeydown: (event) => event.key === "ArrowDown" && (event.preventDefault(), story.list.focus()),
  });
  story.list = make("div", {
    class: "list",
    role: "listbox",
    tabindex: "0",
    id: "node-list",
    "aria-label": "Nodes",
    onkeydown: moveInList,
  });
  story.body = make("div", { class: "story" });
  section.append(
    heading("node", "One node"),
    make("div", { class: "columns" }, make("div", { class: "finder" }, story.search, story.list), story.body),
  );
  listNodes();
}

/** The list of nodes that the search lets through, indented as in the tree. */
function listNodes() {
  const wanted = story.search.value.trim().toLowerCase();
  story.matching = nodes.filter(({ node }) => node.toLowerCase().includes(wanted));
  story.active = Math.max(
    0,
    story.matching.findIndex(({ node }) => node === state.a),
  );
  story.list.replaceChildren(
    ...story.matching.map((node, place) => {
      const text = wanted ? node.node : node.node.split("/").at(-1);
      return make(
        "div",
        {
          role: "option",
          id: `option-${place}`,
          style: wanted ? null : `--depth: ${node.depth}`,
          "aria-label": node.node,
          title: node.node,
          onclick: () => {
            story.active = place;
            choose(node.node);
          },
        },
        mark(shapeOf(node), inColor(node.model), recovered(node)),
        make("span", {}, text),
      );
    }),
  );
  if (!story.matching.length) story.list.append(empty("No node has this in its name."));
  markInList();
}

function markInList() {
  [...story.list.querySelectorAll("[role=option]")].forEach((option, place) => {
    option.setAttribute("aria-selected", String(story.matching[place].node === state.a));
    option.classList.toggle("active", place === story.active);
  });
  const active = byId(`option-${story.active}`);
  active
    ? story.list.setAttribute("aria-activedescendant", active.id)
    : story.list.removeAttribute("aria-activedescendant");
}

/** Scrolls the list, never the page, until its active node is in sight. */
function scrollList() {
  const active = byId(`option-${story.active}`);
  if (!active) return;
  const [top, bottom] = [active.offsetTop, active.offsetTop + active.offsetHeight];
  if (top < story.list.scrollTop) story.list.scrollTop = top;
  if (bottom > story.list.scrollTop + story.list.clientHeight) story.list.scrollTop = bottom - story.list.clientHeight;
}

function moveInList(event) {
  const last = story.matching.length - 1;
  const places = {
    ArrowDown: story.active + 1,
    ArrowUp: story.active - 1,
    PageDown: story.active + 10,
    PageUp: story.active - 10,
    Home: 0,
    End: last,
  };
  if (event.key in places) {
    story.active = Math.min(Math.max(places[event.key], 0), last);
    markInList();
    scrollList();
  } else if (["Enter", " "].includes(event.key) && last >= 0) {
    choose(story.matching[story.active].node);
  } else {
    return;
  }
  event.preventDefault();
}

function drawNode() {
  const place = story.matching.findIndex(({ node }) => node === state.a);
  if (place >= 0) story.active = place;
  markInList();
  if (!state.a) {
    story.body.replaceChildren(
      empty(
        "Choose a node in the chart or in this list to read its story: how it was made, what it " +
          "stores, what it can do, and what happened in each layer.",
      ),
    );
    return;
  }
  scrollList();
  const node = nodeOf.get(state.a);
  story.layers = make("div");
  fill(
    story.body,
    make("h3", {}, node.node),
    badges(node),
    pathOf(node),
    valuesOf(node),
    alikeSentence(node),
    make("h4", {}, "Make it again"),
    node.command ? copyable(node.command, `the command of ${node.node}`) : note("The study tells no command for it."),
    note(provenance(node)),
    story.layers,
  );
  drawLayers();
}

function badges(node) {
  const words = [arrows(node.composition), ...(node.traits ?? [])];
  if (node.budget) words.push(`${counted(node.budget)} recovery tokens`);
  return make(
    "p",
    { class: "badges" },
    [...new Set(words)].map((word) => make("span", {}, word)),
  );
}

function provenance(node) {
  const parts = [`seed ${node.seed}`];
  if (node.wall_seconds) parts.push(`made in ${duration(node.wall_seconds)}`);
  if (node.recovered_share !== null && node.recovered_share !== undefined) {
    parts.push(`recovery won back ${Math.round(100 * node.recovered_share)}% of the loss`);
  }
  if (node.fingerprint) parts.push(`fingerprint ${node.fingerprint.slice(0, 12)}`);
  const text = `${parts.join(", ")}.`;
  return text[0].toUpperCase() + text.slice(1);
}

const duration = (seconds) =>
  seconds < 90
    ? `${shown(seconds, 2)} s`
    : seconds < 5400
      ? `${shown(seconds / 60, 2)} min`
      : `${shown(seconds / 3600, 2)} h`;

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
    const given = Object.entries(options ?? {}).filter(([, value]) => value !== null);
    const list = () =>
      make(
        "dl",
        {},
        given
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
      given.length ? folded(several(given.length, "option"), list).details : null,
    );
  });
  return make("ol", { class: "path", "aria-label": "How it was made" }, start, steps);
}

/** Its qualities and sizes, and folded its costs, beside its dense model's. */
function valuesOf(node) {
  const dense = node.depth && nodeOf.has(node.model) ? node.model : null;
  const row = (measure) => {
    const own = measured(measure.id, node.node);
    const before = dense && measured(measure.id, dense);
    return (
      own && [
        withUnit(measure),
        quantity(measure.id, own[0]),
        sureness(measure.id, own),
        ...(dense
          ? [before ? quantity(measure.id, before[0]) : "", before?.[0] ? ratioTo(measure, own[0], before[0]) : ""]
          : []),
      ]
    );
  };
  const titles = (ends) => ["measure", "value", ends, ...(dense ? ["dense model", "change"] : [])];
  const [main, other] = [mainMeasures, costMeasures].map((measures) => measures.map(row).filter(Boolean));
  return [
    main.length
      ? table(titles("95% interval"), main, 1, `What ${node.node} is`)
      : empty("Nothing of this node was measured."),
    other.length
      ? folded(`Costs, measured and simulated (${other.length})`, () => table(titles(OF_REPEATS), other)).details
      : null,
  ];
}

const ratioTo = (measure, value, before) =>
  measure.log || before > 2 ? `\u00d7${shown(value / before)}` : signed(value - before);

function alikeSentence(node) {
  const found = qualities.flatMap(({ id, title }) => {
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
  return found.length ? make("div", {}, make("h4", {}, "Not told apart from"), make("ul", {}, found)) : null;
}
