// What each step costs, beside what the machine can do: the roofline.

// A step lies at its arithmetic intensity and at the rate it was measured at; it cannot lie above the roof.
function roofline({ bandwidth, peak, kinds }) {
  const width = 720,
    height = 380,
    left = 62,
    bottom = 46,
    right = 12,
    rows = kinds.slice(0, -1).filter((row) => row.flops > 0);
  const intensity = (row) => row.flops / row.bytes,
    rate = (row) => row.flops / row.seconds;
  const decades = (numbers) => [
    Math.floor(Math.log10(Math.min(...numbers))),
    Math.ceil(Math.log10(Math.max(...numbers))),
  ];
  const [x0, x1] = decades([...rows.map(intensity), peak / bandwidth]),
    [y0, y1] = decades([...rows.map(rate), peak]);
  const x = (value) => left + ((width - left - right) * (Math.log10(value) - x0)) / (x1 - x0),
    y = (value) => 10 + (height - bottom - 10) * (1 - (Math.log10(value) - y0) / (y1 - y0));
  const roof = [10 ** x0, peak / bandwidth, 10 ** x1].map((at) => [
    x(at),
    y(Math.max(10 ** y0, Math.min(peak, at * bandwidth))),
  ]);
  const taken = rows.map((row) => [x(intensity(row)), y(rate(row))]);
  const badges = rows.map((row, index) => {
    // beside its dot, at the first place where nothing else is
    const [dotX, dotY] = taken[index];
    const places = [15, 27, 39, 51].flatMap((radius) =>
      range(12).map((hour) => [
        dotX + radius * Math.cos((hour * Math.PI) / 6),
        dotY + radius * Math.sin((hour * Math.PI) / 6),
      ]),
    );
    const [atX, atY] =
      places.find(
        ([px, py]) =>
          px > left &&
          px < width - 9 &&
          py < height - bottom &&
          taken.every(([tx, ty]) => Math.hypot(tx - px, ty - py) > 13.5),
      ) ?? places[0];
    taken.push([atX, atY]);
    return svg(
      "g",
      null,
      svg("title", null, `${row.name}: ${duration(row.seconds)}`),
      svg("line", { class: "axis", x1: dotX, y1: dotY, x2: atX, y2: atY }),
      svg("circle", { class: "dot", cx: dotX, cy: dotY, r: 4 }),
      svg("text", { x: atX, y: atY + 4, "text-anchor": "middle", "font-size": 11.5 }, kinds.indexOf(row) + 1),
    );
  });
  return svg(
    "svg",
    {
      viewBox: `0 0 ${width} ${height}`,
      class: "drawing",
      role: "img",
      "aria-label": `Roofline: ${units(bandwidth, "B/s")} and ${units(peak, "FLOP/s")}; the table below has every number`,
    },
    range(x1 - x0 + 1, x0).map((power) => [
      svg("line", { class: "axis", x1: x(10 ** power), x2: x(10 ** power), y1: 10, y2: height - bottom }),
      svg(
        "text",
        { class: "muted", x: x(10 ** power), y: height - bottom + 17, "text-anchor": "middle", "font-size": 11 },
        digits(10 ** power),
      ),
    ]),
    range(y1 - y0 + 1, y0).map((power) => [
      svg("line", { class: "axis", x1: left, x2: width - right, y1: y(10 ** power), y2: y(10 ** power) }),
      svg(
        "text",
        { class: "muted", x: left - 7, y: y(10 ** power) + 4, "text-anchor": "end", "font-size": 11 },
        units(10 ** power, ""),
      ),
    ]),
    svg(
      "text",
      { class: "muted", x: (left + width) / 2, y: height - 8, "text-anchor": "middle", "font-size": 12 },
      "FLOP for each byte moved",
    ),
    svg("text", { class: "muted", x: left + 7, y: 26, "font-size": 12 }, "FLOP/s"),
    svg("path", { class: "roof", d: `M${roof.map((point) => point.join(" ")).join(" L")}` }),
    badges,
  );
}

let costMissing = () => el("p", null, "This page was made without measuring (", el("code", null, "--no-cost"), ").");

const costView = {
  title: "Cost",
  heading: "What it costs, and what the machine allows",
  lead: "A step has to move its bytes and to do its arithmetic. Whichever takes longer at the machine's limits is the roof: under the slope memory decides, under the flat part arithmetic does.",
  draw: () => {
    const { cost } = page;
    if (!cost) return costMissing();
    const total = cost.kinds.at(-1);
    const row = ({ name, flops, bytes, bound, predicted, seconds, range: [least, most] }, index) =>
      el(
        "tr",
        null,
        [
          [name === "total" ? "" : `${index + 1} `, el("code", null, name)],
          units(flops, "FLOP"),
          units(bytes, "B"),
          bound,
          duration(predicted),
          duration(seconds),
          `${duration(least)} to ${duration(most)}`,
          `${digits(Number(((100 * seconds) / total.seconds).toPrecision(2)))} %`,
        ].map((cell) => el("td", null, cell)),
      );
    return el(
      "div",
      { class: "stack" },
      el(
        "div",
        { class: "card scroll" },
        roofline(cost),
        el("p", { class: "muted small" }, "The numbers are those of the table's rows."),
      ),
      el(
        "div",
        { class: "card scroll" },
        el(
          "table",
          { "aria-label": "Cost of each kind of step, all layers together" },
          el(
            "thead",
            null,
            el(
              "tr",
              null,
              ["step", "arithmetic", "moved", "bound by", "at the roof", "measured", "least to most", "share"].map(
                (name) => el("th", { scope: "col" }, name),
              ),
            ),
          ),
          el("tbody", null, cost.kinds.map(row)),
        ),
      ),
      el(
        "p",
        { class: "muted small" },
        `${counted(tokens.length, "token")} in one pass; the median of ${cost.repeats}. The roof is a measurement too, on the same machine just before: ${units(cost.bandwidth, "B/s")} read, ${units(cost.peak, "FLOP/s")} in float32. A small model lies in the processor's caches and may be faster than its memory; its steps are so short that starting them takes much of the time. Where a time is far from its least, something else was at work on the machine.`,
      ),
    );
  },
};
