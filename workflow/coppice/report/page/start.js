// Theme, printing, width, and the start

const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => !printing && (state.theme ? state.theme === "dark" : dark.matches);

function applyTheme() {
  palette.clear();
  document.documentElement.style.colorScheme = isDark() ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", String(isDark()));
}

function drawAll() {
  applyTheme();
  drawFrontier();
  drawRecovery();
  drawNode();
  drawPair();
}

/** Charts for printing: light, as wide as the paper, and drawn at once because printing does not wait. */
function preparePrint(on) {
  printing = on;
  drawAll();
}

function watchWidth() {
  let width = byId("interactive").clientWidth;
  new ResizeObserver(() => {
    if (byId("interactive").clientWidth === width || printing) return;
    width = byId("interactive").clientWidth;
    draw(drawAll);
  }).observe(byId("interactive"));
}

function buildNavigation() {
  const titles = [...document.querySelectorAll("#interactive > section, #tables")].map((section) => [
    section.id,
    section.querySelector("h2").textContent,
  ]);
  const to = (id) => (event) => {
    event.preventDefault();
    goTo(id);
  };
  const links = titles.map(([id, text]) => make("a", { href: `#${id}`, onclick: to(id) }, text));
  document.querySelector("nav").append(...links);
  document.querySelector(".skip").addEventListener("click", to("frontier"));
}

function start() {
  document.body.append(voice, probe);
  for (const element of document.querySelectorAll("#interactive, .tools, nav")) element.hidden = false;
  readHash();
  for (const build of [
    buildFrontier,
    buildRecovery,
    buildNode,
    buildPair,
    buildFailures,
    buildReproduce,
    buildNavigation,
  ])
    build();
  drawAll();
  byId("theme").addEventListener("click", () => change({ theme: isDark() ? "light" : "dark" }, drawAll));
  byId("print").addEventListener("click", () => print());
  addEventListener("hashchange", () => {
    readHash();
    listNodes();
    drawAll();
  });
  addEventListener("beforeprint", () => preparePrint(true));
  addEventListener("afterprint", () => preparePrint(false));
  printed.addEventListener("change", (event) => preparePrint(event.matches));
  dark.addEventListener("change", () => draw(drawAll));
  watchWidth();
}

start();
