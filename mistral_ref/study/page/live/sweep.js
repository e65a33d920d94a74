// Sweeps: every head, token or part is changed by itself, and the map shows what that does to two logits.

const SWEPT = {
  head: ["every head", "what each head has gathered is changed"],
  token: ["every token", "the residual stream of each token is changed, after each layer"],
  step: ["every part", "what attention or the feed-forward adds is changed, in each layer"],
};
const SWEEP_HOW = {
  zero: "set to 0",
  mean: "set to the mean over tokens",
  patch: "take from the pass of another text",
};
const sweeping = {
  asked: { by: "head", how: "zero", other: "", first: "", second: "" },
  found: null, // what the server has found, with `asked` and the tokens that it is about
  running: null, // the token of the sweep that is running
  picked: null, // [row, column]
  problem: "",
};
const sweepReader = `${reader} sweep`; // a reader of its own: other questions do not end it, and it waits for them

const sweepBar = el("progress", { "aria-label": "The sweep" }),
  sweepStatus = el("p", { class: "small muted", role: "status" });

async function sweep() {
  const { asked } = sweeping,
    mine = {},
    at = state.token,
    about = { ...question, pieces: tokens.map(({ piece }) => piece), at };
  Object.assign(sweeping, { running: mine, problem: "", found: null, picked: null });
  draw();
  const poll = setInterval(async () => {
    const place = await ask("place", { reader: sweepReader }).catch(() => null);
    if (sweeping.running !== mine || !place) return;
    [sweepBar.value, sweepBar.max] = place;
    sweepStatus.textContent = `${place[0]} of ${place[1]}`;
  }, 250);
  try {
    const of = { ...asked, at },
      parts = [{ name: "sweep", of, shown: "before" }];
    const [answer] = await ask("parts", { reader: sweepReader, canWait: true, parts });
    if (sweeping.running === mine) sweeping.found = { ...valueOf(answer), asked: of, about };
  } catch (error) {
    if (sweeping.running === mine && !(error instanceof Stale)) sweeping.problem = error.message;
  }
  clearInterval(poll);
  if (sweeping.running !== mine) return;
  sweeping.running = null;
  if (state.view === "sweep") draw();
}

// Another question of the same reader ends the sweep.
function cancelSweep() {
  sweeping.running = null;
  ask("parts", { reader: sweepReader, text: "", changes: [], more: [], parts: [] }).catch(() => {});
  draw();
}

// The form. Two tokens are proposed: the likeliest ones after the chosen token.
const sweepField = (name, attributes) =>
  el("input", {
    type: "text",
    "aria-label": `${name} token`,
    "data-key": `sweep ${name}`,
    autocomplete: "off",
    spellcheck: "false",
    list: "sweep-tokens",
    oninput: (event) => (sweeping.asked[name] = event.target.value),
    ...attributes,
  });
const sweepFields = {
  first: sweepField("first"),
  second: sweepField("second"),
  other: sweepField("other", { "aria-label": "other text", list: false, placeholder: "a text of as many tokens" }),
};
const proposed = el("datalist", { id: "sweep-tokens" });
const sweepSelect = (name, choices) => {
  const box = el(
    "select",
    {
      "aria-label": name,
      "data-key": `sweep ${name}`,
      onchange: () => {
        sweeping.asked[name] = box.value;
        draw();
      },
    },
    Object.entries(choices).map(([value, words]) => el("option", { value }, words)),
  );
  return box;
};
const sweepBy = sweepSelect("by", Object.fromEntries(Object.entries(SWEPT).map(([by, [words]]) => [by, words]))),
  sweepHow = sweepSelect("how", SWEEP_HOW);

async function propose(token) {
  const likely = (await part("next", token)).map(({ piece }) => piece);
  proposed.replaceChildren(...likely.map((piece) => el("option", { value: piece })));
  ["first", "second"].forEach((name, index) => {
    sweepFields[name].placeholder = likely[index] ?? "";
    sweeping.asked[name] = sweepFields[name].value || (likely[index] ?? "");
  });
  return [];
}

function sweepForm() {
  const { running, asked, problem } = sweeping;
  const labelled = (words, node) => el("label", null, el("span", null, words), node);
  return el(
    "form",
    {
      class: "card stack editor sweep-form",
      "aria-label": "A sweep",
      onsubmit: (event) => {
        event.preventDefault();
        if (!sweeping.running) sweep();
      },
    },
    el(
      "div",
      { class: "fields" },
      labelled("change, one after the other,", sweepBy),
      labelled("how", sweepHow),
      asked.how === "patch" && labelled("the other text", sweepFields.other),
      labelled("measure by how much the logit of", sweepFields.first),
      labelled("is above that of", sweepFields.second),
    ),
    el(
      "p",
      { class: "small muted" },
      `So ${SWEPT[asked.by][1]}, by itself, and the logits after `,
      placeNodes(start + state.token),
      " are looked at. Choose another token above to look there.",
      isChanged() && " The sweep is made without your changes.",
    ),
    problem && el("p", { class: "problem", role: "alert" }, problem),
    running
      ? el(
          "div",
          { class: "doing" },
          sweepBar,
          sweepStatus,
          el("button", { type: "button", "data-key": "sweep run", onclick: cancelSweep }, "Cancel"),
        )
      : el("div", null, el("button", { type: "submit", "data-key": "sweep run" }, "Run the sweep")),
    proposed,
  );
}

const sweepView = {
  title: "Sweep",
  heading: "Which part carries it?",
  lead: "Change every head, every token or every part by itself, and see which of them moves one token above another. A cell of the map leads to its step, and can become one of your changes.",
  draw: (state, go) => {
    if (sweeping.running && sweeping.found === null) sweepBar.removeAttribute("value");
    fill(el("div"), propose(state.token));
    return el("div", { class: "stack" }, sweepForm(), sweeping.found && sweepNodes(sweeping.found, go));
  },
};

VIEWS.sweep = sweepView;
ACTIONS["0"] = () => go({ view: "sweep" });
KEYS[0] = ["1 … 9, 0", "the views"];
