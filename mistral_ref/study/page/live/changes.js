// The changes: a list that is switched on and off, and an editor that starts from what is chosen in the view.

// What each kind of change asks for, beside the place of a step.
const CHANGES = {
  zero: ["set to 0", "place"],
  scale: ["multiply by", "place", "number"],
  set: ["set to", "place", "number"],
  add: ["add", "place", "number"],
  mean: ["set to the mean over the tokens", "place"],
  swap: ["exchange with another token", "place", "other"],
  patch: ["take from the pass of another text", "place", "text"],
  freeze: ["keep as it is without changes", "place"],
  window: ["move the window", "window"],
  theta: ["change theta", "theta"],
  bug: ["plant a bug", "bug"],
};
const changesBox = el("section", { class: "card stack", "aria-label": "Changes" });
const shownBox = el("div", { class: "choices shown", role: "group", "aria-label": "Which pass is shown" });

function change(changes, next) {
  const isFirst = !question.changes.some(({ on }) => on !== false) && passes.shown === "before";
  show({ changes }, next ?? (isFirst ? "after" : passes.shown));
}

function drawShown() {
  shownBox.hidden = question.changes.length === 0;
  shownBox.replaceChildren(
    el("span", { class: "muted small" }, "shown"),
    ...SHOWN.map((name) => choice(`shown ${name}`, name === passes.shown, () => showOther(name), name)),
    el("span", { class: "muted small" }, passes.shown === "difference" ? "after − before" : ""),
  );
}

function drawChanges() {
  const { words, problems } = passes.after.changes;
  changesBox.replaceChildren(
    el("h3", null, "Changes"),
    question.changes.length === 0
      ? ""
      : el(
        "ul",
        { class: "changes" },
        question.changes.map((one, index) => {
          const set = (on) => change(question.changes.map((other, at) => (at === index ? { ...other, on } : other)));
          const box = el("input", {
            type: "checkbox",
            checked: one.on !== false,
            "data-key": `on ${index}`,
            onchange: () => set(box.checked),
          });
          return el(
            "li",
            null,
            el("label", null, box, el("bdi", null, words[index] || JSON.stringify(one))),
            el(
              "button",
              {
                type: "button",
                "data-key": `remove ${index}`,
                "aria-label": `Remove: ${words[index]}`,
                onclick: () => change(question.changes.filter((_, at) => at !== index)),
              },
              "✕",
            ),
            problems[index] !== undefined && el("p", { class: "problem small", role: "alert" }, problems[index]),
          );
        }),
      ),
    editor,
    actions,
  );
}

// The editor. A field that the reader has filled stays until the change is added; the others follow the view.
const filled = {};
const field = (name, attributes) =>
  el("input", {
    type: "text",
    class: attributes?.wide ? "wide" : "",
    "aria-label": name,
    "data-key": `edit ${name}`,
    autocomplete: "off",
    spellcheck: "false",
    placeholder: "all",
    oninput: (event) => (filled[name] = event.target.value),
    ...attributes,
  });
const fields = {
  step: field("step", { wide: true, placeholder: "a step, or layers.*.heads" }),
  token: field("token"),
  head: field("head"),
  neuron: field("neuron"),
  number: field("number", { placeholder: "0.5", value: "2" }),
  other: field("other token", { placeholder: "a token" }),
  text: field("other text", { wide: true, placeholder: "a text of as many tokens" }),
  window: field("window", { placeholder: "none" }),
  theta: field("theta", { placeholder: "10000" }),
  bug: el(
    "select",
    { class: "wide", "aria-label": "bug", "data-key": "edit bug", onchange: () => drawEditor() },
    Object.entries(live.bugs).map(([name]) => el("option", { value: name }, name)),
  ),
};
const kindField = el(
  "select",
  { class: "wide", "aria-label": "What to change", "data-key": "edit kind", onchange: () => drawEditor() },
  Object.entries(CHANGES)
    .filter(([kind]) => kind !== "bug" || Object.keys(live.bugs).length)
    .map(([kind, [words]]) => el("option", { value: kind }, words)),
);
const editorFields = el("div", { class: "fields" });
const editor = el(
  "form",
  {
    class: "editor",
    "aria-label": "A new change",
    onsubmit: (event) => {
      event.preventDefault();
      const added = edited();
      for (const name of ["step", "token", "head", "neuron"]) {
        delete filled[name]; // the next one follows the view again
        fields[name].value = "";
      }
      change([...question.changes, added]);
    },
  },
  kindField,
  editorFields,
  el("button", { type: "submit", "data-key": "add change" }, "Add this change"),
);

// What is chosen in the view: a step and a head of it; in the views of heads, what these heads have gathered.
function chosenPlace() {
  const name = ["attention", "heads"].includes(state.view) ? nameOf("heads", state.layer) : state.name;
  const step = stepByName.get(name);
  return { step: name, head: headAxis(step) ? String(axisHead(step, state.head)) : "" };
}

function drawEditor() {
  const [, ...asked] = CHANGES[kindField.value],
    place = chosenPlace();
  if (filled.step === undefined) {
    fields.step.value = place.step;
    if (filled.head === undefined) fields.head.value = place.head;
  }
  const chosen = (name, value) =>
    el(
      "button",
      {
        type: "button",
        class: "tiny",
        "data-key": `this ${name}`,
        "aria-label": `the ${name} that is chosen`,
        onclick: () => {
          fields[name].value = filled[name] = String(value);
        },
      },
      String(value),
    );
  const labelled = (name, node, ...more) => el("label", null, el("span", null, name), node, more);
  const rows = {
    place: () => [
      labelled("step", fields.step),
      el(
        "div",
        { class: "three" },
        labelled("token", fields.token, chosen("token", state.token)),
        labelled("head", fields.head, place.head !== "" && chosen("head", place.head)),
        labelled("neuron", fields.neuron, chosen("neuron", chosenColumn())),
      ),
    ],
    bug: () => [labelled("bug", fields.bug), el("p", { class: "small muted" }, live.bugs[fields.bug.value])],
  };
  const names = { number: "number", other: "other token", text: "other text", window: "window", theta: "theta" };
  editorFields.replaceChildren(
    ...asked.flatMap((name) => rows[name]?.() ?? [labelled(names[name], fields[name])]).filter(Boolean),
  );
}

// The column under the cursor of the heat map that is shown.
const chosenColumn = () => {
  const key = document.querySelector("main figure canvas")?.dataset.key?.slice("heat ".length);
  return cursors.get(key)?.[1] ?? 0;
};

// What the fields say, as plain data. Whether it can be done the server says, beside the change.
function edited() {
  const kind = kindField.value,
    [, ...asked] = CHANGES[kind],
    found = { kind };
  const number = (text) => (text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : text);
  for (const name of asked.includes("place") ? ["token", "head", "neuron"] : [])
    if (fields[name].value.trim() !== "") found[name] = number(fields[name].value);
  if (asked.includes("place")) found.step = fields.step.value.trim();
  if (asked.includes("number")) found.number = number(fields.number.value);
  if (asked.includes("other")) found.other = number(fields.other.value);
  if (asked.includes("text")) found.text = fields.text.value;
  if (asked.includes("bug")) found.bug = fields.bug.value;
  if (asked.includes("window")) found.window = fields.window.value.trim() === "" ? null : number(fields.window.value);
  if (asked.includes("theta")) found.theta = number(fields.theta.value);
  return found;
}
