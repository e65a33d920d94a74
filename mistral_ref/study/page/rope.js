// RoPE: each pair of a query's and a key's numbers is a hand that turns with the position; their score keeps to the distance.

const turned = ([x, y], angle) => [
  x * Math.cos(angle) - y * Math.sin(angle),
  x * Math.sin(angle) + y * Math.cos(angle),
];
const pairsOf = (values) => range(values.length / 2).map((pair) => [values[2 * pair] ?? 0, values[2 * pair + 1] ?? 0]);
const ropeState = { query: 12, distance: 5 };

// The score of the page's query at position i and its key at position j: sum over pairs of R(i θ) q · R(j θ) k / sqrt(K),
// times YaRN's factor, once for the query and once for the key, and the temperature of a query at i.
function ropeScore(i, j) {
  const { q, k, frequencies, factor, temperature } = page.rope,
    keys = pairsOf(k);
  const scale =
    factor ** 2 * (temperature ? 1 + temperature.beta * Math.log1p(Math.floor(i / temperature.positions)) : 1);
  return (
    (scale *
      sum(
        pairsOf(q).map((pair, index) => {
          const a = turned(pair, i * frequencies[index]),
            b = turned(keys[index], j * frequencies[index]);
          return a[0] * b[0] + a[1] * b[1];
        }),
      )) /
    Math.sqrt(q.length)
  );
}

function clock(pair, { query, distance }, lengths) {
  const { q, k, frequencies } = page.rope,
    radius = 38;
  const hand = (kind, values, longest, position) => {
    const [a, b] = turned(pairsOf(values)[pair], position * frequencies[pair]),
      length = Math.hypot(a, b) || 1;
    const scale = (radius * (0.35 + (0.65 * length) / longest)) / length; // a short hand still shows where it points
    return [
      svg("line", { class: `hand ${kind}`, x2: a * scale, y2: -b * scale }),
      svg("circle", { class: `tip ${kind}`, cx: a * scale, cy: -b * scale, r: 3.6 }),
    ];
  };
  const degrees = (frequencies[pair] * 180) / Math.PI;
  return svg(
    "svg",
    { viewBox: "-44 -42 88 112", "aria-hidden": "true" },
    svg("circle", { class: "clock", r: radius }),
    hand("q", q, lengths[0], query),
    hand("k", k, lengths[1], query - distance),
    svg("text", { y: 52, "text-anchor": "middle", "font-size": 10.5 }, `pair ${pair}`),
    svg(
      "text",
      { class: "muted", y: 65, "text-anchor": "middle", "font-size": 10 },
      `${degrees < 1e-3 ? degrees.toExponential(1).replace("-", "−") : digits(Number(degrees.toPrecision(3)))}°`,
    ),
  );
}

function clocks(state) {
  const { q, k, frequencies } = page.rope,
    n = frequencies.length,
    nShown = Math.min(n, 16);
  const shown = range(nShown).map((index) => Math.round((index * (n - 1)) / Math.max(nShown - 1, 1)));
  const longest = (values) => Math.max(...shown.map((pair) => Math.hypot(...pairsOf(values)[pair]))) || 1,
    lengths = [longest(q), longest(k)];
  return el(
    "div",
    {
      class: "clocks",
      role: "img",
      "aria-label": `Hands of ${shown.length} pairs: the query at position ${state.query}, the key at position ${state.query - state.distance}`,
    },
    shown.map((pair) => clock(pair, state, lengths)),
  );
}

