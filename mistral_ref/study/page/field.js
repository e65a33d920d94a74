// How far back a token can be influenced: each layer reaches a window further.

// The oldest position whose embedding can reach the token at `position` through so many layers.
const reach = (position, layers, window) => (window === null ? 0 : Math.max(0, position - layers * (window - 1)));

const N_COLUMNS = 33;
const fieldState = { window: 4, token: N_COLUMNS - 1, layers: config.layers };

function fieldDrawing({ window, token, layers }) {
  const levels = config.layers,
    left = 66,
    width = 700,
    row = clamp(360 / levels, 13, 58),
    top = 14;
  const gap = (width - left - 16) / (N_COLUMNS - 1),
    radius = Math.min(gap, row) * 0.27;
  const x = (position) => left + 6 + position * gap,
    y = (level) => top + radius + (levels - level) * row; // level: layers passed
  const oldest = (level) => reach(token, levels - level, window),
    isShown = (level) => levels - level <= layers;
  const links = levels * N_COLUMNS * window < 6000;
  return svg(
    "svg",
    {
      viewBox: `0 0 ${width} ${y(0) + radius + 58}`,
      class: "drawing",
      role: "img",
      "aria-label": `Through ${layers} layers token ${token} is influenced by tokens ${reach(token, layers, window)} to ${token}`,
    },
    links &&
      range(levels).map(
        (level) =>
          isShown(level) &&
          range(token - oldest(level + 1) + 1, oldest(level + 1)).map((to) =>
            range(to - reach(to, 1, window) + 1, reach(to, 1, window)).map((from) =>
              svg("line", { class: "link", x1: x(from), y1: y(level), x2: x(to), y2: y(level + 1) }),
            ),
          ),
      ),
    range(levels + 1).map((level) => [
      (row > 15 || level % 4 === 0) &&
        svg(
          "text",
          { class: "muted", x: 0, y: y(level) + 4, "font-size": 11 },
          level === 0 ? "embedding" : `layer ${level - 1}`,
        ),
      range(N_COLUMNS).map((position) =>
        svg("circle", {
          class: `node${level === levels && position === token ? " top" : isShown(level) && position >= oldest(level) && position <= token ? " in" : ""}`,
          cx: x(position),
          cy: y(level),
          r: radius,
        }),
      ),
    ]),
    range(N_COLUMNS).map(
      (position) =>
        position % 2 === 0 &&
        svg(
          "text",
          {
            class: position >= oldest(0) && position <= token ? "" : "muted",
            x: x(position),
            y: y(0) + radius + 16,
            "text-anchor": "middle",
            "font-size": 10,
          },
          position,
        ),
    ),
    range(N_COLUMNS).map((position) =>
      svg(
        "rect",
        {
          x: x(position) - gap / 2,
          y: 0,
          width: gap,
          height: y(0) + radius + 8,
          opacity: 0,
          "data-position": position,
        },
        svg("title", null, `position ${position}`),
      ),
    ),
    svg(
      "text",
      { class: "muted", x: left, y: y(0) + radius + 40, "font-size": 11.5 },
      "position of the token; choose another by clicking its column",
    ),
  );
}

const fieldView = {
  title: "Receptive field",
  heading: "A window that reaches further than itself",
  lead: "A layer lets a token look W − 1 tokens back. What it finds there has itself looked W − 1 tokens back, one layer below: after L layers the reach is L (W − 1).",
  draw: () => {
    const drawing = el("div", { class: "card scroll" }),
      words = el("p", { "aria-live": "polite" });
    function set(patch) {
      Object.assign(fieldState, patch);
      const { window, token, layers } = fieldState,
        first = reach(token, layers, window);
      drawing.replaceChildren(fieldDrawing(fieldState));
      words.replaceChildren(
        `Through ${counted(layers, "layer")} with a window of ${window} the token at position ${token} is influenced by ${counted(token - first + 1, "token")}, from position ${first} on: back by ${layers} · (${window} − 1) = ${layers * (window - 1)} at most.`,
      );
    }
    drawing.addEventListener("click", (event) => {
      const at = event.target.dataset?.position;
      if (at !== undefined) {
        tokenSlider.set(at);
        set({ token: Number(at) });
      }
    });
    const windowSlider = slider("window W", [1, 16], fieldState.window, String, (window) => set({ window }));
    const tokenSlider = slider("token at position", [0, N_COLUMNS - 1], fieldState.token, String, (token) =>
      set({ token }),
    );
    const layerSlider = slider("layers looked through", [0, config.layers], fieldState.layers, String, (layers) =>
      set({ layers }),
    );
    const play = player("Grow", 700, words, () => {
      const layers = fieldState.layers < config.layers ? fieldState.layers + 1 : 0;
      layerSlider.set(layers);
      set({ layers });
      return layers < config.layers;
    });
    set({});
    setTimeout(() => {
      drawing.scrollLeft = (drawing.scrollWidth * fieldState.token) / N_COLUMNS - drawing.clientWidth / 2;
    });
    const windows = config.windows.filter((window) => window !== null);
    return el(
      "div",
      { class: "stack" },
      el("div", { class: "card controls" }, play.button, windowSlider.node, tokenSlider.node, layerSlider.node),
      drawing,
      el(
        "div",
        { class: "card stack" },
        words,
        el(
          "p",
          { class: "muted small" },
          windows.length < config.windows.length
            ? `This model has ${config.windows.length - windows.length} layers without a window: through any of them every earlier token is reached.`
            : `This model: ${counted(config.layers, "layer")}, and a reach of ${grouped(sum(windows.map((window) => window - 1)))} tokens back. How much comes from so far is another question: it has to pass through every layer on the way.`,
        ),
      ),
    );
  },
};
