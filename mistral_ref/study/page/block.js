// The block as a diagram to click through, and all that is known of the step that one stands at.

// The way through the model: the embedding, its layers, the end.
function stackChooser(state, go) {
  const { kind, layer } = state;
  const end = (name) => choice(`stack ${name}`, state.name === name, () => go({ name }), name);
  const inBlock = isEnd(kind) ? "attention_norm" : kind;
  return el(
    "div",
    { class: "choices", role: "group", "aria-label": "Layer" },
    end("embedding"),
    el("span", { class: "muted small" }, "layer"),
    range(config.layers).map((index) =>
      choice(`stack ${index}`, !isEnd(kind) && index === layer, () => go({ name: nameOf(inBlock, index) }), index),
    ),
    end("norm"),
    end("logits"),
  );
}

function headChooser(count, head, name, go) {
  return el(
    "div",
    { class: "choices", role: "group", "aria-label": name },
    el("span", { class: "muted small" }, name),
    range(count).map((index) => choice(`${name} ${index}`, index === head, () => go(index), index)),
  );
}

// The column of each step that the reader has chosen in its picture or its bars.
const picked = new Map();

const axisHead = (step, head) => (headAxis(step) === "kv_head" ? readBy(head) : head);

const spanWords = (edges, index) =>
  edges[index + 1] - edges[index] > 1 ? `${edges[index]} to ${edges[index + 1] - 1}` : String(edges[index]);

function cellWords(step, matrix, head) {
  const [rowAxis, columnAxis] = matrix.axes,
    firstKey = step.firstKey ?? 0;
  const spot = (axis, edges, index) =>
    axis === "key"
      ? ["key ", placeNodes(firstKey + index)]
      : axis === "token" || axis === "query"
        ? [
            `${axis} `,
            edges[index + 1] - edges[index] > 1
              ? spanWords(
                  edges.map((edge) => edge + start),
                  index,
                )
              : placeNodes(start + edges[index]),
          ]
        : [`${axis.replaceAll("_", " ")} ${spanWords(edges, index)}`];
  return (row, column, value) => [
    head === null ? "" : `head ${head}, `,
    ...spot(rowAxis, matrix.rowEdges, row),
    ", ",
    ...spot(columnAxis, matrix.columnEdges, column),
    ": ",
    el("b", null, value === -Infinity && step.firstKey !== null ? "out of sight" : digits(value)),
  ];
}

// How the picture of a step is read, and what stands in the row of the chosen token.
async function stepPicture(step, values, state, go) {
  const count = headAxis(step) && values.whole ? headCount(step) : 0,
    head = axisHead(step, state.head);
  const matrix = await matrixOf(step, values, head);
  if (matrix === null) {
    return [
      el(
        "p",
        { class: "muted" },
        "The values of this step were not kept. ",
        howToKeep(step.name),
      ),
    ];
  }
  const isTokens = matrix.axes[0] === "token" || matrix.axes[0] === "query",
    isWhole = Boolean(values.whole);
  const window = config.windows[state.layer],
    first = step.firstKey ?? 0,
    isAttention = step.firstKey !== null;
  const seen = (row, column) => !isAttention || attends(start + row, first + column, window);
  const label = `Heat map of ${step.name}${count ? `, head ${head}` : ""}`;
  const pick = (token, column) => {
    picked.set(step.name, column);
    cursors.set(label, [token, column]);
    go({ token });
  };
  const parts = [
    count > 0 &&
      headChooser(count, head, headAxis(step).replace("_", "/").replace("kv/head", "key/value head"), (index) =>
        go({ head: headAxis(step) === "kv_head" ? index * group : index }),
      ),
    heat(matrix, {
      label,
      scale: scaleOf(values),
      describe: cellWords(step, matrix, count ? head : null),
      rowLabel: (row) =>
        isTokens && isWhole
          ? placeText(start + row)
          : spanWords(
              matrix.rowEdges.map((edge) => edge + (isTokens ? start : 0)),
              row,
            ),
      isSeen: seen,
      chosenRow: isTokens && isWhole ? state.token : undefined,
      onpick: isTokens && isWhole ? pick : undefined,
    }),
    legend(
      values,
      isAttention && el("span", null, swatch(colour("unseen")), "out of sight"),
      !isWhole &&
        el(
          "span",
          null,
          "a picture: each cell is the largest of those it stands for. ",
          howToKeep(step.name),
        ),
    ),
  ];
  if (isTokens && isWhole && !isAttention && matrix.columns <= 4096) {
    const row = matrix.data.subarray(state.token * matrix.columns, (state.token + 1) * matrix.columns);
    parts.push(
      el(
        "div",
        null,
        el(
          "h3",
          null,
          "The ",
          matrix.columns,
          " numbers of ",
          placeNodes(start + state.token),
          count > 0 && `, head ${head}`,
        ),
        rowBars(row, scaleOf(values), `The numbers of token ${start + state.token}, one after the other`),
        largestNumbers(row, matrix.axes[1].replaceAll("_", " "), (column) => pick(state.token, column)),
      ),
    );
  }
  return parts;
}

