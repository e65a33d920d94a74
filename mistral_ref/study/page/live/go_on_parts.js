// What stands beside the next token: the tree of what has been chosen, the ring, and a draft.

// A node is a token that has followed the one before; `next` are those that have followed it.
const chosen = { text: null, root: null };
const trees = new Map(); // those of other texts

// Puts the path that is shown into the tree of its text.
function remember() {
  if (chosen.text !== question.text) {
    if (chosen.root?.next.length) trees.set(chosen.text, chosen.root);
    Object.assign(chosen, { text: question.text, root: trees.get(question.text) ?? { id: null, next: [] } });
  }
  const shown = tokens.slice(tokens.length - question.more.length);
  let node = chosen.root;
  question.more.forEach((id, index) => {
    if (node === undefined || shown[index]?.id !== id) return (node = undefined); // it is being computed
    let next = node.next.find((one) => one.id === id);
    if (!next) node.next.push((next = { id, piece: shown[index].piece, next: [] }));
    node = next;
  });
}

const samePath = (one, other) => one.length === other.length && one.every((id, index) => id === other[index]);

function nodeButton(node, path) {
  const isHere = samePath(path, question.more),
    isPassed = samePath(path, question.more.slice(0, path.length));
  return el(
    "button",
    {
      type: "button",
      class: isPassed ? "passed" : "",
      "aria-current": isHere ? "true" : undefined,
      "aria-label": node.id === null ? "back to the text" : undefined,
      tabindex: isHere ? 0 : -1,
      "data-key": isHere ? "chosen" : undefined,
      onclick: () => goOn(path),
    },
    node.id === null ? "…" : pieceText(node.piece),
  );
}

// A chain of tokens without a branch is a line; its branches stand below it.
function branchNodes(node, path) {
  const line = [nodeButton(node, path)];
  while (node.next.length === 1) {
    node = node.next[0];
    path = [...path, node.id];
    line.push(nodeButton(node, path));
  }
  const branches = node.next.map((one) => el("li", null, branchNodes(one, [...path, one.id])));
  return [el("div", { class: "line" }, line), branches.length > 0 && el("ul", null, branches)];
}

function chosenTree() {
  const nodeAt = (path) => path.reduce((node, id) => node?.next.find((one) => one.id === id), chosen.root);
  const beside = (by) => {
    const before = question.more.slice(0, -1),
      next = nodeAt(before)?.next ?? [];
    const at = next.findIndex(({ id }) => id === question.more.at(-1)) + by;
    return next[at] && [...before, next[at].id];
  };
  const moves = {
    ArrowLeft: () => question.more.length > 0 && question.more.slice(0, -1),
    ArrowRight: () => nodeAt(question.more)?.next[0] && [...question.more, nodeAt(question.more).next[0].id],
    ArrowUp: () => question.more.length > 0 && beside(-1),
    ArrowDown: () => question.more.length > 0 && beside(1),
  };
  return el(
    "div",
    {
      class: "chosen-tree scroll",
      role: "group",
      "aria-label": "What has been chosen. Left and right: a token back and on; up and down: another branch",
      onkeydown: (event) => {
        if (!moves[event.key]) return;
        event.preventDefault();
        event.stopPropagation();
        const path = moves[event.key]();
        if (path) goOn(path);
      },
    },
    branchNodes(chosen.root, []),
  );
}

// Where the keys of the newest token go.
const FEW_SLOTS = 8;
function ringCard() {
  const own = config.windows[state.layer],
    window = own !== null && own <= MOST_SLOTS ? own : ringState.window,
    newest = { position: start + tokens.length - 1, window, chunk: 1 };
  return el(
    "section",
    { class: "card stack", "aria-label": "The newest token in the ring" },
    el("h3", null, `Where its keys go: layer ${state.layer}, ${own === window ? `a window of ${own}` : `as with a window of ${window}`}`),
    ringDrawing(newest),
    ringWords(newest),
    own !== FEW_SLOTS &&
      el(
        "div",
        null,
        el(
          "button",
          {
            type: "button",
            class: "tiny",
            "data-key": "few slots",
            onclick: () => add({ kind: "window", window: FEW_SLOTS }),
          },
          `Give the model a window of ${FEW_SLOTS}`,
        ),
      ),
  );
}

// A draft: what followed the newest tokens earlier in the text is guessed, and one pass says how much of it is right.
let askedDraft = ""; // the question whose draft has been asked for
const draftBox = el("section", { class: "card stack", "aria-label": "A draft" });
async function draftParts() {
  const key = JSON.stringify(question);
  if (seconds > QUICK && askedDraft !== key) {
    const start = () => {
      askedDraft = key;
      fill(draftBox, draftParts());
    };
    return [
      el("h3", null, "A draft, by lookup"),
      el("button", { type: "button", "data-key": "draft", onclick: start }, "Compute it"),
    ];
  }
  const { drafted, drawn } = await partOf("draft", { ...drawing }, drawnSide(), askAlone);
  const n = drawn.length - 1;
  const row = (name, pieces, className) =>
    el(
      "tr",
      null,
      el("th", { scope: "row" }, name),
      pieces.map(({ piece }, index) => el("td", { class: className(index) }, pieceText(piece))),
    );
  return [
    el("h3", null, "A draft, by lookup"),
    el("p", { class: "small muted" }, "What followed the newest tokens where they stand earlier in the text is guessed. One pass says what comes after each guess: as long as it is the next guess, it is accepted."),
    drafted.length === 0
      ? el("p", null, "The last two tokens stand nowhere earlier in the text, so nothing is drafted.")
      : [
          el(
            "div",
            { class: "scroll" },
            el(
              "table",
              { class: "draft" },
              el(
                "tbody",
                null,
                row("drafted", drafted, (index) => (index < n ? "accepted" : index === n ? "refused" : "unread")),
                row("drawn", drawn, (index) => (index < n ? "accepted" : "")),
              ),
            ),
          ),
          el("p", null, `${n} of ${counted(drafted.length, "token")} accepted: this pass gives ${counted(drawn.length, "token")}.`),
          el(
            "div",
            null,
            el(
              "button",
              { type: "button", "data-key": "take draft", onclick: () => take(...drawn.map(({ id }) => id)) },
              `Take ${drawn.length === 1 ? "it" : `these ${drawn.length}`}`,
            ),
          ),
        ],
  ].flat();
}
