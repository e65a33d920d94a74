// What a sweep has found: the map, the cell that is picked, and the tables.

const SWEEP_PARTS = { attention_out: "attention", ffn_out: "feed-forward" };
const layerLabel = (row) =>
  row === "embedding" ? row : `${row.endsWith(".residual_after_ffn") ? "after layer" : "layer"} ${row.split(".")[1]}`;

// The place that a cell changes, as plain data.
function cellPlace({ asked, rows, columns }, row, column) {
  if (asked.by === "step") return { step: `${rows[row]}.${columns[column]}` };
  return { step: rows[row], [asked.by]: column };
}

function sweptWords({ asked, rows, columns }, row, column) {
  const layer = layerLabel(rows[row]);
  if (asked.by === "step") return [`${SWEEP_PARTS[columns[column]] ?? columns[column]}, ${layer}`];
  if (asked.by === "head") return [`${columns[column]}, ${layer}`];
  return [pieceText(columns[column]), `, ${layer}`];
}

const signed = (value) => (value === null ? "–" : `${value > 0 ? "+" : ""}${digits(value)}`);

function pickedNodes(found, go) {
  if (sweeping.picked === null) return [el("p", { class: "muted" }, "Click a cell, or press Enter in it.")];
  const [row, column] = sweeping.picked,
    place = cellPlace(found, row, column),
    { how, other } = found.asked;
  const one = { kind: how, ...place, ...(how === "patch" ? { text: other } : {}) };
  const isMade = question.changes.some((made) => JSON.stringify({ ...made, on: undefined }) === JSON.stringify(one));
  return [
    el("h3", null, sweptWords(found, row, column), ": ", el("b", null, signed(found.values[row][column]))),
    el(
      "div",
      { class: "choices" },
      el(
        "button",
        {
          type: "button",
          "data-key": "to the step",
          onclick: () =>
            go({
              view: "block",
              name: place.step,
              token: Math.min(place.token ?? found.about.at, tokens.length - 1),
              ...(place.head === undefined ? {} : { head: place.head }),
            }),
        },
        "Show the step",
      ),
      el(
        "button",
        {
          type: "button",
          "data-key": "add from sweep",
          disabled: isMade,
          onclick: () => change([...question.changes, one]),
        },
        isMade ? "It is among your changes" : "Add as a change",
      ),
    ),
  ];
}

function topTable(found, pick) {
  return el(
    "table",
    { class: "sweep-top" },
    el("caption", null, "What moves it most"),
    el("thead", null, el("tr", null, el("th", { scope: "col" }, "changed"), el("th", { scope: "col" }, "by"))),
    el(
      "tbody",
      null,
      found.top.map(([row, column], index) =>
        el(
          "tr",
          null,
          el(
            "th",
            { scope: "row" },
            el(
              "button",
              { type: "button", class: "tiny", "data-key": `top ${index}`, onclick: () => pick(row, column) },
              sweptWords(found, row, column),
            ),
          ),
          el("td", null, signed(found.values[row][column])),
        ),
      ),
    ),
  );
}

const MOST_IN_TABLE = 2000; // cells
function wholeTable(found) {
  const { rows, columns, values } = found;
  if (rows.length * columns.length > MOST_IN_TABLE) return null;
  return el(
    "details",
    { class: "all" },
    el("summary", null, "All values as a table"),
    el(
      "div",
      { class: "scroll" },
      el(
        "table",
        { class: "sweep-all" },
        el("thead", null, el("tr", null, el("td"), columns.map((name) => el("th", { scope: "col" }, pieceText(name))))),
        el(
          "tbody",
          null,
          rows.map((name, row) =>
            el("tr", null, el("th", { scope: "row" }, layerLabel(name)), values[row].map((value) => el("td", null, signed(value)))),
          ),
        ),
      ),
    ),
  );
}

function sweepNodes(found, go) {
  const { rows, columns, values, base, other, first, second, asked, about } = found;
  const data = values.flat().map((value) => value ?? -Infinity);
  const pick = (row, column) => {
    sweeping.picked = [row, column];
    draw();
  };
  const map = heat(
    { rows: rows.length, columns: columns.length, data },
    {
      label: `sweep of ${SWEPT[asked.by][0]}`,
      scale: Math.max(1e-9, ...data.filter(Number.isFinite).map(Math.abs)),
      describe: (row, column, value) => [sweptWords(found, row, column), ` moves it by ${signed(value === -Infinity ? null : value)}`],
      rowLabel: (row) => layerLabel(rows[row]),
      columnLabel: (column) => SWEEP_PARTS[columns[column]] ?? columns[column],
      isSquare: true,
      onpick: pick,
    },
  );
  const isOther = about.text !== question.text || about.more.join() !== question.more.join();
  return el(
    "section",
    { class: "card stack", "aria-label": "What the sweep has found" },
    el(
      "p",
      null,
      "The logit of ",
      pieceText(first),
      " less that of ",
      pieceText(second),
      ` is ${digits(base)}`,
      other !== null && `, and ${digits(other)} in the other text`,
      ". The map shows by how much each change moves it.",
    ),
    isOther && el("p", { class: "problem" }, "This was found for another text: ", about.pieces.map((piece) => pieceText(piece))),
    el(
      "div",
      { class: "sweep-found" },
      el(
        "div",
        { class: "stack" },
        map,
        el(
          "p",
          { class: "legend small muted" },
          el("span", null, el("i", { class: "swatch plus" }), "towards ", pieceText(first)),
          el("span", null, el("i", { class: "swatch minus" }), "towards ", pieceText(second)),
        ),
        el("div", { class: "stack", "aria-live": "polite" }, pickedNodes(found, go)),
      ),
      topTable(found, pick),
    ),
    wholeTable(found),
  );
}
