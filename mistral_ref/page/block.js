// The block as a diagram to click through, and all that is known of the step that one stands at.

const ROW = 50, BOX = 34;
const STREAM_NAMES = { residual_after_attention: ["+", "after attention"], residual_after_ffn: ["+", "after feed-forward"] };

// Where each step of a block stands: [x, row, width].
function blockPlaces() {
  const places = {
    attention_norm: [150, 1, 256], q: [150, 2, 80], k: [238, 2, 80], v: [326, 2, 80], q_rotated: [150, 3, 80],
    k_rotated: [238, 3, 80], scores: [150, 4, 168], attention_weights: [150, 5, 168], heads: [150, 6, 256],
    attention_out: [150, 7, 256], residual_after_attention: [4, 7, 124], ffn_norm: [150, 8, 256],
  };
  return Object.assign(places, config.experts ? {
    router_logits: [302, 9, 104], expert_weights: [302, 10, 104], gate: [150, 11, 70], up: [226, 11, 70],
    ffn_hidden: [150, 12, 146], ffn_out: [150, 13, 256], residual_after_ffn: [4, 13, 124],
  } : {
    gate: [150, 9, 124], up: [282, 9, 124], ffn_hidden: [150, 10, 256], ffn_out: [150, 11, 256], residual_after_ffn: [4, 11, 124],
  });
}

// Which step flows into which, within a block.
const WIRES = [
  ["attention_norm", "q"], ["attention_norm", "k"], ["attention_norm", "v"], ["q", "q_rotated"], ["k", "k_rotated"],
  ["q_rotated", "scores"], ["k_rotated", "scores"], ["scores", "attention_weights"], ["attention_weights", "heads"], ["v", "heads"],
  ["heads", "attention_out"], ["attention_out", "residual_after_attention"], ["ffn_norm", "router_logits"], ["router_logits", "expert_weights"], ["expert_weights", "ffn_out"],
  ["ffn_norm", "gate"], ["ffn_norm", "up"], ["gate", "ffn_hidden"], ["up", "ffn_hidden"], ["ffn_hidden", "ffn_out"], ["ffn_out", "residual_after_ffn"],
];

function wire(places, from, to) {
  if (!places[from] || !places[to]) return null;
  const [x, row, width] = places[from], [toX, toRow, toWidth] = places[to];
  if (row === toRow) { // sideways
    const y = row * ROW + BOX / 2, isLeft = toX < x;
    return svg("path", { class: "wire", "marker-end": "url(#head)", d: isLeft ? `M${x} ${y} H${toX + toWidth + 3}` : `M${x + width} ${y} H${toX - 3}` });
  }
  const middle = width < toWidth ? x + width / 2 : toX + toWidth / 2; // straight down, from the narrower of the two
  return svg("path", { class: "wire", "marker-end": "url(#head)", d: `M${middle} ${row * ROW + BOX} V${toRow * ROW - 3}` });
}

function stepBox(name, [x, row, width], state, go) {
  const step = stepByName.get(name), isStream = x < 100, isChosen = name === state.name;
  const lines = isStream ? STREAM_NAMES[step.kind] ?? ["x", step.kind] : [step.kind, step.shape.join(" × ")];
  const size = Math.min(isStream ? 13 : 12, (width - 6) / (0.61 * lines[0].length)); // a letter is about 0.61 of it wide
  const middle = x + width / 2, y = row * ROW;
  return svgButton(`box ${name}`, `${name.replaceAll(".", " ").replaceAll("_", " ")}, ${step.shape.join(" by ")}`, () => go({ name }), { class: `box${isStream ? " stream" : ""}`, "aria-pressed": String(isChosen) },
    svg("rect", { x, y, width, height: BOX }),
    svg("text", { class: "mono", x: middle, y: y + 15, "text-anchor": "middle", "font-size": size }, lines[0]),
    svg("text", { class: "muted", x: middle, y: y + 28, "text-anchor": "middle", "font-size": 10.5 }, lines[1]));
}

