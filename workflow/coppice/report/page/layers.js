// A node's layers

const COLUMN_TITLES = {
  rank: "rank kept",
  sparsity: "sparsity, share of zeros",
  bits: "bits per weight",
  error: "relative error of the output",
};
const LAYER = /^(?:.*\.)?(?:layers|blocks|h)\.(\d+)(?:\.(.+))?$/;
/** Values of a column as text: counts without a point. */
const formatterOf = (values) =>
  values.every((one) => one === null || Number.isInteger(one))
    ? (one) => (one === null ? "" : String(one))
    : (one) => formatNumber(one);
const columnTitle = (name) => COLUMN_TITLES[name] ?? name.replaceAll("_", " ");

function drawLayers() {
  const record = study.layers?.[state.a];
  const columns = Object.keys(record?.columns ?? {});
  if (!columns.length) {
    nodeView.layers.replaceChildren(
      make("h4", {}, "By layer"),
      note(
        nodeOf.get(state.a).depth
          ? "This node has no per-layer records."
          : "The dense model's layers are unchanged.",
      ),
    );
    return;
  }
  const varies = (name) => new Set(record.columns[name].filter((value) => value !== null)).size > 1;
  const column = columns.includes(state.column) ? state.column : (columns.find(varies) ?? columns[0]);
  const chart = make("div", {
    class: "chart",
    id: "layers-chart",
    role: "img",
    "aria-label": `${columnTitle(column)} by layer of ${state.a}; the table below has the same values`,
  });
  const picked = (name) => change({ column: name }, drawLayers);
  const rows = foldable("These values as a table", () =>
    table(
      ["module", ...columns.map(columnTitle)],
      record.modules.map((module, place) => [
        module,
        ...columns.map((name) => formatterOf(record.columns[name])(record.columns[name][place])),
      ]),
    ),
  );
  const options = [["", columns.map((name) => [name, columnTitle(name)])]];
  fill(
    nodeView.layers,
    make("h4", {}, `By layer: ${columnTitle(column)}`),
    columns.length > 1
      ? make("div", { class: "controls" }, chooser("Column", options, column, picked).label)
      : null,
    chart,
    rows.details,
  );
  const values = record.columns[column];
  const parts = record.modules
    .map((module) => LAYER.exec(module))
    .map((part) => part && [part[0], part[1], part[2] ?? "block"]);
  parts.every(Boolean) ? heatmap(chart, parts, values, column) : bars(chart, record.modules, values, column);
}

/** Kinds of modules by layers, coloured by the value, which is printed in cells that are wide enough. */
function heatmap(chart, parts, values, column) {
  const depths = [...new Set(parts.map(([, depth]) => Number(depth)))].sort((a, b) => a - b);
  const kinds = [...new Set(parts.map(([, , kind]) => kind))].reverse();
  const z = kinds.map(() => depths.map(() => null));
  parts.forEach(([, depth, kind], place) => {
    z[kinds.indexOf(kind)][depths.indexOf(Number(depth))] = values[place];
  });
  const width = widthOf(chart);
  const [least, most] = [
    Math.min(...values.filter((one) => one !== null)),
    Math.max(...values.filter((one) => one !== null)),
  ];
  const flat = least === most;
  const scaled = !flat && kinds.length > 3;
  const margin = {
    l: Math.min(150, Math.max(...kinds.map((kind) => kind.length)) * 7 + 14),
    r: scaled ? 70 : 4,
    t: 8,
    b: 46,
  };
  const layout = baseLayout(width, kinds.length * 28 + margin.t + margin.b, margin);
  const tickfont = { size: 12, color: themeColor("muted") };
  const bare = { showgrid: false, zeroline: false, tickfont, fixedrange: true };
  const roomy = (width - margin.l - margin.r) / depths.length > 44;
  layout.xaxis = { ...bare, type: "category", nticks: Math.floor(width / 40), title: axisTitle("layer") };
  layout.yaxis = { ...bare, type: "category" };
  plot(
    chart,
    [
      {
        type: "heatmap",
        z,
        x: depths.map(String),
        y: kinds,
        zmin: least,
        zmax: flat ? least + 1 : most,
        showscale: scaled,
        colorscale: flat
          ? [
              [0, themeColor("soft")],
              [1, themeColor("soft")],
            ]
          : "Cividis",
        xgap: 2,
        ygap: 2,
        hoverongaps: false,
        text: z.map((row) => row.map(formatterOf(values))),
        texttemplate: roomy ? "%{text}" : "",
        textfont: { size: 11 },
        hovertemplate: `layer %{x}, %{y}<br>${plain(columnTitle(column))}: %{text}<extra></extra>`,
        colorbar: { thickness: 10, outlinewidth: 0, tickfont: { size: 11, color: themeColor("muted") } },
      },
    ],
    layout,
    { ...CONFIG, displayModeBar: false },
  );
}

function bars(chart, modules, values, column) {
  const width = widthOf(chart);
  const margin = {
    l: Math.min(width * 0.5, Math.max(...modules.map((name) => name.length)) * 7 + 14),
    r: 16,
    t: 8,
    b: 46,
  };
  const layout = baseLayout(width, modules.length * 22 + margin.t + margin.b, margin);
  layout.xaxis = { title: axisTitle(columnTitle(column)), gridcolor: themeColor("grid"), zeroline: false };
  layout.yaxis = { type: "category", autorange: "reversed" };
  plot(
    chart,
    [
      {
        type: "bar",
        orientation: "h",
        x: values,
        y: modules,
        marker: { color: themeColor("series-0") },
        text: values.map(formatterOf(values)),
        hovertemplate: "%{y}: %{text}<extra></extra>",
      },
    ],
    layout,
    { ...CONFIG, displayModeBar: false },
  );
}
