// Who looks at whom: every head of a layer small, one of them large, and the strongest keys of one query.

function thumbnail(matrix, scale, isSeen) {
  const canvas = pixels(matrix, scale, isSeen);
  canvas.setAttribute("aria-hidden", "true");
  return canvas;
}

function strongest(matrix, row, firstKey) {
  const weights = matrix.data.subarray(row * matrix.columns, (row + 1) * matrix.columns);
  const order = range(matrix.columns)
    .sort((a, b) => Math.abs(weights[b]) - Math.abs(weights[a]))
    .slice(0, 8)
    .filter((key) => weights[key]);
  return el(
    "div",
    { class: "strong" },
    order.map((key) => {
      const bar = el("i");
      bar.style.width = `${100 * Math.min(Math.abs(weights[key]), 1)}%`;
      bar.classList.toggle("minus", weights[key] < 0);
      return [el("span", null, placeNodes(firstKey + key)), bar, el("b", null, digits(weights[key]))];
    }),
  );
}

// Where the lines of a head's picture stand: the causal edge on the right of the query, the window's to the left of its oldest key.
function sightEdges(step, window) {
  const key = (position) => clamp(position - step.firstKey, 0, step.shape[2]);
  const hasEdge = window !== null && start + step.shape[1] > window;
  return [
    { stroke: () => colour("ink"), dash: [], at: (row) => key(start + row + 1) },
    hasEdge && {
      stroke: () => colour("accent"),
      dash: [6, 3],
      at: (row) => (start + row - window + 1 > 0 ? key(start + row - window + 1) : null),
    },
  ].filter(Boolean);
}

// Underlines each token above by its weight.
function markTokens(matrix, query, firstKey) {
  [...tokenStrip.children].forEach((chip, token) => {
    const weight = Math.abs(matrix.data[query * matrix.columns + start + token - firstKey] ?? 0);
    chip.style.boxShadow =
      weight > 0.005
        ? `inset 0 -${Math.ceil(1 + 11 * Math.sqrt(weight))}px var(--accent-soft), inset 0 -2px var(--accent)`
        : "";
  });
}

async function attentionPicture(state, go) {
  const step = stepByName.get(nameOf("attention_weights", state.layer)),
    window = config.windows[state.layer],
    values = await part("values", step.name);
  if (!values.whole)
    return [
      el("p", null, "These weights were not kept. ", howToKeep("*.attention_weights")),
    ];
  const first = step.firstKey,
    isSeen = (row, column) => attends(start + row, first + column, window);
  const matrices = await Promise.all(range(config.heads).map((head) => matrixOf(step, values, head)));
  const matrix = matrices[state.head],
    query = state.token,
    { n_nan: nan } = values.statistics;
  const changesOf = (head) => ["attention_weights", "heads"].flatMap((kind) => hooks.changesAt(nameOf(kind, state.layer), head));
  const isDifference = values.rounding !== undefined,
    scale = isDifference ? scaleOf(values) : 1;
  if (state.view === "attention") markTokens(matrix, query, first); // another view may have been chosen meanwhile
  const describe = (row, column, value) => [
    placeNodes(start + row),
    " looks at ",
    placeNodes(first + column),
    ": ",
    el(
      "b",
      null,
      isSeen(row, column) || value !== 0
        ? `weight ${digits(value)}`
        : column + first > row + start
          ? "later, so not seen"
          : "before the window, so not seen",
    ),
  ];
  return [
    el(
      "div",
      { class: "thumbs", role: "group", "aria-label": "Head" },
      matrices.map((one, head) =>
        choice(
          `head ${head}`,
          head === state.head,
          () => go({ head }),
          thumbnail(one, scale, isSeen),
          `head ${head}`,
          changesOf(head).length > 0 && el("small", { class: "changed" }, "changed"),
        ),
      ),
    ),
    el(
      "div",
      { class: "split wide" },
      el(
        "div",
        { class: "card stack" },
        el("h3", null, `Layer ${state.layer}, head ${state.head}: a row for each query, a column for each key`),
        heat(matrix, {
          label: `Attention weights of layer ${state.layer}, head ${state.head}`,
          scale,
          describe,
          isSquare: matrix.columns < 3 * matrix.rows,
          isSeen,
          rowLabel: (row) => placeText(start + row),
          columnLabel: (column) => placeText(first + column),
          edges: sightEdges(step, window),
          chosenRow: query,
          onpick: (token) => go({ token }),
        }),
        legend(
          { statistics: { low: isDifference ? -scale : 0, high: scale, n_nan: nan, n_infinite: 0 } },
          el("span", null, swatch(colour("unseen")), "out of sight"),
          el("span", null, lineSwatch(colour("ink")), "causal edge: nothing later is seen"),
          el(
            "span",
            null,
            window !== null && lineSwatch(colour("accent"), "6 3"),
            window === null
              ? "no window: all that came before is seen"
              : `the window's edge: ${grouped(window)} keys, itself included${start + tokens.length > window ? "" : " (this text is shorter)"}`,
          ),
        ),
        changeNotes(changesOf(state.head)),
        isRounding(values) &&
          el("p", { class: "small" }, "The changes do not reach these weights: they are the same before and after."),
      ),
      el(
        "div",
        { class: "card stack" },
        el("h3", null, "What ", placeNodes(start + query), " looks at"),
        strongest(matrix, query, first),
        el(
          "p",
          { class: "muted small" },
          nan
            ? "Some weights are NaN."
            : isDifference
              ? isRounding(values) ? "Nothing differs here." : "The differences of a row add up to 0."
              : "The weights of a row add up to 1.",
          " Choose another token above, or a row in the picture.",
        ),
      ),
    ),
  ];
}

const attentionView = {
  title: "Attention",
  heading: "Who looks at whom",
  lead: "Each head gives every query a share of each key that it can see: softmax of the scores. Point at a cell for its weight.",
  draw: (state, go) => {
    const picture = el("div", { class: "stack" });
    fill(picture, attentionPicture(state, go));
    return [
      headChooser(config.layers, state.layer, "layer", (layer) =>
        go({ layer, name: nameOf("attention_weights", layer) }),
      ),
      picture,
    ];
  },
};
