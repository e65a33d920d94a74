// Going on: the next token is drawn, or the reader chooses it, and the text goes on with it.

const AT_FIRST = { temperature: 1, top_k: null, top_p: 1, min_p: 0, repetition_penalty: 1, seed: 1 };
const drawing = { ...AT_FIRST };
const DRAWING_WORDS = { temperature: "temperature 0", top_k: "top-k", top_p: "top-p", min_p: "min-p" };
const ALL_K = 60; // the end of the slider, where top-k keeps all

const sides = () => (isChanged() ? ["before", "after"] : ["before"]);
const drawnSide = () => (isChanged() && passes.shown !== "before" ? "after" : "before"); // whose token is the next one

function goOn(more) {
  state.token = tokens.length - 1; // the last token stays the one that is looked at
  show({ more });
}
const take = (...ids) => goOn([...question.more, ...ids]);
const undo = () => question.more.length > 0 && goOn(question.more.slice(0, -1));
async function next() {
  const { drawn, hasEnded } = await partOf("distribution", { ...drawing }, drawnSide());
  if (hasEnded) writing.stop();
  else take(drawn.id);
}

// What a side of the view shows: the likeliest tokens, what is cut off, and where the random number falls.
function shareRow({ id, piece, own, uncut, share: left }, cut, key) {
  return el(
    "li",
    null,
    el(
      "button",
      {
        type: "button",
        class: cut ? "cut" : "",
        "data-key": key,
        "aria-label": `go on with ${piece}: ${percent(own)} by the model, ${cut ? `cut off by ${cut}` : `drawn with ${percent(left)}`}`,
        onclick: () => take(id),
      },
      pieceText(piece),
      el("span", { class: "shares" }, share(own, "was"), share(uncut, "")),
      cut ? el("small", null, cut) : el("b", null, percent(left)),
    ),
  );
}

function strip({ rows, drawn }) {
  const left = rows.filter(({ share }) => share > 0),
    rest = 1 - sum(left.map(({ share }) => share));
  const parts = [...left, ...(rest > 1e-6 ? [{ id: null, piece: "…", share: rest }] : [])];
  const segments = parts.map(({ id, piece, share }) => {
    const segment = el("span", { class: id === drawn.id ? "now" : "" }, share > 0.07 && pieceText(piece));
    segment.style.width = `${100 * share}%`;
    return segment;
  });
  const needle = drawn.number !== null && el("i");
  if (needle) needle.style.left = `${100 * drawn.number}%`;
  return el("div", { class: "draw-strip", "aria-hidden": "true" }, segments, needle);
}

function sideNodes(found, side) {
  const { rows, left, drawn, hasEnded } = found;
  const cutBy = (rank) => DRAWING_WORDS[Object.keys(left).find((name) => rank >= left[name])];
  return [
    el("h3", null, sides().length > 1 ? `${side} the changes: ` : "", "what follows ", placeNodes(start + tokens.length - 1)),
    el("ol", { class: "draws" }, rows.map((row, rank) => shareRow(row, cutBy(rank), `${side} ${rank}`))),
    strip(found),
    hasEnded
      ? el("p", { class: "small" }, "The text has ended: its last token says so.")
      : el(
          "div",
          null,
          el("button", { type: "button", "data-key": `take ${side}`, onclick: () => take(drawn.id) }, "Take ", pieceText(drawn.piece)),
        ),
  ];
}

// What is drawn, in words: the same random number for both sides.
function drawnWords(found, shown) {
  if (found.some(({ hasEnded }) => hasEnded)) return ["The text has ended."];
  const { number } = found[0].drawn;
  return [
    number === null
      ? "Temperature 0 takes the likeliest token, and needs no random number: "
      : `Random number ${question.more.length + 1} of seed ${drawing.seed} is ${number.toFixed(4)}. It falls on `,
    ...found.flatMap(({ drawn }, index) => [
      index > 0 ? " and " : "",
      pieceText(drawn.piece),
      shown.length > 1 ? ` ${shown[index]} the changes` : "",
    ]),
    ".",
  ];
}

// One question at a time: while an answer is awaited, the sliders may move on, and the newest settings are asked for then.
const sidesBox = el("div", { class: "sides" }),
  told = el("p", { class: "small muted" });
let isAsking = false,
  isOld = false,
  draftTimer = null;
