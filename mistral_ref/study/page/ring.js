// The ring of the cache, token by token: slot = position % capacity, capacity = window + chunk - 1.

// What each slot holds when the query at `position` looks, in passes of `chunk` tokens: the key of which position
// (-1: none yet), the one that this pass has overwritten there (-1: none), and what that key is to the query.
function ringAt(position, window, chunk) {
  const capacity = window + chunk - 1,
    begin = Math.floor(position / chunk) * chunk,
    last = begin + chunk - 1;
  const slots = range(capacity).map((slot) => {
    const held = slot <= last ? last - ((last - slot) % capacity) : -1;
    const was = held >= begin && held >= capacity ? held - capacity : -1;
    const kind = held < 0 ? "empty" : held > position ? "later" : attends(position, held, window) ? "seen" : "old";
    return { held, was, kind, isNew: held >= begin };
  });
  return { capacity, slot: position % capacity, begin, slots };
}

const RING_WORDS = {
  seen: "seen by this query",
  old: "too old, not seen",
  later: "written, not seen yet",
  empty: "empty",
};
const MOST_SLOTS = 64,
  MOST_POSITION = 9999;
const ringState = {
  window: Math.min(config.windows.find((window) => window !== null) ?? 8, 8),
  chunk: 1,
  position: 11,
  token: null,
};

function ringWords({ position, window, chunk }) {
  const { capacity, slot, slots, begin } = ringAt(position, window, chunk),
    oldest = Math.max(0, position - window + 1);
  const overwritten = slots
    .map(({ was }) => was)
    .filter((was) => was >= 0)
    .sort((a, b) => a - b);
  return [
    el(
      "p",
      null,
      "The key of ",
      placeNodes(position),
      " lies in slot ",
      el("b", null, `${position} % ${capacity} = ${slot}`),
      ". ",
      overwritten.length
        ? `${chunk > 1 ? `The pass of ${begin} to ${begin + chunk - 1}` : "It"} has overwritten ${overwritten.length > 1 ? `the keys of ${overwritten[0]} to ${overwritten.at(-1)}` : `the key of ${overwritten[0]}`}. `
        : "Nothing has been overwritten for it. ",
      `It sees ${oldest === position ? "itself alone" : `the keys of ${oldest} to ${position}`}, and all of them are in the ring.`,
    ),
    el(
      "p",
      { class: "muted small" },
      chunk > 1
        ? "A pass writes all its keys before its first query looks. That query still needs the oldest key of its window: hence chunk − 1 more slots."
        : slots[slot].was >= 0
          ? "A token writes its key first and looks then: the slot it takes held the key that has just gone out of its window."
          : "A token writes its key first and looks then.",
    ),
  ];
}

const ringView = {
  title: "Ring",
  heading: "The ring of the cache",
  lead: "Who sees a window of W keys needs W places for them, whatever the length of the text, and chunk − 1 more to read several tokens at once: the key of position p goes into slot p % capacity. Play it, and watch what is overwritten.",
  draw: (state) => {
    const ring = el("div", { class: "card" }),
      words = el("div", { class: "stack", "aria-live": "polite" }),
      sight = el("div", { class: "scroll" }),
      note = el("p", { class: "muted small" });
    const own = config.windows[state.layer],
      jump = el("input", {
        type: "number",
        min: 0,
        max: MOST_POSITION,
        "aria-label": "position",
        "data-key": "position",
        oninput: () => set({ position: clamp(Math.trunc(Number(jump.value)) || 0, 0, MOST_POSITION) }),
        onchange: () => {
          jump.value = ringState.position;
        },
      });
    if (ringState.token !== null && ringState.token !== state.token) ringState.position = start + state.token; // chosen above
    ringState.token = state.token;
    function set(patch) {
      Object.assign(ringState, patch);
      ring.replaceChildren(ringDrawing(ringState));
      words.replaceChildren(...ringWords(ringState));
      sight.replaceChildren(sightDrawing(ringState));
      sight.scrollLeft = sight.scrollWidth; // where the query stands
      note.textContent =
        ringState.window > 24
          ? `The oldest keys of this window, from ${Math.max(0, ringState.position - ringState.window + 1)} on, have no room here.`
          : "";
      if (document.activeElement !== jump) jump.value = ringState.position;
    }
    const windowSlider = slider("window W", [1, MOST_SLOTS], ringState.window, String, (window) => set({ window }));
    const chunkSlider = slider("chunk", [1, 16], ringState.chunk, String, (chunk) => set({ chunk }));
    const play = player("Play", 650, words, () => {
      set({ position: Math.min(ringState.position + 1, MOST_POSITION) });
      return ringState.position < MOST_POSITION;
    });
    const move = (by) => {
      play.stop();
      set({ position: clamp(ringState.position + by, 0, MOST_POSITION) });
    };
    const own64 = own !== null && own <= MOST_SLOTS && own !== ringState.window;
    set({});
    return el(
      "div",
      { class: "split" },
      ring,
      el(
        "div",
        { class: "stack" },
        el(
          "div",
          { class: "card stack player" },
          el(
            "div",
            { class: "choices" },
            el("button", { type: "button", onclick: () => move(-1), "aria-label": "one token back" }, "◀"),
            play.button,
            el("button", { type: "button", onclick: () => move(1), "aria-label": "one token on" }, "▶|"),
            el("label", { class: "small muted" }, "position ", jump),
            own64 &&
              el(
                "button",
                {
                  type: "button",
                  onclick: () => {
                    windowSlider.set(own);
                    set({ window: own });
                  },
                },
                `this model's window, ${own}`,
              ),
          ),
          el("div", { class: "controls" }, windowSlider.node, chunkSlider.node),
        ),
        el(
          "div",
          { class: "card stack" },
          words,
          el(
            "div",
            { class: "legend" },
            Object.entries({ ...RING_WORDS, written: "written by this pass; −n: over the key of n" }).map(
              ([kind, what]) =>
                el(
                  "span",
                  null,
                  svg(
                    "svg",
                    { viewBox: "0 0 14 14", class: "swatch", "aria-hidden": "true" },
                    svg("rect", { class: `ring-slot ${kind}`, width: 14, height: 14 }),
                  ),
                  what,
                ),
            ),
          ),
        ),
        el(
          "div",
          { class: "card stack" },
          el("h3", null, "Who sees whom; keys that are gone are struck out"),
          sight,
          note,
        ),
        el(
          "p",
          { class: "muted small" },
          own === null
            ? `Layer ${state.layer} of this model has no window: its cache keeps every key, and grows.`
            : `This model's layer ${state.layer} has a window of ${grouped(own)}: a cache for passes of up to c tokens has ${grouped(own)} + c − 1 slots there.`,
        ),
      ),
    );
  },
};
