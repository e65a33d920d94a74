// Pictures of numbers: heat maps with values under the pointer or the arrow keys, histograms, bars.

const RAMPS = {
  light: { plus: ["#ffffff", "#fbc6a6", "#e8743b", "#a8330a", "#5c1602"], minus: ["#ffffff", "#b5d8f2", "#4a9bd6", "#0b5c9c", "#052c4f"] },
  dark: { plus: ["#181b22", "#5e321d", "#b85a26", "#ff9a62", "#ffe9da"], minus: ["#181b22", "#1a3f60", "#2b79b8", "#6cb8f5", "#e0f1ff"] },
};
const theme = () => document.documentElement.dataset.theme;
const bytesOf = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

// The colour of a number of -1 to 1. Square roots, so that what is small can be seen beside what is large.
function shade(number) {
  if (Number.isNaN(number) || number === Infinity) return theme() === "dark" ? [255, 0, 160] : [200, 0, 120];
  const ramp = RAMPS[theme()][number < 0 ? "minus" : "plus"];
  const at = Math.sqrt(Math.min(Math.abs(number), 1)) * (ramp.length - 1), first = Math.min(Math.floor(at), ramp.length - 2);
  const [low, high] = [bytesOf(ramp[first]), bytesOf(ramp[first + 1])];
  return low.map((byte, index) => byte + (high[index] - byte) * (at - first));
}

