// What stands beside a heat map: its legend, histograms, bars.

// What the colours of a heat map stand for.
function legend(values, ...more) {
  const { low, high, n_nan: nNan, n_infinite: nInfinite } = values.statistics,
    scale = scaleOf(values),
    isBroken = nNan + nInfinite > 0;
  const least = low < 0 ? -1 : 0,
    most = high > 0 ? 1 : 0,
    columns = 120;
  const data = Float32Array.from({ length: columns }, (_, index) => {
    const at = least + ((most - least) * index) / (columns - 1);
    return at * Math.abs(at) || 1e-9; // even steps of the square root
  });
  const [from, to] = [least ? `−${digits(scale)}` : "0", most ? digits(scale) : "0"];
  const colours = pixels({ rows: 1, columns, data }, 1, () => true);
  made(colours, { role: "img", "aria-label": `The colours of values from ${from} to ${to}` }, []);
  return el(
    "div",
    { class: "legend" },
    from,
    colours,
    to,
    el("span", null, "square-root scale"),
    isBroken && el("span", null, swatch(`rgb(${shade(NaN).join(" ")})`), "NaN or infinite"),
    more,
  );
}

const swatch = (fill) =>
  svg(
    "svg",
    { viewBox: "0 0 12 12", class: "swatch", "aria-hidden": "true" },
    svg("rect", { width: 12, height: 12, fill }),
  );
const lineSwatch = (stroke, dash) =>
  svg(
    "svg",
    { viewBox: "0 0 24 12", class: "line swatch", "aria-hidden": "true" },
    svg("line", { x2: 24, y1: 6, y2: 6, stroke, "stroke-width": 2.5, "stroke-dasharray": dash }),
  );

// How many values lie where, between the smallest and the largest.
function histogram({ histogram: counts, statistics: { low, high } }) {
  if (counts.length === 0) return el("p", { class: "muted small" }, "no finite values");
  const width = 240,
    height = 64,
    bar = width / counts.length,
    most = Math.max(...counts);
  const zero = low < 0 && high > 0 ? (width * -low) / (high - low) : null;
  return svg(
    "svg",
    {
      viewBox: `0 0 ${width} ${height + 22}`,
      role: "img",
      class: "bars",
      "aria-label": `Histogram: ${grouped(sum(counts))} values from ${digits(low)} to ${digits(high)}, the fullest of ${counts.length} bins holds ${grouped(most)}`,
    },
    counts.map((count, index) => {
      const tall = count && Math.max(1.5, (height - 4) * Math.sqrt(count / most));
      return svg(
        "rect",
        { x: index * bar + 0.3, y: height - tall, width: bar - 0.6, height: tall },
        svg(
          "title",
          null,
          `${grouped(count)} values from ${digits(low + ((high - low) * index) / counts.length)} to ${digits(low + ((high - low) * (index + 1)) / counts.length)}`,
        ),
      );
    }),
    svg("line", { class: "axis", x1: 0, x2: width, y1: height, y2: height }),
    zero !== null && svg("line", { class: "axis", x1: zero, x2: zero, y1: 0, y2: height + 4 }),
    zero !== null &&
      zero > 60 &&
      zero < width - 60 &&
      svg("text", { class: "muted", x: zero, y: height + 17, "text-anchor": "middle", "font-size": 12 }, "0"),
    svg("text", { class: "muted", x: 0, y: height + 17, "font-size": 12 }, digits(low)),
    svg("text", { class: "muted", x: width, y: height + 17, "text-anchor": "end", "font-size": 12 }, digits(high)),
  );
}

// The numbers of one row, upwards and downwards from 0.
function rowBars(values, scale, label) {
  const width = 640,
    height = 96,
    middle = height / 2,
    bar = width / values.length;
  return svg(
    "svg",
    {
      viewBox: `0 0 ${width} ${height}`,
      preserveAspectRatio: "none",
      height,
      width: "100%",
      role: "img",
      "aria-label": label,
      class: "bars",
    },
    svg("line", { class: "axis", x1: 0, x2: width, y1: middle, y2: middle }),
    Array.from(values, (value, index) => {
      if (!Number.isFinite(value) || value === 0) return null;
      const tall = middle * Math.sqrt(Math.abs(value) / scale);
      return svg("rect", {
        class: value < 0 ? "minus" : "plus",
        x: index * bar,
        y: value < 0 ? middle : middle - tall,
        width: Math.max(bar * 0.85, 0.4),
        height: tall,
      });
    }),
  );
}

// The largest numbers of a row, whatever their sign, each a way to its cell in the picture.
const N_LARGEST = 4;
function largestNumbers(values, axis, ongo) {
  const order = range(values.length)
    .filter((index) => values[index])
    .sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]))
    .slice(0, N_LARGEST);
  return (
    order.length > 0 &&
    el(
      "div",
      { class: "choices small", role: "group", "aria-label": "The largest of them" },
      el("span", { class: "muted" }, "largest"),
      order.map((index) =>
        el(
          "button",
          { type: "button", class: "tiny", "data-key": `largest ${index}`, onclick: () => ongo(index) },
          `${axis} ${index}: `,
          el("b", null, digits(values[index])),
        ),
      ),
    )
  );
}

// The root mean square of one kind of step in every layer, each a way there.
function overLayers(found, layer, ongo) {
  const sizes = found.map((size) => size ?? NaN), // some layers may lack an adapter
    most = Math.max(...sizes.filter(Number.isFinite)) || 1;
  const width = 240,
    height = 62,
    bar = width / sizes.length,
    space = Math.min(6, bar * 0.2);
  return svg(
    "svg",
    {
      viewBox: `0 0 ${width} ${height + 20}`,
      class: "bars",
      role: "group",
      "aria-label": "Root mean square in each layer",
    },
    sizes.map((size, index) => {
      const tall = Math.max(2, ((height - 18) * (size || 0)) / most);
      return svg(
        "g",
        { onclick: () => ongo(index), cursor: "pointer" },
        svg("title", null, `layer ${index}: rms ${digits(size)}`),
        svg("rect", { x: index * bar, y: 0, width: bar, height: height + 20, opacity: 0 }),
        svg("rect", {
          class: index === layer ? "now" : "",
          x: index * bar + space,
          y: height - tall,
          width: bar - 2 * space,
          height: tall,
        }),
        bar > 28 &&
          svg(
            "text",
            { class: "muted", x: (index + 0.5) * bar, y: height - tall - 5, "text-anchor": "middle", "font-size": 11 },
            digits(Number(size.toPrecision(3))),
          ), // NaN stays NaN
        bar > 12 &&
          svg(
            "text",
            { class: "muted", x: (index + 0.5) * bar, y: height + 15, "text-anchor": "middle", "font-size": 11 },
            String(index),
          ),
      );
    }),
  );
}
