// How the ring and what its queries see are drawn.

function sector(index, n, inner, outer) {
  const angle = (turn) => (2 * Math.PI * turn) / n - Math.PI / 2;
  const [a, b] = [angle(index), angle(index + 1)];
  const at = (radius, turn) => `${(radius * Math.cos(turn)).toFixed(2)} ${(radius * Math.sin(turn)).toFixed(2)}`;
  if (n === 1)
    return `M${at(outer, 0)} A${outer} ${outer} 0 1 1 ${at(outer, Math.PI)} A${outer} ${outer} 0 1 1 ${at(outer, 0)} M${at(inner, 0)} A${inner} ${inner} 0 1 0 ${at(inner, Math.PI)} A${inner} ${inner} 0 1 0 ${at(inner, 0)}`;
  return `M${at(inner, a)} L${at(outer, a)} A${outer} ${outer} 0 0 1 ${at(outer, b)} L${at(inner, b)} A${inner} ${inner} 0 0 0 ${at(inner, a)} z`;
}

function ringDrawing({ position, window, chunk }) {
  const { capacity, slot, begin, slots } = ringAt(position, window, chunk);
  const inner = 108,
    outer = 176,
    middle = (inner + outer) / 2,
    size = clamp(300 / capacity, 7, 17);
  const spot = (index, radius) => {
    const turn = (2 * Math.PI * (index + 0.5)) / capacity - Math.PI / 2;
    return [radius * Math.cos(turn), radius * Math.sin(turn)];
  };
  const text = (index, radius, lift, attributes, content) => {
    const [x, y] = spot(index, radius);
    return svg(
      "text",
      { x, y: y + lift, "text-anchor": "middle", "dominant-baseline": "central", ...attributes },
      content,
    );
  };
  const hasPieces = capacity <= 20;
  return svg(
    "svg",
    {
      viewBox: "-212 -208 424 416",
      role: "img",
      "aria-label": `A ring of ${capacity} slots. Token ${position} lies in slot ${slot}.`,
    },
    slots.map(({ held, was, kind, isNew }, index) =>
      svg(
        "path",
        {
          class: `ring-slot ${kind}${isNew && kind !== "later" ? " written" : ""}`,
          d: sector(index, capacity, inner, outer),
        },
        svg(
          "title",
          null,
          `slot ${index}: ${held < 0 ? "empty" : `the key of ${held}${was < 0 ? "" : `, over that of ${was}`}; ${RING_WORDS[kind]}`}`,
        ),
      ),
    ),
    slots.map(({ held, was }, index) => [
      held >= 0 &&
        text(
          index,
          middle,
          hasPieces ? -6 : 0,
          {
            class: "over",
            "font-size": size,
            "font-weight": held === position ? 700 : 400,
            transform:
              capacity > 32 ? `rotate(${outward(index, capacity)} ${spot(index, middle).join(" ")})` : undefined,
          },
          held,
        ),
      held >= 0 &&
        hasPieces &&
        text(index, middle, 10, { class: "mono over", "font-size": 9.5 }, clipped(pieceAt(held), 7)),
      was >= 0 && capacity <= 32 && text(index, inner - 13, 0, { class: "muted", "font-size": 9 }, `−${was}`),
      (capacity <= 32 || index % 4 === 0) && text(index, outer + 14, 0, { class: "muted", "font-size": 10.5 }, index),
    ]),
    svg("text", { y: -32, "text-anchor": "middle", class: "muted", "font-size": 12 }, "position"),
    svg("text", { y: -2, "text-anchor": "middle", "font-size": 32, "font-weight": 700 }, position),
    svg(
      "text",
      { y: 24, "text-anchor": "middle", class: "mono", "font-size": 13 },
      `${position} % ${capacity} = ${slot}`,
    ),
    svg(
      "text",
      { y: 46, "text-anchor": "middle", class: "muted", "font-size": 12 },
      chunk > 1
        ? `pass of ${begin} to ${begin + chunk - 1}`
        : slots[slot].was >= 0
          ? `over the key of ${slots[slot].was}`
          : "into an empty slot",
    ),
  );
}

// The angle in degrees at which a text in a slot runs along the radius, never upside down.
function outward(index, capacity) {
  const angle = (360 * (index + 0.5)) / capacity - 90;
  return (angle > 90 ? angle - 180 : angle).toFixed(1);
}

const clipped = (text, most) =>
  Array.from(text).length > most
    ? `${Array.from(text)
        .slice(0, most - 1)
        .join("")}…`
    : text;

// A row for each of the last queries, a column for each key that any of them sees, or that still lies in the ring.
function sightDrawing({ position, window, chunk }) {
  const { slots, begin } = ringAt(position, window, chunk),
    shownWindow = Math.min(window, 24),
    cell = position < 1000 ? 22 : 30;
  const queries = range(Math.min(position + 1, 9), Math.max(0, position - 8)),
    firstKey = Math.max(0, queries[0] - shownWindow + 1);
  const keys = range(position - firstKey + 1, firstKey),
    held = new Set(slots.map((slot) => slot.held)),
    left = 74,
    top = 24;
  const [width, height] = [left + cell * keys.length + 4, top + cell * queries.length + 4];
  return svg(
    "svg",
    {
      class: "fixed",
      viewBox: `0 0 ${width} ${height}`,
      width,
      height,
      role: "img",
      "aria-label": `Query ${position} sees the keys ${Math.max(0, position - window + 1)} to ${position}`,
    },
    svg("text", { class: "muted", x: left - 8, y: 14, "text-anchor": "end", "font-size": 10.5 }, "query ╲ key"),
    keys.map((key, column) =>
      svg(
        "text",
        {
          x: left + (column + 0.5) * cell,
          y: 14,
          "text-anchor": "middle",
          "font-size": 9.5,
          class: held.has(key) ? "" : "muted",
          "text-decoration": held.has(key) ? undefined : "line-through",
        },
        key,
      ),
    ),
    queries.map((query, row) => [
      svg(
        "text",
        {
          x: left - 8,
          y: top + (row + 0.68) * cell,
          "text-anchor": "end",
          "font-size": 11,
          "font-weight": query === position ? 700 : 400,
          class: query === position ? "" : "muted",
        },
        query,
      ),
      keys.map((key, column) =>
        svg("rect", {
          x: left + column * cell + 1,
          y: top + row * cell + 1,
          width: cell - 2,
          height: cell - 2,
          rx: 3,
          class: `ring-slot ${attends(query, key, window) ? (query === position ? "now" : "seen") : "empty"}`,
        }),
      ),
      query === begin &&
        chunk > 1 &&
        svg("line", {
          class: "roof",
          x1: left,
          x2: left + keys.length * cell,
          y1: top + row * cell,
          y2: top + row * cell,
        }),
    ]),
  );
}
