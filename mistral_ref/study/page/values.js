// The pass that is shown: what is known of it, and the values of its steps, unpacked when they are looked at.

let page, config, tokens, start, stepByName, group;
function load(data) {
  page = data;
  ({ config, tokens, start } = page);
  stepByName = new Map(page.steps.map((step) => [step.name, step]));
  group = config.heads / config.kvHeads; // how many query heads share a key/value head
}
load(JSON.parse(document.getElementById("data").textContent)); // what was written into the page

// What a view asks for when it is drawn. A file holds all of it; the live page asks its server.
const PARTS = {
  values: (name) => stepByName.get(name), // {statistics, histogram, whole, picture} of a step
  sizes: (kind) => range(config.layers).map((layer) => inLayer(kind, layer)?.statistics.rms ?? null),
  lens: () => page.lens,
};
let part = async (name, of) => PARTS[name](of);

// What is said of values that are not here.
let howToKeep = (pattern) => ["To have them: ", el("code", null, `--keep "${pattern}"`)];

const isEnd = (kind) => kind === "embedding" || kind === "norm" || kind === "logits";
const inLayer = (kind, layer) => stepByName.get(`layers.${layer}.${kind}`);
// The name of a kind of step in a layer. An adapter's step leads to the step that it adds to where the layer lacks it.
const isAdapters = (kind) => /_lora_[ab]$/.test(kind);
const nameOf = (kind, layer) =>
  isEnd(kind) ? kind : (inLayer(kind, layer)?.name ?? `layers.${layer}.${kind.replace(/_lora_[ab]$/, "")}`);
const kindsIn = (layer) => Object.keys(page.kinds).filter((kind) => inLayer(kind, layer));

// What stands at a position: the token's piece and where it is. Positions before the pass, and behind it, have no piece here.
const pieceAt = (position) => tokens[position - start]?.piece ?? "";
const placeText = (position) => `\u2068${pieceAt(position) || "@"}\u2069 ${position}`; // isolated: pieces may run from right to left
const placeNodes = (position) =>
  pieceAt(position) ? [pieceText(pieceAt(position)), ` ${position}`] : [`${position < start ? "@" : "position"} ${position}`];

// Whether the token at position `query` sees the one at `key`: 0 <= query - key < window, as in reference_ops.py.
const attends = (query, key, window) => query >= key && (window === null || query - key < window);

// Which key/value head a query head reads: h // (H / G).
const readBy = (head) => Math.floor(head / group);

async function inflated(base64) {
  const packed = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The number that 16 bits stand for (IEEE 754 binary16).
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1,
    exponent = (bits >> 10) & 31,
    fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
}
const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => half(bits));

async function unpackedWhole({ exponent, data }) {
  const bytes = await inflated(data),
    size = bytes.length / 2,
    scale = 2 ** exponent;
  return Float32Array.from({ length: size }, (_, index) => scale * HALVES[bytes[index] | (bytes[size + index] << 8)]);
}

const LEVELS = 126; // of a picture's cells either way; beyond them: out of sight, and NaN or infinite
async function unpackedPicture({ scale, data }) {
  const levels = new Int8Array((await inflated(data)).buffer);
  return Float32Array.from(levels, (level) =>
    level < -LEVELS ? -Infinity : level > LEVELS ? NaN : (level / LEVELS) * scale,
  );
}

const unpacked = new WeakMap();
// All numbers of a step, as a Float32Array in the order of its shape; null where only attention's absence was kept.
function numbersOf(values) {
  if (!values.whole && !values.picture) return Promise.resolve(null);
  if (!unpacked.has(values)) {
    unpacked.set(values, values.whole ? unpackedWhole(values.whole) : unpackedPicture(values.picture));
  }
  return unpacked.get(values);
}

// Which of `size` numbers share each of at most `most` cells, as display.cell_ranges has it: the edges between them.
const cellEdges = (size, most) =>
  range(Math.min(size, most) + 1).map((cell) => Math.floor((cell * size) / Math.min(size, most)));

const headAxis = (step) => page.kinds[step.kind].axes.find((axis) => axis === "head" || axis === "kv_head");
const headCount = (step) => step.shape[page.kinds[step.kind].axes.indexOf(headAxis(step))];

// A step, or one head of it, as a matrix: {rows, columns, data, rowEdges, columnEdges, axes}. Null: it was not kept.
async function matrixOf(step, values, head) {
  const numbers = await numbersOf(values);
  if (numbers === null) return null;
  const { axes } = page.kinds[step.kind],
    shape = step.shape;
  if (!values.whole) {
    const [rows, columns] = values.picture.shape,
      width = shape.slice(1).reduce((a, b) => a * b, 1);
    return {
      rows,
      columns,
      data: numbers,
      axes: [axes[0], axes.slice(1).join(" × ")],
      rowEdges: cellEdges(shape[0], rows),
      columnEdges: cellEdges(width, columns),
    };
  }
  if (shape.length === 2) return wholeMatrix(numbers, shape, axes);
  if (axes[0] === "head") {
    const size = shape[1] * shape[2];
    return wholeMatrix(numbers.subarray(head * size, (head + 1) * size), shape.slice(1), axes.slice(1));
  }
  const [rows, heads, width] = shape,
    data = new Float32Array(rows * width);
  for (const row of range(rows))
    data.set(numbers.subarray((row * heads + head) * width, (row * heads + head + 1) * width), row * width);
  return wholeMatrix(data, [rows, width], [axes[0], axes[2]]);
}

const wholeMatrix = (data, [rows, columns], axes) => ({
  rows,
  columns,
  data,
  axes,
  rowEdges: range(rows + 1),
  columnEdges: range(columns + 1),
});

// The same with at most so many columns: of those that share a cell, the number that is largest without its sign.
function narrowed(matrix, most) {
  if (matrix.columns <= most) return matrix;
  const edges = cellEdges(matrix.columns, most),
    data = new Float32Array(matrix.rows * most).fill(-Infinity);
  for (const row of range(matrix.rows)) {
    for (const cell of range(most)) {
      for (let column = edges[cell]; column < edges[cell + 1]; column++) {
        const value = matrix.data[row * matrix.columns + column],
          held = data[row * most + cell];
        if (held === -Infinity || Math.abs(value) > Math.abs(held) || Number.isNaN(value))
          data[row * most + cell] = value;
      }
    }
  }
  return { ...matrix, columns: most, data, columnEdges: edges.map((edge) => matrix.columnEdges[edge]) };
}

// What the strongest colour stands for: the largest finite number of a step without its sign. Of a difference it is no less
// than what rounding explains.
const largestOf = ({ statistics: { low, high } }) => Math.max(Math.abs(low ?? 0), Math.abs(high ?? 0));
const scaleOf = (values) => Math.max(largestOf(values), values.rounding ?? 0) || 1;
const isRounding = (values) => largestOf(values) <= (values.rounding ?? -1);
