// The block as a diagram: which step flows into which, and a button for each.

const ROW = 50,
  BOX = 34;
const STREAM_NAMES = {
  residual_after_attention: ["+", "after attention"],
  residual_after_ffn: ["+", "after feed-forward"],
};

// Where each step of a layer's block stands: [x, row, width].
function blockPlaces(layer) {
  const places = {
    attention_norm: [150, 1, 256],
    q: [150, 2, 80],
    k: [238, 2, 80],
    v: [326, 2, 80],
    q_rotated: [150, 3, 80],
    k_rotated: [238, 3, 80],
    scores: [150, 4, 168],
    attention_weights: [150, 5, 168],
    heads: [150, 6, 256],
    attention_out: [150, 7, 256],
    residual_after_attention: [4, 7, 124],
    ffn_norm: [150, 8, 256],
  };
  Object.assign(
    places,
    config.experts
      ? {
          router_logits: [302, 9, 104],
          expert_weights: [302, 10, 104],
          gate: [150, 11, 70],
          up: [226, 11, 70],
          ffn_hidden: [150, 12, 146],
          ffn_out: [150, 13, 256],
          residual_after_ffn: [4, 13, 124],
        }
      : {
          gate: [150, 9, 124],
          up: [282, 9, 124],
          ffn_hidden: [150, 10, 256],
          ffn_out: [150, 11, 256],
          residual_after_ffn: [4, 11, 124],
        },
  );
  return withAdapters(places, layer);
}

// The places with the two steps of each adapter in a row of their own, above the step that they add to.
function withAdapters(places, layer) {
  const adapted = Object.keys(places).filter((kind) => inLayer(`${kind}_lora_a`, layer));
  const rows = [...new Set(adapted.map((kind) => places[kind][1]))].sort((a, b) => a - b);
  const moved = (row) => row + rows.filter((other) => other <= row).length;
  const all = Object.fromEntries(Object.entries(places).map(([kind, [x, row, width]]) => [kind, [x, moved(row), width]]));
  for (const kind of adapted) {
    const [x, row, width] = all[kind],
      hidden = all.ffn_hidden;
    const middle = x + Math.min(width, kind === "ffn_out" ? hidden[2] : width) / 2, // here the inputs come down
      size = Math.min(60, middle - x - 6);
    all[`${kind}_lora_a`] = [middle - 6 - size, row - 1, size];
    all[`${kind}_lora_b`] = [middle + 6, row - 1, size];
  }
  return all;
}

// Which step flows into which, within a block.
const WIRES = [
  ["attention_norm", "q"],
  ["attention_norm", "k"],
  ["attention_norm", "v"],
  ["q", "q_rotated"],
  ["k", "k_rotated"],
  ["q_rotated", "scores"],
  ["k_rotated", "scores"],
  ["scores", "attention_weights"],
  ["attention_weights", "heads"],
  ["v", "heads"],
  ["heads", "attention_out"],
  ["attention_out", "residual_after_attention"],
  ["ffn_norm", "router_logits"],
  ["router_logits", "expert_weights"],
  ["expert_weights", "ffn_out"],
  ["ffn_norm", "gate"],
  ["ffn_norm", "up"],
  ["gate", "ffn_hidden"],
  ["up", "ffn_hidden"],
  ["ffn_hidden", "ffn_out"],
  ["ffn_out", "residual_after_ffn"],
];
// The same with the wires of the adapters that stand in these places.
function wiresOf(places) {
  const adapted = Object.keys(places).filter((kind) => places[`${kind}_lora_a`]);
  const into = WIRES.filter(([from, to]) => adapted.includes(to) && from !== "expert_weights");
  return [
    ...WIRES,
    ...into.map(([from, to]) => [from, `${to}_lora_a`]),
    ...adapted.flatMap((kind) => [
      [`${kind}_lora_a`, `${kind}_lora_b`],
      [`${kind}_lora_b`, kind],
    ]),
  ];
}

