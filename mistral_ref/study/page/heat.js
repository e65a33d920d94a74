// Heat maps, with values under the pointer or the arrow keys.

const RAMPS = {
  light: {
    plus: ["#ffffff", "#fbc6a6", "#e8743b", "#a8330a", "#5c1602"],
    minus: ["#ffffff", "#b5d8f2", "#4a9bd6", "#0b5c9c", "#052c4f"],
  },
  dark: {
    plus: ["#181b22", "#5e321d", "#b85a26", "#ff9a62", "#ffe9da"],
    minus: ["#181b22", "#1a3f60", "#2b79b8", "#6cb8f5", "#e0f1ff"],
  },
};
const theme = () => document.documentElement.dataset.theme;
const bytesOf = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

// The colour of a number of -1 to 1. Square roots, so that what is small can be seen beside what is large.
function shade(number) {
  if (Number.isNaN(number) || number === Infinity) return theme() === "dark" ? [255, 0, 160] : [200, 0, 120];
  const ramp = RAMPS[theme()][number < 0 ? "minus" : "plus"];
  const at = Math.sqrt(Math.min(Math.abs(number), 1)) * (ramp.length - 1),
    first = Math.min(Math.floor(at), ramp.length - 2);
  const [low, high] = [bytesOf(ramp[first]), bytesOf(ramp[first + 1])];
  return low.map((byte, index) => byte + (high[index] - byte) * (at - first));
}

