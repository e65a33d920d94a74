// RoPE: each pair of a query's and a key's numbers is a hand that turns with the position; their score keeps to the distance.

const turned = ([x, y], angle) => [x * Math.cos(angle) - y * Math.sin(angle), x * Math.sin(angle) + y * Math.cos(angle)];
const pairsOf = (values) => range(values.length / 2).map((pair) => [values[2 * pair] ?? 0, values[2 * pair + 1] ?? 0]);
const ropeState = { query: 12, distance: 5 };

// The score of the page's query at position i and its key at position j: sum over pairs of R(i θ) q · R(j θ) k / sqrt(K).
function ropeScore(i, j) {
  const { q, k, frequencies } = page.rope, keys = pairsOf(k);
  return sum(pairsOf(q).map((pair, index) => {
    const a = turned(pair, i * frequencies[index]), b = turned(keys[index], j * frequencies[index]);
    return a[0] * b[0] + a[1] * b[1];
  })) / Math.sqrt(q.length);
}

function clocks({ query, distance }) {
  const { q, k, frequencies } = page.rope, n = frequencies.length, n_shown = Math.min(n, 16);
  const shown = range(n_shown).map((index) => Math.round((index * (n - 1)) / Math.max(n_shown - 1, 1)));
  const columns = window.innerWidth < 860 ? 4 : 8, size = 92, [queries, keys] = [pairsOf(q), pairsOf(k)];
  const longest = (pairs) => Math.max(...shown.map((pair) => Math.hypot(...pairs[pair]))) || 1;
  const lengths = [longest(queries), longest(keys)];
  return svg("svg", { viewBox: `0 0 ${columns * size} ${Math.ceil(shown.length / columns) * (size + 22)}`, class: "drawing", role: "img", "aria-label": `Hands of ${shown.length} pairs: the query at position ${query}, the key at position ${query - distance}` },
    shown.map((pair, index) => {
      const x = (index % columns + 0.5) * size, y = Math.floor(index / columns) * (size + 22) + size / 2, radius = size * 0.4;
      const hand = (kind, values, longest, position) => {
        const [a, b] = turned(values, position * frequencies[pair]), scale = radius * (0.35 + 0.65 * Math.hypot(a, b) / longest) / (Math.hypot(a, b) || 1);
        return [svg("line", { class: `hand ${kind}`, x1: x, y1: y, x2: x + a * scale, y2: y - b * scale }), svg("circle", { class: `tip ${kind}`, cx: x + a * scale, cy: y - b * scale, r: 3.6 })];
      };
      return [
        svg("circle", { class: "clock", cx: x, cy: y, r: radius }),
        hand("q", queries[pair], lengths[0], query), hand("k", keys[pair], lengths[1], query - distance),
        svg("text", { class: "muted", x, y: y + radius + 15, "text-anchor": "middle", "font-size": 10.5 }, `pair ${pair}: ${digits(Number((frequencies[pair] * 180 / Math.PI).toPrecision(3)))}°`),
      ];
    }));
}

function scoreCurve(label, values, at, xLabel, isFlat) {
  const width = 430, height = 170, left = 46, bottom = 30, all = range(129).map((distance) => ropeScore(256, 256 - distance));
  const [least, most] = [Math.min(...all), Math.max(...all)], pad = (most - least) * 0.1 || 1;
  const x = (index) => left + ((width - left - 10) * index) / (values.length - 1), y = (value) => 10 + (height - 10 - bottom) * (1 - (value - least + pad) / (most - least + 2 * pad));
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${label}: ${digits(values[at])} now` },
    svg("line", { class: "axis", x1: left, x2: width - 10, y1: height - bottom, y2: height - bottom }),
    [least, most].map((value) => svg("text", { class: "muted", x: left - 6, y: y(value) + 4, "text-anchor": "end", "font-size": 11 }, digits(Number(value.toPrecision(2))))),
    [0, (values.length - 1) / 2, values.length - 1].map((index) => svg("text", { class: "muted", x: x(index), y: height - bottom + 15, "text-anchor": "middle", "font-size": 11 }, index)),
    svg("text", { class: "muted", x: (left + width) / 2, y: height - 2, "text-anchor": "middle", "font-size": 11 }, xLabel),
    svg("path", { class: `curve${isFlat ? "" : " other"}`, d: `M${values.map((value, index) => `${x(index).toFixed(1)} ${y(value).toFixed(1)}`).join(" L")}` }),
    svg("circle", { class: "dot", cx: x(at), cy: y(values[at]), r: 6 }));
}

const ropeView = {
  title: "RoPE",
  heading: "Pairs that turn with the position",
  lead: "Each pair of a query's numbers (blue) and of a key's (dashed) is turned by its position times the pair's own speed. Move both by as much: every angle between two hands stays, and so does the score.",
  draw: () => {
    const hands = el("div", { class: "card stack" }), curves = el("div", { class: "halves" }), words = el("p", { "aria-live": "polite" });
    function set(patch) {
      Object.assign(ropeState, patch);
      const { query, distance } = ropeState;
      hands.replaceChildren(el("h3", null, `Query at position ${query} (blue), key at position ${query - distance} (dashed); below each pair how far it turns a token`), clocks(ropeState));
      curves.replaceChildren(
        el("div", { class: "card" }, el("h3", null, "Both move: the score stays"), scoreCurve("Score over positions at one distance", range(257).map((i) => ropeScore(i, i - distance)), query, "position i of the query, distance fixed", true)),
        el("div", { class: "card" }, el("h3", null, "The distance changes: so does the score"), scoreCurve("Score over distances", range(129).map((d) => ropeScore(query, query - d)), distance, "distance i − j", false)));
      words.replaceChildren("score = q' · k' / √K = ", el("b", null, digits(Number(ropeScore(query, query - distance).toPrecision(4)))), ` at distance i − j = ${distance}, wherever i is.`);
    }
    const querySlider = slider("position i of the query", [0, 256], ropeState.query, String, (query) => set({ query }));
    const distanceSlider = slider("distance i − j", [0, 128], ropeState.distance, String, (distance) => set({ distance }));
    const play = player("Move both", 90, () => { const query = (ropeState.query + 1) % 257; querySlider.set(query); set({ query }); return true; });
    set({});
    return el("div", { class: "stack" },
      el("div", { class: "card controls" }, play.button, querySlider.node, distanceSlider.node), hands, curves,
      el("div", { class: "card stack" }, words, el("p", { class: "muted small" }, "The numbers are the last token's query and the first token's key in layer 0, head 0, from before they were turned. Pair j turns by ", el("code", null, `${grouped(config.theta)}^(−2j/${config.headDim})`), " radians a token, or as YaRN changes that.")));
  },
};