function stepCost(step) {
  const cost = page.cost?.steps[step.name];
  if (page.cost && !cost) return ["cost", "counted with heads: unobserved, attention is one operation"];
  if (!cost) return null;
  return [
    "cost",
    `${units(cost.flops, "FLOP")}, ${units(cost.bytes, "B")}: bound by ${cost.bound}; ${duration(cost.seconds)} measured, ${duration(cost.predicted)} at the roof`,
  ];
}

// What is known of a step from its values.
async function stepValues(step, state, go) {
  const { axes } = page.kinds[step.kind];
  const [values, sizes] = await Promise.all([
    part("values", step.name),
    isEnd(step.kind) ? null : part("sizes", step.kind),
  ]);
  const numbers = values.statistics;
  return [
    facts([
      ["shape", axes.map((axis, index) => `${axis} ${step.shape[index]}`).join(" × "), `, ${step.dtype}`],
      [
        "values",
        `${digits(numbers.low)} to ${digits(numbers.high)}, mean ${digits(numbers.mean)}, rms ${digits(numbers.rms)}`,
        numbers.n_infinite > 0 && `, ${grouped(numbers.n_infinite)} infinite`,
        numbers.n_nan > 0 && `, ${grouped(numbers.n_nan)} NaN`,
        step.firstKey !== null && "; of the pairs in sight",
        isRounding(values) && "; no more than rounding explains",
      ],
      stepCost(step),
      ["source", el("code", null, step.source), step.code && el("code", { class: "line" }, step.code)],
    ]),
    ...(await stepPicture(step, values, state, go)),
    el(
      "div",
      { class: "halves" },
      el("div", null, el("h3", null, "How its values are spread (square-root heights)"), histogram(values)),
      sizes &&
        el(
          "div",
          null,
          el("h3", null, "Its root mean square, layer by layer"),
          overLayers(sizes, state.layer, (layer) => go({ name: nameOf(step.kind, layer) })),
        ),
    ),
  ];
}

const changeNotes = (words) => words.map((one) => el("p", { class: "small changed" }, "Your change: ", el("bdi", null, one)));

function stepDetails(state, go) {
  const step = stepByName.get(state.name),
    { formula, sentence } = page.kinds[step.kind];
  const walkTo = (by, label, sign) =>
    el(
      "button",
      { type: "button", "data-key": label, "aria-label": label, onclick: () => go({ name: neighbour(step.name, by) }) },
      sign,
    );
  return el(
    "section",
    { class: "card stack", "aria-label": "The step" },
    el(
      "div",
      null,
      el(
        "div",
        { class: "row" },
        el("h2", { class: "mono" }, step.name),
        el("div", { class: "icons" }, walkTo(-1, "the step before", "←"), walkTo(1, "the next step", "→")),
      ),
      el("p", null, sentence),
      changeNotes(hooks.changesAt(step.name)),
    ),
    el("div", { class: "formula", tabindex: 0, "aria-label": "formula" }, formula),
    fill(el("div", { class: "stack" }), stepValues(step, state, go)),
  );
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
    el(
      "div",
      { class: "split" },
      el(
        "div",
        { class: "card" },
        el("h3", null, `Layer ${state.layer}`),
        blockDiagram(state, (patch) => {
          go(patch);
          showDetails();
        }),
      ),
      stepDetails(state, go),
    ),
  ],
};
