// What comes next: the likeliest tokens after the one that is chosen, and how the text goes on, before and after.

const nextBox = el("section", { class: "card stack", "aria-label": "What comes next" });
const goesOnBox = el("section", { class: "card stack", "aria-label": "How the text goes on" });
const isChanged = () => passes.after.changes.words.some((words, index) => words && question.changes[index]?.on !== false);

const LEAST_PERCENT = 0.001; // what is less is not written out
const percent = (p) =>
  p === null ? "NaN" : p > 0 && 100 * p < LEAST_PERCENT ? `< ${LEAST_PERCENT} %` : `${Number((100 * p).toPrecision(3))} %`;

const share = (p, name) => {
  const bar = el("i", { class: name });
  bar.style.width = `${100 * (p ?? 0)}%`;
  return bar;
};

async function nextParts(token) {
  const found = await part("next", token);
  const two = isChanged();
  return [
    el("h3", null, "What comes after ", placeNodes(start + token)),
    el(
      "table",
      { class: "next" },
      el(
        "thead",
        { class: two ? "" : "unseen" },
        el("tr", null, ["token", "", "before", two && "after"].filter((name) => name !== false).map((name) => el("th", { scope: "col" }, name))),
      ),
      el(
        "tbody",
        null,
        found.map(({ piece, before, after }) =>
          el(
            "tr",
            null,
            el("th", { scope: "row" }, pieceText(piece)),
            el("td", { class: "shares", "aria-hidden": "true" }, share(before, two ? "was" : ""), two && share(after, "")),
            el("td", null, percent(before)),
            two && el("td", null, percent(after)),
          ),
        ),
      ),
    ),
  ];
}

// How the text goes on is computed by itself while passes are quick, and else when it is asked for.
const QUICK = 0.5; // seconds
let askedFor = ""; // the question whose continuation has been asked for
async function goesOnParts() {
  const key = JSON.stringify(question);
  if (seconds > QUICK && askedFor !== key) {
    const start = () => {
      askedFor = key;
      fill(goesOnBox, goesOnParts());
    };
    return [
      el("h3", null, "How the text goes on"),
      el("button", { type: "button", "data-key": "goes on", onclick: start }, "Compute it"),
    ];
  }
  const shown = isChanged() ? ["before", "after"] : ["before"];
  const found = await Promise.all(shown.map((one) => partOf("goes_on", null, one, askAlone).catch((error) => error)));
  return [
    el("h3", { title: "always by the likeliest token" }, "How the text goes on"),
    ...found.map((pieces, index) =>
      el(
        "p",
        { class: "goes-on" },
        shown.length > 1 && el("span", { class: "muted small" }, `${shown[index]} `),
        pieces instanceof Error ? pieces.message : pieces.map((piece) => [piece.startsWith("▁") && el("wbr"), pieceText(piece)]),
      ),
    ),
  ];
}
