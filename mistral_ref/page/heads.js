// Grouped-query attention: which query head reads which key/value head.

function headMap(state, go) {
  const { heads, kvHeads } = config, width = 720, gap = width / heads, group = heads / kvHeads, radius = Math.min(gap * 0.38, 22);
  const y = { query: 46, kv: 190 }, queryX = (head) => (head + 0.5) * gap, kvX = (kv) => (kv + 0.5) * group * gap;
  const chosen = Math.floor(state.head / group), every = Math.ceil(14 / radius);
  return svg("svg", { viewBox: `0 0 ${width} 240`, class: "drawing", role: "group", "aria-label": `${heads} query heads read ${kvHeads} key/value heads` },
    svg("text", { class: "muted", x: 0, y: 12, "font-size": 12 }, `${heads} query heads: q, rows of wq`),
    svg("text", { class: "muted", x: 0, y: 236, "font-size": 12 }, `${kvHeads} key/value heads: k and v, kept in the cache`),
    range(heads).map((head) => svg("path", { class: `pair-link${head === state.head ? " now" : ""}`, d: `M${queryX(head)} ${y.query + radius} C ${queryX(head)} 130, ${kvX(Math.floor(head / group))} 110, ${kvX(Math.floor(head / group))} ${y.kv - 24}` })),
    range(heads).map((head) => svgButton(`map ${head}`, `query head ${head} reads key/value head ${Math.floor(head / group)}`, () => go({ head }), { class: "box", "aria-pressed": String(head === state.head) },
      svg("rect", { x: queryX(head) - radius, y: y.query - radius, width: 2 * radius, height: 2 * radius }),
      head % every === 0 && svg("text", { x: queryX(head), y: y.query + 5, "text-anchor": "middle", "font-size": Math.min(14, radius + 2) }, head))),
    range(kvHeads).map((kv) => svg("g", { class: "box", "aria-pressed": String(kv === chosen) },
      svg("rect", { x: kvX(kv) - Math.min(group * gap * 0.4, 60), y: y.kv - 22, width: Math.min(group * gap * 0.8, 120), height: 40 }),
      svg("text", { x: kvX(kv), y: y.kv + 3, "text-anchor": "middle", "font-size": 14 }, kvHeads > 16 ? kv : `k${kv}, v${kv}`))));
}

const headsView = {
  title: "Head map",
  heading: "Many queries, few keys",
  lead: "Keys and values are what the cache has to hold and to read again for every token. So several query heads share one head of keys and values.",
  draw: (state, go) => {
    const { heads, kvHeads, headDim, layers } = config, kv = Math.floor(state.head / (heads / kvHeads));
    const perToken = (n) => 2 * layers * n * headDim * 2;
    return el("div", { class: "stack" },
      el("div", { class: "card scroll" }, headMap(state, go)),
      el("div", { class: "card stack" },
        el("div", { class: "formula", tabindex: 0, "aria-label": "formula" }, `key/value head = h // (H / G) = ${state.head} // (${heads} / ${kvHeads}) = ${kv}`),
        facts([
          ["shared by", `query heads ${kv * (heads / kvHeads)} to ${(kv + 1) * (heads / kvHeads) - 1}`],
          ["cache, a token", `2 (k and v) · ${layers} layers · ${kvHeads} heads · ${headDim} numbers · 2 bytes = ${units(perToken(kvHeads), "B")}, instead of ${units(perToken(heads), "B")} with a head for each query head`],
        ]),
        el("div", null, el("button", { type: "button", "data-key": "to attention", onclick: () => go({ view: "attention" }) }, `Show where head ${state.head} looks in layer ${state.layer}`))));
  },
};
