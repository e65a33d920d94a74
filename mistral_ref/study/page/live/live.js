// The live page: what stands around the views, and what it says of its server.

const gone = el(
  "p",
  { class: "problem", role: "alert", hidden: true },
  "The server has ended, or does not answer. What is here stays; to go on, start ",
  el("code", null, "mistral-ref explore"),
  " again.",
);
function showServer(isThere) {
  gone.hidden = isThere;
}

const aside = el("aside", null, nextBox);
document.querySelector("main").append(aside);
document.querySelector("main").classList.add("live");
document.querySelector(".bar").prepend(gone);
document.head.append(el("link", { rel: "icon", href: "data:," })); // or the browser asks for one

hooks.drawn = () => {
  fill(nextBox, nextParts(state.token));
  drawMerges();
};
hooks.keep = () => (question.text.length < 8000 ? `/${encodeURIComponent(JSON.stringify(question))}` : "");
hooks.restore = (kept) => {
  try {
    const { text } = JSON.parse(decodeURIComponent(kept));
    if (typeof text !== "string" || text === question.text) return;
    textBox.value = text;
    show({ text });
  } catch {
    // an address that leads nowhere is left aside
  }
};

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
