// The live page: what stands around the views, and what it says of its server.

const gone = el(
  "p",
  { class: "problem", role: "alert", hidden: true },
  "The server has ended, or does not answer. What is here stays. To go on, start ",
  el("code", null, "mistral-ref explore"),
  " again, and open there what you save here: ",
  el("button", { type: "button", class: "tiny", "data-key": "save here", onclick: save }, "Save"),
);
function showServer(isThere) {
  gone.hidden = isThere;
}

const aside = el("aside", null, exerciseBox, nextBox, goesOnBox, changesBox);
document.querySelector("main").append(aside);
document.body.classList.add("live");
document.querySelector(".bar").prepend(gone);
const viewsRow = el("div", { class: "views-row" });
tabs.before(viewsRow);
viewsRow.append(tabs, shownBox);
// A panel that is higher than the window stops at its lower edge, where the editor is.
new ResizeObserver(() => aside.style.setProperty("--height", `${aside.offsetHeight}px`)).observe(aside);
document.querySelector("footer").append(
  " The page is live, from a server on this machine. Another tab is another reader of the same model, with a text and changes of its own.",
);
document.head.append(el("link", { rel: "icon", href: "data:," })); // or the browser asks for one

const departsLegend = el("p", { class: "small muted" }, "Filled: differs by more than rounding explains.");
hooks.changesAt = changesAt;
hooks.drawn = () => {
  document.title = `${question.text.trim().slice(0, 40) || "no text"} · ${page.title}`;
  document.body.dataset.shown = passes.shown;
  drawShown();
  drawEditor();
  drawChanges();
  fill(nextBox, nextParts(state.token));
  fill(goesOnBox, goesOnParts());
  drawMerges();
  drawExercise();
  if (state.view !== "block") return;
  markChanges();
  if (passes.shown === "difference") markDepartures();
};

// Marks the steps in the diagram that the reader has changed.
function markChanges() {
  for (const box of document.querySelectorAll(".box")) {
    if (changesAt(box.dataset.key.slice("box ".length)).length === 0) continue;
    box.classList.add("edited");
    box.setAttribute("aria-description", "you have changed it");
  }
}

// Marks the steps in the diagram, and their layers, that the changes have moved by more than rounding.
async function markDepartures() {
  const names = await partOf("departs", null, "difference").catch(() => []);
  for (const name of names) {
    const layer = name.split(".")[1];
    for (const key of [`box ${name}`, `stack ${layer ?? name}`])
      for (const node of document.querySelectorAll(`[data-key="${CSS.escape(key)}"]`)) {
        node.classList.add("departs");
        node.setAttribute("aria-description", "differs by more than rounding");
      }
  }
  document.querySelector("main .split .card")?.append(departsLegend);
}
SHOWN.forEach((name) => {
  ACTIONS[name[0]] = () => !shownBox.hidden && showOther(name);
});
ACTIONS.c = () => kindField.focus();
KEYS.push(["b a d", "before, after, difference"], ["c", "change something"]);

// A reload keeps the colours that the reader has chosen.
themeButton.addEventListener("click", () => sessionStorage.setItem("theme", theme()));
if (sessionStorage.getItem("theme")) setTheme(sessionStorage.getItem("theme"));

// A view that only the live page has: {title, heading, lead, draw}, as those of the file. A number is its key.
function addView(name, view) {
  VIEWS[name] = view;
  ACTIONS[Object.keys(VIEWS).length] = () => go({ view: name });
}

costMissing = () =>
  el(
    "button",
    {
      type: "button",
      "data-key": "measure",
      onclick: async () => {
        showBusy(true);
        try {
          page.cost = await partOf("cost", null, "before");
          draw();
        } catch (error) {
          showProblem(error.message);
        }
        showBusy(false);
      },
    },
    "Measure: the machine's limits, and this pass",
  );

// Now and then whether the server is still there.
setInterval(() => document.hidden || ask("place").catch(() => {}), 3000);
