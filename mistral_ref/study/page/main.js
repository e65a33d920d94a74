// The page: its views, what is chosen, and the keys.

const VIEWS = {
  block: blockView,
  attention: attentionView,
  ring: ringView,
  field: fieldView,
  rope: ropeView,
  heads: headsView,
  lens: lensView,
  cost: costView,
};
const KEYS = [
  ["1 … 8", "the views"],
  ["← →", "one step back or on, in the order of the pass"],
  ["↑ ↓", "the layer before or after"],
  ["h", "the next head"],
  [", .", "one token back or on"],
  ["t", "light or dark"],
  ["?", "this list"],
];

// name: of the step; kind and layer follow from it. head and token stay when another view or layer is chosen.
const state = { view: "block", name: "embedding", kind: "embedding", layer: 0, head: 0, token: tokens.length - 1 };

function accepted(patch) {
  const next = { ...state, ...patch };
  if (patch.name !== undefined) {
    next.kind = patch.name.split(".").at(-1);
    if (!isEnd(next.kind)) next.layer = Number(patch.name.split(".")[1]);
    else if (patch.layer === undefined) next.layer = next.kind === "embedding" ? 0 : config.layers - 1;
  }
  return next;
}

function go(patch) {
  const isOtherView = patch.view !== undefined && patch.view !== state.view;
  Object.assign(state, accepted(patch));
  history[isOtherView ? "pushState" : "replaceState"](null, "", address()); // the browser's Back leads to the view before
  if (isOtherView && panel.getBoundingClientRect().top < 0) tabs.scrollIntoView(); // the heading of the next view is seen
  draw();
}

// What the live page adds: a last part of the address, what is done with it, what is drawn beside the view, a part of the
// pass before, where the difference to it is shown, and the words of the changes at a step or at a head of it.
const hooks = { keep: () => "", restore: () => {}, drawn: () => {}, was: async () => null, changesAt: () => [] };

const place = () => `${state.view}/${state.name}/${state.layer}/${state.head}/${state.token}`;
const address = () => `#${place()}${hooks.keep()}`;

// What the address says; anything that does not exist there is ignored.
function readAddress() {
  const [view, name, layer, head, token, kept] = location.hash.slice(1).split("/");
  hooks.restore(kept, token);
  const whole = (text, size) => (/^\d+$/.test(text ?? "") && Number(text) < size ? Number(text) : undefined);
  const found = {
    view: Object.hasOwn(VIEWS, view) ? view : undefined,
    name: stepByName.has(name) ? name : undefined,
    layer: whole(layer, config.layers),
    head: whole(head, config.heads),
    token: whole(token, tokens.length),
  };
  Object.assign(state, accepted(Object.fromEntries(Object.entries(found).filter(([, value]) => value !== undefined))));
}

const tokenStrip = el("div", { class: "tokens", role: "toolbar", "aria-label": "Tokens" });
const tabs = el("nav", { role: "tablist", "aria-label": "Views" });
const panel = el("div", { id: "view", role: "tabpanel", tabindex: -1 });
const help = el("dialog", { "aria-label": "Keys" });
function showHelp() {
  help.replaceChildren(
    el("h2", null, "Keys"),
    facts(
      KEYS.map(([keys, what]) => [
        el(
          "span",
          null,
          keys.split(" ").map((key) => [el("kbd", null, key), " "]),
        ),
        what,
      ]),
    ),
    el("p", { class: "small muted" }, "In a heat map the arrow keys read cells, and Enter chooses a row."),
    el("button", { type: "button", onclick: () => help.close() }, "Close"),
  );
  help.showModal();
}

const summaryLine = el("p");

function drawTokens() {
  summaryLine.textContent = `${grouped(config.parameters)} parameters · ${counted(config.layers, "layer")} · ${counted(tokens.length, "token")}${start ? ` from position ${start}; @ marks those before it` : ""}`;
  fillStrip(tokens, tokenButton);
  withButton = tokens;
  for (const marked of tokenStrip.querySelectorAll("[style]")) marked.removeAttribute("style"); // by a view
  for (const pressed of tokenStrip.querySelectorAll('[aria-pressed="true"]')) press(pressed, false);
  const chosen = tokenStrip.children[state.token];
  press(chosen, true);
  centre(tokenStrip, chosen);
}

// Puts a node for each token into the strip. A text mostly changes at its end, and a long one has thousands of tokens:
// the buttons before the first token that is another stay. Returns how many they are.
let withButton = []; // the tokens of the strip's buttons
function fillStrip(shown, make) {
  let same = 0;
  while (same < Math.min(shown.length, withButton.length) && shown[same].id === withButton[same].id) same += 1;
  for (const node of [...tokenStrip.children].slice(same)) node.remove();
  tokenStrip.append(...shown.slice(same).map((token, index) => make(token, same + index)));
  return same;
}

const tokenButton = ({ piece, id }, index) =>
  el(
    "button",
    {
      type: "button",
      "aria-pressed": "false",
      tabindex: -1,
      "data-key": `token ${index}`,
      title: `token id ${id}`,
      onclick: () => go({ token: index }),
    },
    pieceText(piece),
    el("small", null, start + index),
  );

