// What comes next: the likeliest tokens after the one that is chosen.

const nextBox = el("section", { class: "card stack", "aria-label": "What comes next" });

async function nextParts(token) {
  const found = await partOf("next", token, "before");
  return [
    el("h3", null, "What comes after ", placeNodes(start + token)),
    el(
      "div",
      { class: "strong" },
      found.map(({ piece, p }) => {
        const share = el("i");
        share.style.width = `${100 * (p ?? 0)}%`;
        return [pieceText(piece), share, el("b", null, p === null ? "NaN" : percent(p))];
      }),
    ),
  ];
}
const percent = (p) => `${digits(Number((100 * p).toPrecision(3)))} %`;