function wire(places, from, to) {
  if (!places[from] || !places[to]) return null;
  const [x, row, width] = places[from],
    [toX, toRow, toWidth] = places[to];
  if (row === toRow) {
    // sideways
    const y = row * ROW + BOX / 2,
      isLeft = toX < x;
    return svg("path", {
      class: "wire",
      "marker-end": "url(#head)",
      d: isLeft ? `M${x} ${y} H${toX + toWidth + 3}` : `M${x + width} ${y} H${toX - 3}`,
    });
  }
  const middle = width < toWidth ? x + width / 2 : toX + toWidth / 2; // straight down, from the narrower of the two
  return svg("path", {
    class: "wire",
    "marker-end": "url(#head)",
    d: `M${middle} ${row * ROW + BOX} V${toRow * ROW - 3}`,
  });
}

function stepBox(name, [x, row, width], state, go) {
  const step = stepByName.get(name),
    isStream = x < 100,
    isChosen = name === state.name;
  const lines = isStream
    ? (STREAM_NAMES[step.kind] ?? ["x", step.kind])
    : isAdapters(step.kind)
      ? [step.kind.at(-1).toUpperCase(), "lora"]
      : [step.kind, step.shape.join(" × ")];
  const size = Math.min(isStream ? 13 : 12, (width - 6) / (0.61 * lines[0].length)); // a letter is about 0.61 of it wide
  const middle = x + width / 2,
    y = row * ROW;
  return svgButton(
    `box ${name}`,
    `${name.replaceAll(".", " ").replaceAll("_", " ")}, ${step.shape.join(" by ")}`,
    () => go({ name }),
    { class: `box${isStream ? " stream" : ""}`, "aria-pressed": String(isChosen) },
    svg("rect", { x, y, width, height: BOX }),
    svg("text", { class: "mono", x: middle, y: y + 15, "text-anchor": "middle", "font-size": size }, lines[0]),
    svg("text", { class: "muted", x: middle, y: y + 28, "text-anchor": "middle", "font-size": 10.5 }, lines[1]),
  );
}

function blockDiagram(state, go) {
  const places = blockPlaces(state.layer),
    before = state.layer === 0 ? "embedding" : nameOf("residual_after_ffn", state.layer - 1);
  const last = places.residual_after_ffn[1],
    isLast = state.layer === config.layers - 1;
  if (isLast) Object.assign(places, { norm: [150, last + 1, 256], logits: [150, last + 2, 256] });
  const joins = [0, places.residual_after_attention[1], last].map((row) => row * ROW + BOX / 2);
  const height = joins[2] + (isLast ? 2 * ROW : 0) + BOX / 2 + 8;
  const branch = (y, toRow) =>
    svg("path", { class: "wire", "marker-end": "url(#head)", d: `M66 ${y + BOX / 2 + 8} H278 V${toRow * ROW - 3}` });
  return svg(
    "svg",
    { viewBox: `0 -2 410 ${height}`, role: "group", "aria-label": `The block of layer ${state.layer}: choose a step` },
    svg(
      "defs",
      null,
      svg(
        "marker",
        { id: "head", viewBox: "0 0 8 8", refX: 6, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" },
        svg("path", { class: "wire-head", d: "M0 0 L8 4 L0 8 z" }),
      ),
    ),
    svg("path", { class: "stream-line", d: `M66 ${joins[0]} V${joins[2]}` }),
    branch(joins[0], places.attention_norm[1]),
    branch(joins[1], places.ffn_norm[1]),
    isLast && branch(joins[2], last + 1),
    [...wiresOf(places), ["norm", "logits"]].map(([from, to]) => wire(places, from, to)),
    // which experts a token goes through
    config.experts && svg("path", { class: "wire", d: `M302 ${places.expert_weights[1] * ROW + BOX / 2} H185` }),
    stepBox(before, [4, 0, 124], state, go),
    [...kindsIn(state.layer), ...(isLast ? ["norm", "logits"] : [])].map((kind) =>
      stepBox(nameOf(kind, state.layer), places[kind], state, go),
    ),
  );
}