// A picture of a pixel a cell; `isSeen(row, column)` tells the cells that a query can look at.
function pixels(matrix, scale, isSeen) {
  const canvas = el("canvas", { width: matrix.columns, height: matrix.rows });
  const context = canvas.getContext("2d"), image = context.createImageData(matrix.columns, matrix.rows);
  const unseen = bytesOf(colour("unseen"));
  const ramp = range(513).map((step) => shade((step / 256 - 1) * Math.abs(step / 256 - 1))); // even steps of the square root
  matrix.data.forEach((value, index) => {
    const isHidden = value === -Infinity || (value === 0 && !isSeen(Math.floor(index / matrix.columns), index % matrix.columns));
    const share = clamp(value / scale, -1, 1);
    const rgb = isHidden ? unseen : Number.isFinite(value) ? ramp[Math.round((Math.sign(share) * Math.sqrt(Math.abs(share)) + 1) * 256)] : shade(NaN);
    image.data.set([...rgb, 255], 4 * index);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

const cursors = new Map(); // where the reader stands in each heat map, by its label
const LABEL_WIDTH = 104, LABEL_HEIGHT = 84, LEAST_LABEL = 10.5; // pixels

// A heat map as a figure. Options:
//   label       what it shows, for those who cannot see it
//   scale       what the strongest colour stands for
//   describe    (row, column, value) -> words for the cell under the pointer
//   rowLabel, columnLabel   (index) -> the label of a row or column, drawn where there is room
//   isSquare    cells are squares
//   isSeen      (row, column) -> false for what is out of sight
//   edges       () -> [{name, cells: (row) -> column or null}] lines to the left of these columns
//   chosenRow, onpick       the row that is marked, and what is done when another is picked
function heat(matrix, options) {
  const { label, scale, describe, rowLabel, columnLabel, isSquare = false, isSeen = () => true, edges = [], onpick } = options;
  const readout = el("output", { "aria-live": "polite" }, "Point at a cell, or use the arrow keys in the picture.");
  const canvas = el("canvas", { tabindex: 0, role: "application", "aria-roledescription": "heat map", "aria-label": `${label}. Arrow keys read cells.`, "data-key": `heat ${label}` });
  let place = null, cursor = null, picture = null, shownColumns = 0;

  function layout() {
    const width = canvas.parentElement.clientWidth;
    const squares = Math.min((width - LABEL_WIDTH) / matrix.columns, 30);
    let cellHeight = isSquare ? squares : clamp(440 / matrix.rows, 3, 22);
    const left = width > 420 && cellHeight >= LEAST_LABEL ? LABEL_WIDTH : 0;
    const cellWidth = isSquare ? Math.min((width - left) / matrix.columns, 30) : (width - left) / matrix.columns;
    if (isSquare) cellHeight = cellWidth;
    const top = columnLabel && left && cellWidth >= LEAST_LABEL ? LABEL_HEIGHT : 0;
    return { width, left, top, cellWidth, cellHeight, height: top + Math.ceil(cellHeight * matrix.rows) };
  }

  function draw() {
    place = layout();
    const { width, left, top, cellWidth, cellHeight, height } = place, ratio = window.devicePixelRatio || 1;
    if (width === 0) return;
    const mapWidth = cellWidth * matrix.columns, mapHeight = cellHeight * matrix.rows;
    const columns = Math.min(matrix.columns, Math.max(1, Math.floor(mapWidth)));
    if (picture === null || columns !== shownColumns) {
      picture = pixels(narrowed(matrix, columns), scale, isSeen);
      shownColumns = columns;
    }
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    context.drawImage(picture, left, top, mapWidth, mapHeight);
    context.font = `${Math.min(12, 0.92 * cellHeight)}px ${getComputedStyle(document.body).fontFamily}`;
    context.textBaseline = "middle";
    if (left) {
      for (const row of range(matrix.rows)) {
        context.fillStyle = colour(options.chosenRow === row ? "accent" : "muted");
        context.fillText(rowLabel(row), 0, top + (row + 0.5) * cellHeight, left - 8);
      }
    }
    if (top) {
      for (const column of range(matrix.columns)) {
        context.save();
        context.translate(left + (column + 0.5) * cellWidth, top - 5);
        context.rotate(-Math.PI / 2);
        context.fillStyle = colour(cursor?.[1] === column ? "accent" : "muted");
        context.fillText(columnLabel(column), 0, 0, LABEL_HEIGHT - 8);
        context.restore();
      }
    }
    for (const edge of edges) drawEdge(context, edge);
    if (options.chosenRow !== undefined) outline(context, options.chosenRow, 0, matrix.columns, colour("muted"), 1);
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
    readout.replaceChildren(...describe(...cursor, matrix.data[cursor[0] * matrix.columns + cursor[1]]).flat(Infinity));
    draw();
  }

  function cellAt(event) {
    const { left, top, cellWidth, cellHeight } = place;
    const column = Math.floor((event.offsetX - left) / cellWidth), row = Math.floor((event.offsetY - top) / cellHeight);
    return column >= 0 && row >= 0 && column < matrix.columns && row < matrix.rows ? [row, column] : null;
  }

  canvas.addEventListener("pointermove", (event) => { const cell = cellAt(event); if (cell) read(...cell); });
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (!cell) return;
    read(...cell);
    onpick?.(cell[0]);
  });
  canvas.addEventListener("keydown", (event) => {
    const [row, column] = cursor ?? [options.chosenRow ?? 0, 0];
    const moves = { ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], Home: [row, 0], End: [row, matrix.columns - 1] };
    if (event.key === "Enter" && onpick) onpick(row);
    else if (moves[event.key]) read(...(cursor ? moves[event.key] : [row, column]));
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  canvas.addEventListener("focus", () => { if (!cursor && canvas.matches(":focus-visible")) read(options.chosenRow ?? 0, 0); });
  const figure = el("figure", null, canvas, readout);
  if (cursors.has(label)) cursor = cursors.get(label);
  new ResizeObserver(() => cursor ? read(...cursor) : draw()).observe(figure);
  return figure;
}

// What the colours of a heat map stand for.
function legend(step, ...more) {
  const { low, high } = step.statistics, scale = scaleOf(step), isBroken = step.statistics.n_nan + step.statistics.n_infinite > 0;
  const least = low < 0 ? -1 : 0, most = high > 0 ? 1 : 0, columns = 120;
  const data = Float32Array.from({ length: columns }, (_, index) => {
    const at = least + ((most - least) * index) / (columns - 1);
    return at * Math.abs(at) || 1e-9; // even steps of the square root
  });
  return el("div", { class: "legend" },
    least ? `−${digits(scale)}` : "0", pixels({ rows: 1, columns, data }, 1, () => true), most ? digits(scale) : "0",
    el("span", null, "square-root scale"), isBroken && el("span", null, swatch(`rgb(${shade(NaN).join(" ")})`), "NaN or infinite"), more);
}

const swatch = (fill) => svg("svg", { viewBox: "0 0 12 12", class: "swatch", "aria-hidden": "true" }, svg("rect", { width: 12, height: 12, fill }));
const lineSwatch = (stroke, dash) => svg("svg", { viewBox: "0 0 24 12", class: "line swatch", "aria-hidden": "true" }, svg("line", { x2: 24, y1: 6, y2: 6, stroke, "stroke-width": 2.5, "stroke-dasharray": dash }));

// How many values lie where, between the smallest and the largest.
function histogram(step) {
  const { histogram: counts, statistics: { low, high } } = step;
  if (counts.length === 0) return el("p", { class: "muted small" }, "no finite values");
  const width = 480, height = 110, bar = width / counts.length, most = Math.max(...counts);
  const zero = low < 0 && high > 0 ? (width * -low) / (high - low) : null;
  return svg("svg", { viewBox: `0 0 ${width} ${height + 22}`, role: "img", class: "bars", "aria-label": `Histogram: ${grouped(sum(counts))} values from ${digits(low)} to ${digits(high)}, the fullest of ${counts.length} bins holds ${grouped(most)}` },
    counts.map((count, index) => {
      const tall = count && Math.max(1.5, (height - 4) * Math.sqrt(count / most));
      return svg("rect", { x: index * bar + 0.5, y: height - tall, width: bar - 1, height: tall },
        svg("title", null, `${grouped(count)} values from ${digits(low + ((high - low) * index) / counts.length)} to ${digits(low + ((high - low) * (index + 1)) / counts.length)}`));
    }),
    svg("line", { class: "axis", x1: 0, x2: width, y1: height, y2: height }),
    zero !== null && svg("line", { class: "axis", x1: zero, x2: zero, y1: 0, y2: height + 4 }),
    zero !== null && zero > 60 && zero < width - 60 && svg("text", { class: "muted", x: zero, y: height + 17, "text-anchor": "middle", "font-size": 12 }, "0"),
    svg("text", { class: "muted", x: 0, y: height + 17, "font-size": 12 }, digits(low)),
    svg("text", { class: "muted", x: width, y: height + 17, "text-anchor": "end", "font-size": 12 }, digits(high)));
}

// The numbers of one row, upwards and downwards from 0.
function rowBars(values, scale, label) {
  const width = 640, height = 96, middle = height / 2, bar = width / values.length;
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", height, width: "100%", role: "img", "aria-label": label, class: "bars" },
    svg("line", { class: "axis", x1: 0, x2: width, y1: middle, y2: middle }),
    Array.from(values, (value, index) => {
      if (!Number.isFinite(value) || value === 0) return null;
      const tall = middle * Math.sqrt(Math.abs(value) / scale);
      return svg("rect", { class: value < 0 ? "minus" : "plus", x: index * bar, y: value < 0 ? middle : middle - tall, width: Math.max(bar * 0.85, 0.4), height: tall });
    }));
}

// The root mean square of one kind of step in every layer, each a way there.
function overLayers(kind, layer, ongo) {
  const steps = range(config.layers).map((index) => stepByName.get(nameOf(kind, index)));
  const sizes = steps.map((step) => step.statistics.rms ?? NaN), most = Math.max(...sizes.filter(Number.isFinite)) || 1;
  const width = 480, height = 84, bar = width / steps.length, space = Math.min(6, bar * 0.2);
  return svg("svg", { viewBox: `0 0 ${width} ${height + 20}`, class: "bars", role: "group", "aria-label": "Root mean square in each layer" },
    sizes.map((size, index) => {
      const tall = Math.max(2, ((height - 18) * (size || 0)) / most);
      return svg("g", { onclick: () => ongo(index), cursor: "pointer" },
        svg("title", null, `layer ${index}: rms ${digits(size)}`),
        svg("rect", { x: index * bar, y: 0, width: bar, height: height + 20, opacity: 0 }),
        svg("rect", { class: index === layer ? "now" : "", x: index * bar + space, y: height - tall, width: bar - 2 * space, height: tall }),
        bar > 40 && svg("text", { class: "muted", x: (index + 0.5) * bar, y: height - tall - 5, "text-anchor": "middle", "font-size": 11 }, digits(Number(size.toPrecision(3)))), // NaN stays NaN
        bar > 12 && svg("text", { class: "muted", x: (index + 0.5) * bar, y: height + 15, "text-anchor": "middle", "font-size": 11 }, String(index)));
    }));
}
