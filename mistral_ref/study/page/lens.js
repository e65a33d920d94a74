// The logit lens: what the model would say after each layer, had it ended there.

const lensLabel = (name) => (name === "embedding" ? "embedding" : `layer ${name.split(".")[1]}`);
const lensPiece = ({ pieces, ids }, row, token, place = 0) => pieces[ids[row][token][place]];

// The probability of a token, or 0 if it is not among the likeliest.
const probabilityOf = ({ ids, probabilities }, row, token, id) =>
  probabilities[row][token][ids[row][token].indexOf(id)] ?? 0;

// The colour of a probability, and black or white, whichever is read more easily on it.
function probabilityColours(p) {
  const rgb = shade((0.8 * p) ** 2).map(Math.round);
  const [red, green, blue] = rgb.map((byte) =>
    byte > 10 ? ((byte / 255 + 0.055) / 1.055) ** 2.4 : byte / 255 / 12.92,
  );
  return [`rgb(${rgb.join(" ")})`, 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000000" : "#ffffff"];
}

// The tokens that have a column: all of a short text, else those around the chosen one. A browser needs seconds for more.
const LENS_COLUMNS = 160;
const lensColumns = (token) =>
  range(Math.min(tokens.length, LENS_COLUMNS), clamp(token - LENS_COLUMNS / 2, 0, Math.max(0, tokens.length - LENS_COLUMNS)));

// `was` is the lens of the pass before, where the difference is shown: then a colour says how much likelier or less
// likely the piece has become, and a piece that has taken another's place stands behind it.
function lensTable(lens, was, cell, go) {
  const { names, ids, probabilities } = lens,
    columns = lensColumns(cell[1]);
  const move = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  return el(
    "table",
    { class: "lens", "aria-label": "The likeliest next piece after each layer, for each token" },
    el(
      "thead",
      null,
      el(
        "tr",
        null,
        el("th", null, ""),
        columns.map((token) =>
          el("th", { scope: "col" }, pieceText(tokens[token].piece), " ", el("small", null, start + token)),
        ),
      ),
    ),
    el(
      "tbody",
      null,
      range(names.length)
        .reverse()
        .map((row) =>
          el(
            "tr",
            null,
            el("th", { scope: "row" }, lensLabel(names[row])),
            columns.map((token) => {
              const isChosen = row === cell[0] && token === cell[1],
                p = probabilities[row][token][0],
                isBroken = p === null,
                piece = lensPiece(lens, row, token),
                old = was === null ? piece : lensPiece(was, row, token);
              const isAgreed = !isBroken && ids[row][token][0] === ids.at(-1)[token][0];
              const button = el(
                "button",
                {
                  type: "button",
                  tabindex: isChosen ? 0 : -1,
                  "aria-pressed": String(isChosen),
                  "data-key": isChosen ? "lens cell" : undefined,
                  "aria-label": `${lensLabel(names[row])}, after ${pieceAt(start + token)}: ${isBroken ? "NaN" : `${piece}, ${Math.round(100 * p)} %`}${old === piece ? "" : `, in place of ${old}`}`,
                  onclick: () => go([row, token]),
                  onkeydown: (event) => {
                    const by = move[event.key];
                    if (!by) return;
                    event.preventDefault();
                    event.stopPropagation();
                    go([clamp(row + by[0], 0, names.length - 1), clamp(token + by[1], 0, tokens.length - 1)]);
                  },
                },
                old !== piece && [el("del", null, pieceText(old)), " "],
                isBroken ? "NaN" : pieceText(piece),
              );
              [button.style.background, button.style.color] = probabilityColours(
                was === null ? (p ?? 0) : Math.abs(p - probabilityOf(was, row, token, ids[row][token][0])),
              );
              if (isAgreed) button.style.fontWeight = "700";
              return el("td", null, button);
            }),
          ),
        ),
    ),
  );
}

const lensState = { row: null }; // null: the last

async function lensParts(state, go) {
  const [lens, was] = await Promise.all([part("lens"), hooks.was("lens")]),
    { names, probabilities, ids } = lens;
  const row = lensState.row ?? names.length - 1,
    token = state.token;
  const pick = ([nextRow, nextToken]) => {
    lensState.row = nextRow;
    go({ token: nextToken });
  };
  const table = el("div", { class: "card scroll" }, lensTable(lens, was, [row, token], pick));
  requestAnimationFrame(() => {
    const cell = table.querySelector('[aria-pressed="true"]');
    table.scrollLeft +=
      cell.getBoundingClientRect().left - table.getBoundingClientRect().left - table.clientWidth / 2;
  });
  const columns = lensColumns(token);
  return [
    table,
    columns.length < tokens.length &&
      el("p", { class: "small muted" }, `Of ${counted(tokens.length, "token")} those around the chosen one are shown, ${start + columns[0]} to ${start + columns.at(-1)}.`),
    was !== null && el("p", { class: "small muted" }, "Struck out: what stood there before the changes. The stronger its colour, the more a probability has changed."),
    el(
      "div",
      { class: "card stack" },
      el("h3", null, `${lensLabel(names[row])}: what would come after `, placeNodes(start + token)),
      probabilities[row][token][0] === null
        ? el("p", null, "NaN: nothing can be said.")
        : el(
            "div",
            { class: "strong" },
            ids[row][token].map((_, place) => {
              const p = probabilities[row][token][place] ?? 0,
                bar = el("i");
              bar.style.width = `${100 * p}%`;
              return [
                pieceText(lensPiece(lens, row, token, place)),
                bar,
                el("b", null, `${digits(Number((100 * p).toPrecision(3)))} %`),
              ];
            }),
          ),
    ),
  ];
}

const lensView = {
  title: "Logit lens",
  heading: "What each layer would say",
  lead: "The residual stream after every layer, taken straight to the last norm and the output matrix. The bottom row is the embedding alone, the top row the model's own prediction; bold: already what the model will say.",
  draw: (state, go) => fill(el("div", { class: "stack" }), lensParts(state, go)),
};