// A picture of a pixel a cell; `isSeen(row, column)` tells the cells that a query can look at.
function pixels(matrix, scale, isSeen) {
  const canvas = el("canvas", { width: matrix.columns, height: matrix.rows });
  const context = canvas.getContext("2d"),
    image = context.createImageData(matrix.columns, matrix.rows);
  const unseen = bytesOf(colour("unseen"));
  const ramp = range(513).map((step) => shade((step / 256 - 1) * Math.abs(step / 256 - 1))); // even steps of the square root
  matrix.data.forEach((value, index) => {
    const isHidden =
      value === -Infinity || (value === 0 && !isSeen(Math.floor(index / matrix.columns), index % matrix.columns));
    const share = clamp(value / scale, -1, 1);
    const rgb = isHidden
      ? unseen
      : Number.isFinite(value)
        ? ramp[Math.round((Math.sign(share) * Math.sqrt(Math.abs(share)) + 1) * 256)]
        : shade(NaN);
    image.data.set([...rgb, 255], 4 * index);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

const cursors = new Map(); // where the reader stands in each heat map, by its label
const LABEL_WIDTH = 104, // at most: a narrow screen has narrower labels
  LABEL_HEIGHT = 84,
  LEAST_LABEL = 10.5; // pixels from one label to the next

// What a heat map holds, in words.
function summary({ rows, columns, data }) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of data) {
    if (Number.isFinite(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
  }
  const extent = low <= high ? `values from ${digits(low)} to ${digits(high)}` : "no finite value";
  return `${counted(rows, "row")}, ${counted(columns, "column")}, ${extent}`;
}

// The rows or columns that get a label, and the size of its letters: all of them, or every second, third, ... where they
// are narrow, and always `chosen`, which takes the place of those that it would touch.
function labelled(n, width, chosen) {
  const every = Math.ceil(LEAST_LABEL / width),
    size = Math.min(12, 0.92 * width * every);
  const isFree = (index) => chosen === undefined || index === chosen || Math.abs(index - chosen) >= every;
  return range(n)
    .filter((index) => index === chosen || (index % every === 0 && isFree(index)))
    .map((index) => ({ index, size }));
}

// A heat map as a figure. Options:
//   label       what it shows, for those who cannot see it
//   scale       what the strongest colour stands for
//   describe    (row, column, value) -> words for the cell under the pointer
//   rowLabel, columnLabel   (index) -> the label of a row or column, drawn where there is room
//   isSquare    cells are squares
//   isSeen      (row, column) -> false for what is out of sight
//   edges       [{stroke: () => colour, dash, at: (row) => column or null}], lines to the left of these columns
//   chosenRow, onpick       the row that is marked, and what is done when the cell (row, column) is picked
function heat(matrix, options) {
  const {
    label,
    scale,
    describe,
    rowLabel,
    columnLabel,
    isSquare = false,
    isSeen = () => true,
    edges = [],
    chosenRow,
    onpick,
  } = options;
  const readout = el("output", { "aria-live": "polite", class: "hint", id: label.replace(/\W+/g, "-") }, "Point at a cell, or use the arrow keys in the picture.");
  const canvas = el("canvas", {
    tabindex: 0,
    role: "application",
    "aria-roledescription": "heat map",
    "aria-label": `${label}: ${summary(matrix)}. ${chosenRow === undefined ? "" : `Row ${rowLabel(chosenRow)} is chosen. `}Arrow keys read cells.`,
    "aria-describedby": readout.id,
    "data-key": `heat ${label}`,
  });
  let place = null,
    cursor = cursors.get(label) ?? null,
    picture = null,
    shownColumns = 0;

  function layout() {
    const width = canvas.parentElement.clientWidth,
      left = Math.min(LABEL_WIDTH, width / 5),
      top = columnLabel ? LABEL_HEIGHT : 0;
    const cellWidth = Math.min((width - left) / matrix.columns, isSquare ? 30 : Infinity);
    const cellHeight = isSquare ? cellWidth : clamp(440 / matrix.rows, 3, 22);
    return { width, left, top, cellWidth, cellHeight, height: top + Math.ceil(cellHeight * matrix.rows) };
  }

  function draw() {
    place = layout();
    const { width, left, top, cellWidth, cellHeight, height } = place,
      ratio = window.devicePixelRatio || 1;
    if (width === 0) return;
    const mapWidth = cellWidth * matrix.columns,
      mapHeight = cellHeight * matrix.rows;
    const columns = Math.min(matrix.columns, Math.max(1, Math.floor(mapWidth)));
    if (picture === null || columns !== shownColumns) {
      picture = pixels(narrowed(matrix, columns), scale, isSeen);
      shownColumns = columns;
    }
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.aspectRatio = `${width} / ${height}`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    context.drawImage(picture, left, top, mapWidth, mapHeight);
    context.textBaseline = "middle";
    const family = getComputedStyle(document.body).fontFamily;
    for (const { index: row, size } of labelled(matrix.rows, cellHeight, chosenRow)) {
      context.font = `${size}px ${family}`;
      context.fillStyle = colour(chosenRow === row ? "accent" : "muted");
      context.fillText(rowLabel(row), 0, clamp(top + (row + 0.5) * cellHeight, size / 2, height - size / 2), left - 6);
    }
    for (const { index: column, size } of top ? labelled(matrix.columns, cellWidth, cursor?.[1]) : []) {
      context.save();
      context.translate(left + (column + 0.5) * cellWidth, top - 5);
      context.rotate(-Math.PI / 2);
      context.font = `${size}px ${family}`;
      context.fillStyle = colour(cursor?.[1] === column ? "accent" : "muted");
      context.fillText(columnLabel(column), 0, 0, LABEL_HEIGHT - 8);
      context.restore();
    }
    for (const edge of edges) drawEdge(context, edge);
    if (chosenRow !== undefined) outline(context, chosenRow, 0, matrix.columns, colour("muted"), 1);
    if (cursor) outline(context, cursor[0], cursor[1], 1, colour("ink"), 2);
  }

  function outline(context, row, column, columns, stroke, thickness) {
    const { left, top, cellWidth, cellHeight } = place;
    context.strokeStyle = stroke;
    context.lineWidth = thickness;
    context.strokeRect(left + column * cellWidth, top + row * cellHeight, columns * cellWidth, cellHeight);
  }

  function drawEdge(context, { stroke, dash, at }) {
    const { left, top, cellWidth, cellHeight } = place;
    context.strokeStyle = stroke();
    context.lineWidth = 2;
    context.setLineDash(dash);
    context.beginPath();
    for (const row of range(matrix.rows)) {
      const column = at(row);
      if (column === null) continue;
      context.lineTo(left + column * cellWidth, top + row * cellHeight);
      context.lineTo(left + column * cellWidth, top + (row + 1) * cellHeight);
    }
    context.stroke();
    context.setLineDash([]);
  }

  function read(row, column) {
    cursor = [clamp(row, 0, matrix.rows - 1), clamp(column, 0, matrix.columns - 1)];
    cursors.set(label, cursor);
    readout.className = "";
    readout.replaceChildren(...describe(...cursor, matrix.data[cursor[0] * matrix.columns + cursor[1]]).flat(Infinity));
    draw();
  }

  function cellAt(event) {
    const { left, top, cellWidth, cellHeight } = place;
    const column = Math.floor((event.offsetX - left) / cellWidth),
      row = Math.floor((event.offsetY - top) / cellHeight);
    return column >= 0 && row >= 0 && column < matrix.columns && row < matrix.rows ? [row, column] : null;
  }

  canvas.addEventListener("draw", draw);
  canvas.addEventListener("pointermove", (event) => {
    const cell = cellAt(event);
    if (cell) read(...cell);
  });
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (!cell) return;
    read(...cell);
    onpick?.(...cell);
  });
  canvas.addEventListener("keydown", (event) => {
    const [row, column] = cursor ?? [chosenRow ?? 0, 0];
    const moves = {
      ArrowUp: [row - 1, column],
      ArrowDown: [row + 1, column],
      ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1],
      Home: [row, 0],
      End: [row, matrix.columns - 1],
    };
    if (event.key === "Enter" && onpick) onpick(row, column);
    else if (moves[event.key]) read(...(cursor ? moves[event.key] : [row, column]));
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  canvas.addEventListener("focus", () => {
    if (!cursor && canvas.matches(":focus-visible")) read(chosenRow ?? 0, 0);
  });
  const figure = el("figure", null, canvas, readout);
  new ResizeObserver(() => (cursor ? read(...cursor) : draw())).observe(figure);
  return figure;
}
