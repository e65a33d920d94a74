// The course's exercises with the demonstration model, checked by the page: each asks for changes, and looks at what they do.

const TOM = "Tom went to the park. Then";
const madeChanges = () =>
  question.changes.filter(({ on }, index) => on !== false && passes.after.changes.problems[index] === undefined);
const isHead = ({ step, head }) => /^layers\.\d+\.heads$/.test(step) && head !== undefined;

// Exercises: {chapter, task, hint, allows, isDone, done}.
//   allows      (changes) -> whether these changes are of the kind that is asked for
//   isDone      ({p, departs}) -> whether they do what is asked for; p(piece) is its probability as the next token
const EXERCISES = [
  {
    chapter: 5,
    task: "One head in layer 4 carries “Tom” to the last token, and so to “he”. Switch it off: set its output to 0, so that “he” falls below 60 %.",
    hint: "In the view Attention, choose the last token, and look for the head that looks at “Tom” the most.",
    allows: (changes) =>
      changes.length === 1 && changes.every((one) => one.kind === "zero" && isHead(one) && one.step === "layers.4.heads"),
    isDone: ({ p }) => p("▁he") < 0.6,
    done: "This head looks at “Tom” by 0.95. Without it “she” is seventeen times as likely as before.",
  },
  {
    chapter: 5,
    task: "Switch off two heads, so that “she” becomes likelier than “he”.",
    hint: "Layer 3 has a head that looks at “Tom”, too.",
    allows: (changes) => changes.length === 2 && changes.every((one) => one.kind === "zero" && isHead(one)),
    isDone: ({ p }) => p("▁she") > p("▁he"),
    done: "With both heads off, the last token no longer learns who went to the park.",
  },
  {
    chapter: 6,
    task: "Move the window. What is the narrowest window with which “he” keeps more than 70 %?",
    hint: "“Tom” is token 1, and the last token is 7. A token sees itself and those before it: a window of 2 is itself and one more.",
    allows: ([one, ...more]) => more.length === 0 && one.kind === "window" && one.window !== null && one.window <= 7,
    isDone: ({ p }) => p("▁he") > 0.7,
    done: "With 7 keys the last token still sees “Tom” itself. What it could learn by way of the tokens between is not enough.",
  },
  {
    chapter: 12,
    task: "Plant a bug whose first wrong step is “k” of layer 0.",
    hint: "Look at the difference in the view Block: the steps that differ are marked. Which bug turns the keys, and not the queries?",
    allows: ([one, ...more]) => more.length === 0 && one.kind === "bug",
    isDone: ({ departs }) => departs[0] === "layers.0.k",
    done: "The rows of wk were reordered as if it had as many heads as wq. Queries and values are right, and everything after the scores is wrong.",
  },
  {
    chapter: 14,
    task: "Take one token's vector after a layer, a residual stream, from the pass of “Lily went to the park. Then”, so that “she” has more than half.",
    hint: "After the first layers the fact stands where the name stands, and nowhere else. After the last one it stands at the last token.",
    allows: ([one, ...more]) =>
      more.length === 0 && one.kind === "patch" && one.token !== undefined && /\.residual_after_/.test(one.step),
    isDone: ({ p }) => p("▁she") > 0.5,
    done: "One vector of eight turns the answer around.",
  },
  {
    chapter: 14,
    task: "Make the model surer: multiply the output of one head by a number, so that “he” has more than 92 %.",
    hint: "You have switched a head off. What happens if it speaks twice as loudly?",
    allows: ([one, ...more]) => more.length === 0 && one.kind === "scale" && isHead(one),
    isDone: ({ p }) => p("▁he") > 0.92,
    done: "What a head adds to the residual stream can be turned up as well as off.",
  },
];

const exerciseBox = el("section", { class: "card stack", "aria-label": "Exercises" });
const exercise = { number: null, isDone: EXERCISES.map(() => false), hasHint: false };

function beginExercise(number) {
  Object.assign(exercise, { number, hasHint: false });
  if (number === null) return drawExercise();
  textBox.value = TOM;
  state.token = tokens.length - 1; // the last one, whatever the text
  show({ text: TOM, changes: [] }, "before");
}

// Whether the changes do what the exercise asks for, in words.
async function verdict({ allows, isDone, done }) {
  const changes = madeChanges();
  if (question.text !== TOM || question.more.length > 0) return [false, "This exercise is about another text."];
  if (changes.length === 0) return [false, "Nothing has been changed yet."];
  if (!allows(changes)) return [false, "These are other changes than those that the exercise asks for."];
  const [next, departs] = await Promise.all([
    partOf("next", passes.after.tokens.length - 1, "after"),
    partOf("departs", null, "difference"),
  ]);
  const p = (piece) => next.find((one) => one.piece === piece)?.after ?? 0;
  return isDone({ p, departs })
    ? [true, done]
    : [false, `Not yet: “he” has ${percent(p("▁he"))}, “she” ${percent(p("▁she"))}.`];
}

function drawExercise() {
  exerciseBox.hidden = !live.exercises;
  if (live.exercises) fill(exerciseBox, exerciseParts());
}

async function exerciseParts() {
  const { number, isDone } = exercise;
  const numbers = el(
    "div",
    { class: "choices", role: "group", "aria-label": "Exercise" },
    EXERCISES.map((_, index) =>
      choice(`exercise ${index}`, index === number, () => beginExercise(index === number ? null : index), isDone[index] ? `${index + 1} ✓` : index + 1),
    ),
  );
  if (number === null) return [el("h3", null, "Exercises of the course"), numbers];
  const one = EXERCISES[number],
    [isRight, words] = await verdict(one);
  if (isRight && !isDone[number]) {
    isDone[number] = true;
    numbers.children[number].textContent = `${number + 1} ✓`;
  }
  return [
    el("h3", null, `Exercise ${number + 1}, of chapter ${one.chapter}`),
    numbers,
    el("p", null, one.task),
    exercise.hasHint
      ? el("p", { class: "muted" }, one.hint)
      : el(
          "button",
          {
            type: "button",
            class: "tiny",
            "data-key": "hint",
            onclick: () => {
              exercise.hasHint = true;
              drawExercise();
            },
          },
          "A hint",
        ),
    el("p", { role: "status", class: isRight ? "right" : "muted" }, isRight && el("b", null, "Done. "), words),
  ];
}