function blockDiagram(state, go) {
  const places = blockPlaces(), before = state.layer === 0 ? "embedding" : nameOf("residual_after_ffn", state.layer - 1);
  const last = places.residual_after_ffn[1], isLast = state.layer === config.layers - 1;
  if (isLast) Object.assign(places, { norm: [150, last + 1, 256], logits: [150, last + 2, 256] });
  const joins = [0, places.residual_after_attention[1], last].map((row) => row * ROW + BOX / 2);
  const height = joins[2] + (isLast ? 2 * ROW : 0) + BOX / 2 + 8;
  const branch = (y, toRow) => svg("path", { class: "wire", "marker-end": "url(#head)", d: `M66 ${y + BOX / 2 + 8} H278 V${toRow * ROW - 3}` });
  return svg("svg", { viewBox: `0 -2 410 ${height}`, role: "group", "aria-label": `The block of layer ${state.layer}: choose a step` },
    svg("defs", null, svg("marker", { id: "head", viewBox: "0 0 8 8", refX: 6, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" }, svg("path", { class: "wire-head", d: "M0 0 L8 4 L0 8 z" }))),
    svg("path", { class: "stream-line", d: `M66 ${joins[0]} V${joins[2]}` }),
    branch(joins[0], 1), branch(joins[1], 8), isLast && branch(joins[2], last + 1),
    [...WIRES, ["norm", "logits"]].map(([from, to]) => wire(places, from, to)),
    config.experts && svg("path", { class: "wire", d: `M302 ${10 * ROW + BOX / 2} H185` }), // which experts a token goes through
    stepBox(before, [4, 0, 124], state, go),
    [...blockKinds, ...(isLast ? ["norm", "logits"] : [])].map((kind) => stepBox(nameOf(kind, state.layer), places[kind], state, go)));
}

// The way through the model: the embedding, its layers, the end.
function stackChooser(state, go) {
  const { kind, layer } = state;
  const end = (name) => choice(`stack ${name}`, state.name === name, () => go({ name }), name);
  const inBlock = isEnd(kind) ? "attention_norm" : kind;
  return el("div", { class: "choices", role: "group", "aria-label": "Layer" },
    end("embedding"), el("span", { class: "muted small" }, "layer"),
    range(config.layers).map((index) => choice(`stack ${index}`, !isEnd(kind) && index === layer, () => go({ name: nameOf(inBlock, index) }), index)),
    end("norm"), end("logits"));
}

function headChooser(count, head, name, go) {
  return el("div", { class: "choices", role: "group", "aria-label": name },
    el("span", { class: "muted small" }, name), range(count).map((index) => choice(`${name} ${index}`, index === head, () => go(index), index)));
}

// The key/value head that a query head reads: h // (H / G).
const group = config.heads / config.kvHeads;
const axisHead = (step, head) => headAxis(step) === "kv_head" ? Math.floor(head / group) : head;

const spanWords = (edges, index) => edges[index + 1] - edges[index] > 1 ? `${edges[index]} to ${edges[index + 1] - 1}` : String(edges[index]);

function cellWords(step, matrix, head) {
  const [rowAxis, columnAxis] = matrix.axes, firstKey = step.firstKey ?? 0;
  const spot = (axis, edges, index) => axis === "key" ? ["key ", placeNodes(firstKey + index)]
    : axis === "token" || axis === "query" ? [`${axis} `, edges[index + 1] - edges[index] > 1 ? spanWords(edges.map((edge) => edge + start), index) : placeNodes(start + edges[index])]
      : [`${axis.replaceAll("_", " ")} ${spanWords(edges, index)}`];
  return (row, column, value) => [
    head === null ? "" : `head ${head}, `, ...spot(rowAxis, matrix.rowEdges, row), ", ", ...spot(columnAxis, matrix.columnEdges, column), ": ",
    el("b", null, value === -Infinity && step.firstKey !== null ? "out of sight" : digits(value)),
  ];
}

// How the picture of a step is read, and what stands in the row of the chosen token.
async function stepPicture(step, state, go) {
  const count = headAxis(step) && step.whole ? headCount(step) : 0, head = axisHead(step, state.head);
  const matrix = await matrixOf(step, head);
  if (matrix === null) {
    return [el("p", { class: "muted" }, "The values of this step were not kept. To have them: ", el("code", null, `--keep "${step.name}"`))];
  }
  const isTokens = matrix.axes[0] === "token" || matrix.axes[0] === "query", isWhole = Boolean(step.whole);
  const window = config.windows[state.layer], first = step.firstKey ?? 0, isAttention = step.firstKey !== null;
  const seen = (row, column) => !isAttention || attends(start + row, first + column, window);
  const parts = [
    count > 0 && headChooser(count, head, headAxis(step).replace("_", "/").replace("kv/head", "key/value head"), (index) => go({ head: headAxis(step) === "kv_head" ? index * group : index })),
    heat(matrix, {
      label: `Heat map of ${step.name}${count ? `, head ${head}` : ""}`, scale: scaleOf(step), describe: cellWords(step, matrix, count ? head : null),
      rowLabel: (row) => isTokens && isWhole ? placeText(start + row) : spanWords(matrix.rowEdges.map((edge) => edge + (isTokens ? start : 0)), row),
      isSeen: seen, chosenRow: isTokens && isWhole ? state.token : undefined, onpick: isTokens && isWhole ? (token) => go({ token }) : undefined,
    }),
    legend(step, isAttention && el("span", null, swatch(colour("unseen")), "out of sight"), !isWhole && el("span", null, "a picture: each cell is the largest of those it stands for; ", el("code", null, `--keep "${step.name}"`), " keeps every value")),
  ];
  if (isTokens && isWhole && !isAttention && matrix.columns <= 4096) {
    const row = matrix.data.subarray(state.token * matrix.columns, (state.token + 1) * matrix.columns);
    parts.push(el("div", null, el("h3", null, "The ", matrix.columns, " numbers of ", placeNodes(start + state.token), count > 0 && `, head ${head}`), rowBars(row, scaleOf(step), `The numbers of token ${start + state.token}, one after the other`)));
  }
  return parts;
}

function stepCost(step) {
  const cost = page.cost?.steps[step.name];
  if (page.cost && !cost) return ["cost", "counted with heads: unobserved, attention is one operation"];
  if (!cost) return null;
  return ["cost", `${units(cost.flops, "FLOP")}, ${units(cost.bytes, "B")}: bound by ${cost.bound}; ${duration(cost.seconds)} measured, ${duration(cost.predicted)} at the roof`];
}

function stepDetails(state, go) {
  const step = stepByName.get(state.name), { axes, formula, sentence } = page.kinds[step.kind], numbers = step.statistics;
  const picture = el("div", { class: "stack" }), isAttention = step.firstKey !== null;
  fill(picture, stepPicture(step, state, go));
  const walkTo = (by, label, sign) => el("button", { type: "button", "data-key": label, "aria-label": label, onclick: () => go({ name: neighbour(step.name, by) }) }, sign);
  return el("section", { class: "card stack", "aria-label": "The step" },
    el("div", null, el("div", { class: "row" }, el("h2", { class: "mono" }, step.name), el("div", { class: "icons" }, walkTo(-1, "the step before", "←"), walkTo(1, "the next step", "→"))), el("p", null, sentence)),
    el("div", { class: "formula", tabindex: 0, "aria-label": "formula" }, formula),
    facts([
      ["shape", axes.map((axis, index) => `${axis} ${step.shape[index]}`).join(" × "), `, ${step.dtype}`],
      ["values", `${digits(numbers.low)} to ${digits(numbers.high)}, mean ${digits(numbers.mean)}, rms ${digits(numbers.rms)}`, numbers.n_infinite > 0 && `, ${grouped(numbers.n_infinite)} infinite`, numbers.n_nan > 0 && `, ${grouped(numbers.n_nan)} NaN`, isAttention && "; of the pairs in sight"],
      stepCost(step),
      ["source", el("code", null, step.source), step.code && el("code", { class: "line" }, step.code)],
    ]),
    picture,
    el("div", { class: "halves" },
      el("div", null, el("h3", null, "How its values are spread (square-root heights)"), histogram(step)),
      !isEnd(step.kind) && el("div", null, el("h3", null, "Its root mean square, layer by layer"), overLayers(step.kind, state.layer, (layer) => go({ name: nameOf(step.kind, layer) })))));
}

// On a phone the step stands below the diagram in which it was chosen.
function showDetails() {
  if (matchMedia("(max-width: 860px)").matches) panel.querySelector("section").scrollIntoView({ block: "start" });
}

const blockView = {
  title: "Block",
  heading: "One block, step by step",
  lead: "The residual stream runs down on the left. Attention and the feed-forward read a normed copy of it and add what they find. Choose a step to see its values; the keys ← and → walk on in the order of the pass, ↑ and ↓ change the layer.",
  draw: (state, go) => [
    stackChooser(state, go),
    el("div", { class: "split" }, el("div", { class: "card" }, el("h3", null, `Layer ${state.layer}`), blockDiagram(state, (patch) => { go(patch); showDetails(); })), stepDetails(state, go)),
  ],
};