async function drawSides() {
  isOld = true;
  if (isAsking || isBehind) return;
  isAsking = true;
  do {
    isOld = false;
    const shown = sides();
    const found = await Promise.all(
      shown.map((side) => partOf("distribution", { ...drawing }, side).catch((error) => error)),
    );
    if (isOld || isBehind) continue;
    told.replaceChildren(...(found.some((one) => one instanceof Error) ? [] : drawnWords(found, shown)));
    sidesBox.replaceChildren(
      ...found.map((one, index) =>
        el(
          "section",
          { class: "card stack", "aria-label": `The next token, ${shown[index]}` },
          one instanceof Error ? el("p", { class: "problem" }, one.message) : sideNodes(one, shown[index]),
        ),
      ),
    );
    refocus();
  } while (isOld);
  isAsking = false;
  clearTimeout(draftTimer);
  draftTimer = setTimeout(() => {
    history.replaceState(null, "", address());
    fill(draftBox, draftParts());
  }, 300); // when the sliders rest
}

const set = (name, value) => {
  drawing[name] = value;
  drawSides();
};
const hundredth = (value) => (value / 100).toFixed(2);
const hundredths = (name, words, least, most) =>
  slider(words, [100 * least, 100 * most], 100 * drawing[name], hundredth, (value) => set(name, value / 100));
const sliders = {
  temperature: hundredths("temperature", "temperature", 0, 2),
  top_k: slider("top-k", [1, ALL_K], ALL_K, (value) => (value === ALL_K ? "all" : value), (value) =>
    set("top_k", value === ALL_K ? null : value),
  ),
  top_p: hundredths("top_p", "top-p", 0, 1),
  min_p: hundredths("min_p", "min-p", 0, 1),
  repetition_penalty: hundredths("repetition_penalty", "repetition penalty", 1, 2),
};
const drawingControls = el("div", { class: "controls" }, Object.values(sliders).map(({ node }) => node));
const seedBox = el("input", {
  type: "number",
  min: 0,
  step: 1,
  value: drawing.seed,
  "data-key": "seed",
  oninput: () => set("seed", clamp(Math.trunc(Number(seedBox.value)) || 0, 0, Number.MAX_SAFE_INTEGER)),
});

// Sets what a link or a file says; what it does not say is as at first.
function setDrawing(kept) {
  const number = (name, least, most) => (Number.isFinite(kept[name]) ? clamp(kept[name], least, most) : AT_FIRST[name]);
  Object.assign(drawing, {
    temperature: number("temperature", 0, 2),
    top_k: Number.isInteger(kept.top_k) ? clamp(kept.top_k, 1, ALL_K - 1) : null,
    top_p: number("top_p", 0, 1),
    min_p: number("min_p", 0, 1),
    repetition_penalty: number("repetition_penalty", 1, 2),
    seed: Math.trunc(number("seed", 0, Number.MAX_SAFE_INTEGER)),
  });
  const { top_k, seed, ...shares } = drawing;
  for (const [name, value] of Object.entries(shares)) sliders[name].set(Math.round(100 * value));
  sliders.top_k.set(top_k ?? ALL_K);
  seedBox.value = seed;
}

const goOnView = {
  title: "Go on",
  heading: "What comes next, and what then",
  lead: "The next token is drawn from a distribution. The settings bend it and cut it; every view shows the text with the token that has been drawn, or that you choose in its place.",
  draw: () => {
    remember();
    drawSides();
    const step = el(
      "div",
      { class: "choices" },
      el("button", { type: "button", "data-key": "next", "aria-keyshortcuts": "n", onclick: () => next().catch(() => {}) }, "Next"),
      writing.button,
      el("button", { type: "button", "data-key": "undo", "aria-keyshortcuts": "u", disabled: question.more.length === 0, onclick: undo }, "Undo"),
      question.more.length > 0 && el("button", { type: "button", "data-key": "make text", onclick: makeText }, "Make it the text"),
      el("label", { class: "seed small muted" }, "seed", seedBox),
    );
    return el(
      "div",
      { class: "stack" },
      el("div", { class: "card stack" }, drawingControls, step, told, chosen.root.next.length > 0 && chosenTree()),
      el(
        "p",
        { class: "legend small muted" },
        el("span", null, el("span", { class: "shares" }, share(1, "was")), "by the model"),
        el("span", null, el("span", { class: "shares" }, share(1, "")), "with temperature and penalty, before anything is cut off"),
      ),
      sidesBox,
      el("div", { class: "halves" }, ringCard(), draftBox),
    );
  },
};

// Writes by itself, a token whenever the one before has been computed.
const writing = player("Write", 400, told, () => {
  if (!isBehind) next().catch(() => {});
  return state.view === "go_on";
});

async function makeText() {
  textBox.value = await partOf("text", null, "before");
  type(textBox.value);
}

VIEWS.go_on = goOnView;
ACTIONS["9"] = () => go({ view: "go_on" });
ACTIONS.n = () => state.view === "go_on" && (next().catch(() => {}), true);
ACTIONS.u = () => state.view === "go_on" && undo();
KEYS[0] = ["1 … 9", "the views"];
KEYS.push(["n u", "go on: the next token, undo"]);
