// Making elements. A text becomes a text node and nothing else: whatever a model or its reader wrote is shown, not run.

function made(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== undefined && child !== null && child !== false));
  return node;
}

const el = (tag, attributes, ...children) => made(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  made(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// A token's piece, a world of its own as to its direction.
const pieceText = (text) => el("bdi", { class: "piece" }, text);

// A button that is one of several choices. Its key finds it again when the view is drawn anew.
const choice = (key, isChosen, onclick, ...children) =>
  el("button", { type: "button", "data-key": key, "aria-pressed": String(isChosen), onclick }, ...children);

// What acts like a button in a drawing.
const svgButton = (key, label, onclick, attributes, ...children) =>
  svg(
    "g",
    {
      role: "button",
      tabindex: 0,
      "aria-label": label,
      "data-key": key,
      onclick,
      ...attributes,
      onkeydown: (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        onclick();
      },
    },
    ...children,
  );

const facts = (rows) =>
  el(
    "dl",
    { class: "facts" },
    rows.filter(Boolean).map(([name, ...value]) => [el("dt", null, name), el("dd", null, value)]),
  );

// Puts what a promise brings into a node, unless the node has been drawn anew by then, or is to be filled with another.
const fillings = new WeakMap(); // the newest promise of each node
function fill(node, promise) {
  fillings.set(node, promise);
  promise
    .catch((error) => [
      el(
        "p",
        null,
        globalThis.DecompressionStream
          ? error.message
          : "This browser cannot unpack the values of the page: it is older than DecompressionStream.",
      ),
    ])
    .then((parts) => {
      if (node.isConnected && fillings.get(node) === promise) {
        node.replaceChildren(...parts.filter(Boolean));
        for (const canvas of node.querySelectorAll("figure canvas")) canvas.dispatchEvent(new Event("draw"));
        refocus();
      }
    });
  return node;
}

// A slider with its name and value; `say` turns the value into words.
function slider(name, [least, most], value, say, oninput) {
  const shown = el("b", null, say(value));
  const input = el("input", {
    type: "range",
    min: least,
    max: most,
    value,
    "aria-label": name,
    "data-key": name,
    oninput: () => {
      set(Number(input.value));
      oninput(Number(input.value));
    },
  });
  const set = (next) => {
    input.value = next;
    shown.textContent = say(next);
    input.setAttribute("aria-valuetext", say(next));
  };
  set(value);
  return { node: el("label", null, el("span", null, name, " ", shown), input), set };
}

// Starts and stops what moves by itself; it ends when the view is left. `advance` returns whether there is more. What is
// told of it in words, in `live`, is read aloud only when it stands.
function player(label, milliseconds, live, advance) {
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    button.textContent = `▶ ${label}`;
    live.setAttribute("aria-live", "polite");
  };
  const tick = () => {
    if (!button.isConnected || !advance()) stop();
  };
  const button = el(
    "button",
    {
      type: "button",
      "data-key": label,
      onclick: () => {
        if (timer !== null) return stop();
        live.setAttribute("aria-live", "off");
        button.textContent = "❚❚ Pause";
        timer = setInterval(tick, milliseconds);
      },
    },
    `▶ ${label}`,
  );
  return { button, stop };
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// A number of four digits, as a person would write it.
function digits(number) {
  if (number === null || Number.isNaN(number)) return "NaN";
  if (!Number.isFinite(number)) return number > 0 ? "∞" : "−∞";
  const size = Math.abs(number);
  const text =
    size !== 0 && (size < 1e-3 || size >= 1e5) ? number.toExponential(3) : String(Number(number.toPrecision(4)));
  return text.replace("-", "−");
}

const counted = (number, name) => `${number.toLocaleString("en")} ${name}${number === 1 ? "" : "s"}`;
const grouped = (number) => Math.round(number).toLocaleString("en");

function units(number, unit, names = ["", "k", "M", "G", "T"]) {
  let power = 0;
  while (Math.abs(number) >= 1000 && power < names.length - 1) {
    number /= 1000;
    power += 1;
  }
  return `${Number(number.toPrecision(3))} ${names[power]}${unit}`;
}

const duration = (seconds) =>
  seconds < 1e-3
    ? `${digits(Number((1e6 * seconds).toPrecision(3)))} µs`
    : seconds < 1
      ? `${digits(Number((1e3 * seconds).toPrecision(3)))} ms`
      : `${digits(Number(seconds.toPrecision(3)))} s`;

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const range = (n, start = 0) => Array.from({ length: n }, (_, index) => start + index);
const clamp = (number, least, most) => Math.min(Math.max(number, least), most);
