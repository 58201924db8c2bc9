// Elements

/** An element with attributes, listeners (onclick: ...) and children: elements or text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

/** Replaces an element's children by these, of which some may be lists or null. */
const fill = (element, ...children) => element.replaceChildren(...children.flat().filter((child) => child !== null));

const byId = (id) => document.getElementById(id);
const heading = (id, text) => make("h2", { id: `${id}-title` }, text);
const note = (text) => make("p", { class: "note" }, text);
const empty = (text) => make("p", { class: "empty" }, text);

/** A text that may break after the steps of a node's name; anything else unchanged. */
const breakable = (text) =>
  typeof text === "string"
    ? text.split("/").flatMap((part, place) => (place ? ["/", make("wbr"), part] : [part]))
    : [text];

/** A table; `rows` hold text or elements, and the first `texts` columns are left-aligned. */
function table(titles, rows, texts = 1, caption = null) {
  const cells = (row, tag) =>
    row.map((cell, place) =>
      make(tag, { class: place < texts ? "text" : null, scope: tag === "th" ? "col" : null }, breakable(cell ?? "")),
    );
  return make(
    "div",
    { class: "wide", tabindex: "0", role: "region", "aria-label": caption ?? titles.join(", ") },
    make(
      "table",
      {},
      make("thead", {}, make("tr", {}, cells(titles, "th"))),
      make(
        "tbody",
        {},
        rows.map((row) => make("tr", {}, cells(row, "td"))),
      ),
    ),
  );
}

/** A folded part whose content is created when it is opened, and again by `refresh` while it is open. */
function foldable(summary, content) {
  const body = make("div");
  const details = make("details", {}, make("summary", {}, summary), body);
  const refresh = () => details.open && body.replaceChildren(content());
  details.addEventListener("toggle", refresh);
  return { details, refresh };
}

/** An SVG element with attributes and children: elements or text. */
function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A small drawing of a marker, as in the charts. */
function mark(shape, color, filled) {
  const path = svg("path", { d: PATHS[shape], fill: filled ? color : "none", stroke: color });
  return svg("svg", { viewBox: "0 0 14 14", class: "mark", "aria-hidden": "true" }, path);
}

const inColor = (model) => `var(--${colorOf.get(model)})`;

/** A button without a frame. */
const quiet = (text, onclick, label = null) =>
  make("button", { type: "button", class: "quiet", "aria-label": label, onclick }, text);

/** A labelled drop-down list; `groups`: [title, [[value, text], ...]]. */
function chooser(label, groups, value, changed) {
  const option = ([key, text]) => make("option", { value: key }, text);
  const full = groups.filter(([, options]) => options.length);
  const children = full.map(([title, options]) =>
    full.length > 1 ? make("optgroup", { label: title }, options.map(option)) : options.map(option),
  );
  const select = make("select", { "aria-label": label, onchange: () => changed(select.value) }, children.flat());
  select.value = value;
  return { label: make("label", { class: "chooser" }, make("span", {}, label), select), select };
}

/** A switch that Enter toggles too. */
function checkbox(text, checked, changed, picture = null) {
  const input = make("input", {
    type: "checkbox",
    onchange: () => changed(input.checked),
    onkeydown: (event) => event.key === "Enter" && input.click(),
  });
  input.checked = checked;
  return { label: make("label", { class: "chip" }, input, picture, make("span", {}, text)), input };
}

/** A command or text with a button that copies it. */
function copyable(text, what) {
  const code = make("code", {}, text);
  const button = make("button", { type: "button", class: "copy", "aria-label": `Copy ${what}` }, "Copy");
  button.addEventListener("click", async () => {
    await copy(text, code);
    button.textContent = "Copied";
    say(`Copied ${what}.`);
    setTimeout(() => {
      button.textContent = "Copy";
    }, 1500);
  });
  return make("div", { class: "command" }, make("pre", { tabindex: "0" }, code), button);
}

/** To the clipboard, or, in browsers that deny it to local files, by copying the selected text. */
async function copy(text, element) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    getSelection().selectAllChildren(element);
    document.execCommand("copy");
  }
}

const voice = make("p", { class: "unseen", role: "status", "aria-live": "polite" });
const say = (text) => {
  voice.textContent = text;
};