function scoreCurve(label, values, at, xLabel, isFlat) {
  const width = 430,
    height = 170,
    left = 46,
    bottom = 30,
    all = range(129).map((distance) => ropeScore(distance, 0));
  const [least, most] = [Math.min(...all), Math.max(...all)],
    pad = (most - least) * 0.1 || 1;
  const x = (index) => left + ((width - left - 10) * index) / (values.length - 1),
    y = (value) => 10 + (height - 10 - bottom) * (1 - (value - least + pad) / (most - least + 2 * pad));
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${label}: ${digits(values[at])} now` },
    svg("line", { class: "axis", x1: left, x2: width - 10, y1: height - bottom, y2: height - bottom }),
    [least, most].map((value) =>
      svg(
        "text",
        { class: "muted", x: left - 6, y: y(value) + 4, "text-anchor": "end", "font-size": 11 },
        digits(Number(value.toPrecision(2))),
      ),
    ),
    [0, (values.length - 1) / 2, values.length - 1].map((index) =>
      svg(
        "text",
        { class: "muted", x: x(index), y: height - bottom + 15, "text-anchor": "middle", "font-size": 11 },
        index,
      ),
    ),
    svg(
      "text",
      { class: "muted", x: (left + width) / 2, y: height - 2, "text-anchor": "middle", "font-size": 11 },
      xLabel,
    ),
    svg("path", {
      class: `curve${isFlat ? "" : " other"}`,
      d: `M${values.flatMap((value, index) => (value === null ? [] : [`${x(index).toFixed(1)} ${y(value).toFixed(1)}`])).join(" L")}`,
    }),
    svg("circle", { class: "dot", cx: x(at), cy: y(values[at]), r: 6 }),
  );
}

const ropeView = {
  title: "RoPE",
  heading: "Pairs that turn with the position",
  lead: "Each pair of a query's numbers (blue) and of a key's (dashed) is turned by its position times the pair's own speed. Move both by as much: every angle between two hands stays, and so does the score.",
  draw: () => {
    const hands = el("div", { class: "card stack" }),
      curves = el("div", { class: "halves" }),
      words = el("p", { "aria-live": "polite" });
    const { temperature } = page.rope;
    function set(patch) {
      // the key stands at position 0 or later, so the query at `distance` or later
      Object.assign(ropeState, patch);
      ropeState.query = Math.max(ropeState.query, ropeState.distance);
      const { query, distance } = ropeState;
      querySlider.set(query);
      hands.replaceChildren(
        el(
          "h3",
          null,
          `Query at position ${query} (blue), key at position ${query - distance} (dashed); below each pair how far it turns with a token`,
        ),
        clocks(ropeState),
      );
      curves.replaceChildren(
        el(
          "div",
          { class: "card" },
          el("h3", null, "Both move: the score stays"),
          scoreCurve(
            "Score over positions at one distance",
            range(257).map((i) => (i < distance ? null : ropeScore(i, i - distance))),
            query,
            "position i of the query, distance fixed",
            true,
          ),
        ),
        el(
          "div",
          { class: "card" },
          el("h3", null, "The distance changes: so does the score"),
          scoreCurve(
            "Score over distances",
            range(129).map((d) => ropeScore(d, 0)),
            distance,
            "distance i − j",
            false,
          ),
        ),
      );
      words.replaceChildren(
        "score = q' · k' / √K = ",
        el("b", null, digits(Number(ropeScore(query, query - distance).toPrecision(4)))),
        ` at distance i − j = ${distance}, wherever i is.`,
        temperature
          ? ` This model's queries grow a little warmer every ${grouped(temperature.positions)} positions; between those steps the score stays.`
          : "",
      );
    }
    const querySlider = slider("position i of the query", [0, 256], ropeState.query, String, (query) => set({ query }));
    const distanceSlider = slider("distance i − j", [0, 128], ropeState.distance, String, (distance) =>
      set({ distance }),
    );
    const play = player("Move both", 90, words, () => {
      set({ query: ropeState.query < 256 ? ropeState.query + 1 : ropeState.distance });
      return true;
    });
    set({});
    return el(
      "div",
      { class: "stack" },
      el("div", { class: "card controls" }, play.button, querySlider.node, distanceSlider.node),
      hands,
      curves,
      el(
        "div",
        { class: "card stack" },
        words,
        el(
          "p",
          { class: "muted small" },
          "The numbers are the last token's query and the first token's key in layer 0, head 0, from before they were turned. Pair j turns by ",
          el("code", null, `${grouped(config.theta)}^(−2j/${config.headDim})`),
          ` radians a token${config.yarn ? ", slower pairs by less, as YaRN has it" : ""}.`,
        ),
      ),
    );
  },
};
