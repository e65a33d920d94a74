// Grouped-query attention: which query head reads which key/value head.

function headMap(state, go) {
  const { heads, kvHeads } = config,
    width = Math.max(720, 26 * heads),
    gap = width / heads,
    radius = Math.min(gap * 0.38, 22);
  const y = { query: 46, kv: 190 },
    queryX = (head) => (head + 0.5) * gap,
    kvX = (kv) => (kv + 0.5) * group * gap;
  const chosen = readBy(state.head),
    isWide = width > 920;
  return svg(
    "svg",
    {
      viewBox: `0 0 ${width} 240`,
      class: isWide ? "fixed" : "drawing",
      width: isWide ? width : undefined,
      role: "group",
      "aria-label": `${heads} query heads read ${kvHeads} key/value heads`,
    },
    svg("text", { class: "muted", x: 0, y: 12, "font-size": 12 }, `${counted(heads, "query head")}: q, rows of wq`),
    svg(
      "text",
      { class: "muted", x: 0, y: 236, "font-size": 12 },
      `${counted(kvHeads, "key/value head")}: k and v, kept in the cache`,
    ),
    range(heads).map((head) =>
      svg("path", {
        class: `pair-link${head === state.head ? " now" : ""}`,
        d: `M${queryX(head)} ${y.query + radius} C ${queryX(head)} 130, ${kvX(readBy(head))} 110, ${kvX(readBy(head))} ${y.kv - 24}`,
      }),
    ),
    range(heads).map((head) =>
      svgButton(
        `map ${head}`,
        `query head ${head} reads key/value head ${readBy(head)}`,
        () => go({ head }),
        { class: "box", "aria-pressed": String(head === state.head) },
        svg("rect", { x: queryX(head) - radius, y: y.query - radius, width: 2 * radius, height: 2 * radius }),
        svg(
          "text",
          { x: queryX(head), y: y.query + 5, "text-anchor": "middle", "font-size": Math.min(14, radius + 1) },
          head,
        ),
      ),
    ),
    range(kvHeads).map((kv) =>
      svg(
        "g",
        { class: kv === chosen ? "label now" : "label" },
        svg("rect", {
          x: kvX(kv) - Math.min(group * gap * 0.4, 60),
          y: y.kv - 22,
          width: Math.min(group * gap * 0.8, 120),
          height: 40,
        }),
        svg(
          "text",
          { x: kvX(kv), y: y.kv + 3, "text-anchor": "middle", "font-size": group * gap < 60 ? 10 : 14 },
          group * gap < 60 ? kv : `k${kv}, v${kv}`,
        ),
      ),
    ),
  );
}

const headsView = {
  title: "Head map",
  heading: "Many queries, few keys",
  lead: "Keys and values are what the cache has to hold and to read again for every token. So several query heads may share one head of keys and values.",
  draw: (state, go) => {
    const { heads, kvHeads, headDim, layers } = config,
      kv = readBy(state.head);
    const perToken = (n) => 2 * layers * n * headDim,
      inBytes = (n) => units(2 * perToken(n), "B"),
      isShared = heads > kvHeads;
    return el(
      "div",
      { class: "stack" },
      el("div", { class: "card scroll" }, headMap(state, go)),
      el(
        "div",
        { class: "card stack" },
        el(
          "div",
          { class: "formula", tabindex: 0, "aria-label": "formula" },
          `key/value head = h // (H / G) = ${state.head} // (${heads} / ${kvHeads}) = ${kv}`,
        ),
        facts([
          [
            "read by",
            isShared
              ? `query heads ${kv * group} to ${(kv + 1) * group - 1}`
              : `query head ${kv} alone: this model does not share`,
          ],
          [
            "cache, a token",
            `2 (k and v) · ${counted(layers, "layer")} · ${counted(kvHeads, "head")} · ${headDim} = ${grouped(perToken(kvHeads))} numbers, ${inBytes(kvHeads)} in 16 bits${isShared ? `, instead of ${inBytes(heads)} with a head for each query head` : ""}`,
          ],
        ]),
        el(
          "div",
          null,
          el(
            "button",
            { type: "button", "data-key": "to attention", onclick: () => go({ view: "attention" }) },
            `Show where head ${state.head} looks in layer ${state.layer}`,
          ),
        ),
      ),
    );
  },
};