function press(button, isPressed) {
  button.setAttribute("aria-pressed", String(isPressed));
  button.tabIndex = isPressed ? 0 : -1;
}

// Scrolls a row sideways, and nothing else.
function centre(row, child) {
  row.scrollLeft = child.offsetLeft - row.clientWidth / 2;
}

function drawTabs() {
  tabs.replaceChildren(
    ...Object.entries(VIEWS).map(([name, view]) =>
      el(
        "button",
        {
          type: "button",
          role: "tab",
          id: `tab-${name}`,
          "aria-controls": "view",
          "aria-selected": String(name === state.view),
          tabindex: name === state.view ? 0 : -1,
          "data-key": `tab ${name}`,
          onclick: () => go({ view: name }),
        },
        view.title,
      ),
    ),
  );
  centre(tabs, tabs.querySelector('[aria-selected="true"]'));
}

function draw() {
  const view = VIEWS[state.view];
  focusKey = document.activeElement?.dataset?.key ?? null;
  drawTokens();
  drawTabs();
  panel.setAttribute("aria-labelledby", `tab-${state.view}`);
  panel.replaceChildren(
    el("h2", null, view.heading),
    el("p", { class: "lead" }, view.lead),
    el("div", { class: "stack" }, view.draw(state, go)),
  );
  hooks.drawn();
  refocus();
}

// What has the focus is drawn anew with the rest, some of it later than the rest; its key finds it again.
let focusKey = null;
function refocus() {
  if (focusKey === null || document.activeElement !== document.body) return;
  document.querySelector(`[data-key="${CSS.escape(focusKey)}"]`)?.focus({ preventScroll: true });
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  themeButton.textContent = name === "dark" ? "☀ Light" : "☾ Dark";
}
const themeButton = el("button", {
  type: "button",
  "aria-keyshortcuts": "t",
  onclick: () => {
    setTheme(theme() === "dark" ? "light" : "dark");
    draw();
  },
});

function neighbour(name, by) {
  const names = page.steps.map((step) => step.name);
  return names[clamp(names.indexOf(name) + by, 0, names.length - 1)];
}

function layerBy(by) {
  const layer = clamp(state.layer + by, 0, config.layers - 1);
  return { layer, name: isEnd(state.kind) ? state.name : nameOf(state.kind, layer) };
}

const ACTIONS = {
  ArrowRight: () => state.view === "block" && go({ name: neighbour(state.name, 1) }),
  ArrowLeft: () => state.view === "block" && go({ name: neighbour(state.name, -1) }),
  ArrowUp: () => ["block", "attention"].includes(state.view) && go(layerBy(-1)),
  ArrowDown: () => ["block", "attention"].includes(state.view) && go(layerBy(1)),
  h: () => go({ head: (state.head + 1) % config.heads }),
  ",": () => go({ token: Math.max(state.token - 1, 0) }),
  ".": () => go({ token: Math.min(state.token + 1, tokens.length - 1) }),
  t: () => themeButton.click(),
  "?": showHelp,
  ...Object.fromEntries(Object.keys(VIEWS).map((view, index) => [String(index + 1), () => go({ view })])),
};

// Arrow keys move within a row of buttons of which one is a tab stop.
function moveWithin(event, row, pick) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by) return;
  event.preventDefault();
  event.stopPropagation();
  const index = clamp([...row.children].indexOf(document.activeElement) + by, 0, row.children.length - 1);
  row.children[index].focus();
  pick(index);
}
tokenStrip.addEventListener("keydown", (event) => moveWithin(event, tokenStrip, (token) => go({ token })));
tabs.addEventListener("keydown", (event) =>
  moveWithin(event, tabs, (index) => go({ view: Object.keys(VIEWS)[index] })),
);
document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  if (
    event.target.matches('textarea, select, [type="number"], [type="text"]') ||
    (event.key.startsWith("Arrow") && event.target.matches("input, .formula"))
  )
    return;
  if (!Object.hasOwn(ACTIONS, event.key)) return;
  if (ACTIONS[event.key]() !== false) event.preventDefault();
});
for (const change of ["hashchange", "popstate"])
  window.addEventListener(change, () => {
    readAddress();
    draw();
  });

// Paper is white: what is printed is drawn in the light colours.
let screenTheme = null;
window.addEventListener("beforeprint", () => {
  screenTheme = theme();
  if (screenTheme === "light") return;
  setTheme("light");
  draw();
});
window.addEventListener("afterprint", () => {
  if (screenTheme === theme()) return;
  setTheme(screenTheme);
  draw();
});

document.title = `${page.title}: one pass`;
document.body.append(
  el(
    "header",
    { class: "top" },
    el(
      "div",
      { class: "bar" },
      el(
        "div",
        { class: "row" },
        el("div", null, el("h1", null, el("bdi", null, page.title)), summaryLine),
        el(
          "div",
          { class: "icons" },
          themeButton,
          el("button", { type: "button", "aria-label": "Keys", onclick: showHelp }, "?"),
        ),
      ),
      tokenStrip,
      tabs,
    ),
  ),
  el("main", null, panel),
  el(
    "footer",
    null,
    `▁ is the space before a word. Made by ${page.madeBy}. In the console: await values("layers.0.q").`,
  ),
  help,
);
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
