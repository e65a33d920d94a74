// The course's exercises with the demonstration model, checked by the page: each asks for changes, and looks at what they do.

const TOM = "Tom went to the park. Then",
  ONCE = "Once upon a";
const madeChanges = () =>
  question.changes.filter(({ on }, index) => on !== false && passes.after.changes.problems[index] === undefined);
const isHead = ({ step, head }) => /^layers\.\d+\.heads$/.test(step) && head !== undefined;

// Exercises: {chapter, text, watched, task, hint, allows, isDone, done}.
//   text        the text that the exercise is about; by default the one with Tom
//   watched     the tokens whose probabilities are said while it is not done; by default he and she
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
  {
    chapter: 3,
    task: "Multiply one whole step at the end of the pass, the residual stream after layer 4 or “norm”, so that “he” has more than 98 %.",
    hint: "A norm takes the size of its input away. Which of the two has a norm behind it?",
    allows: ([one, ...more]) =>
      more.length === 0 &&
      one.kind === "scale" &&
      ["norm", "layers.4.residual_after_ffn"].includes(one.step) &&
      [one.token, one.neuron].every((place) => place === undefined),
    isDone: ({ p }) => p("▁he") > 0.98,
    done: "Behind the last norm a multiplier is 1 / temperature. In front of it, it does nothing: the norm takes it away again.",
  },
  {
    chapter: 4,
    task: "Change theta, and nothing else, so that “he” falls below 25 %.",
    hint: "The model was trained with theta 10,000. A smaller one turns the slow pairs faster. Watch “he” while you go down, to 10 and below.",
    allows: ([one, ...more]) => more.length === 0 && one.kind === "theta",
    isDone: ({ p }) => p("▁he") < 0.25,
    done: "The slow pairs turn fast now, and the weights were trained with others: where a token stands is no longer understood.",
  },
  {
    chapter: 5,
    text: ONCE,
    watched: ["▁time"],
    task: "One head of forty tells the last token which one stands before it. Switch it off, so that “time” falls below 20 %.",
    hint: "It is in layer 0. In the view Attention, choose the last token, and look for the head that looks at “upon” by 0.91. Or let a sweep find it.",
    allows: (changes) => changes.length === 1 && changes.every((one) => one.kind === "zero" && isHead(one)),
    isDone: ({ p }) => p("▁time") < 0.2,
    done: "This head looks at the token before. Without any other one of the forty, “time” stays the likeliest.",
  },
  {
    chapter: 8,
    text: ONCE,
    watched: ["▁time", "▁a"],
    task: "Set a single neuron of 512 in a feed-forward, in the step ffn_hidden of a layer, to 0, so that “time” falls below 10 %.",
    hint: "In layer 0, look at ffn_hidden of the last token. One number is nearly six times as large as the next.",
    allows: ([one, ...more]) =>
      more.length === 0 && one.kind === "zero" && /^layers\.\d+\.ffn_hidden$/.test(one.step) && one.neuron !== undefined,
    isDone: ({ p }) => p("▁time") < 0.1,
    done: "Neuron 23 of layer 0 is large at this “a”. Without it the model says “a” once more, by 92 %.",
  },
];

const exerciseBox = el("section", { class: "card stack", "aria-label": "Exercises" });
const exercise = { number: null, isDone: EXERCISES.map(() => false), hasHint: false };

function beginExercise(number) {
  Object.assign(exercise, { number, hasHint: false });
  if (number === null) return drawExercise();
  const { text = TOM } = EXERCISES[number];
  textBox.value = text;
  state.token = tokens.length - 1; // the last one, whatever the text
  show({ text, changes: [] }, "before");
}

// Whether the changes do what the exercise asks for, in words.
async function verdict({ text = TOM, watched = ["▁he", "▁she"], allows, isDone, done }) {
  const changes = madeChanges();
  if (question.text !== text) return [false, "This exercise is about another text."];
  if (question.more.length > 0) return [false, "This exercise is about the text without the tokens that you have added."];
  if (changes.length === 0) return [false, "Nothing has been changed yet."];
  if (!allows(changes)) return [false, "These are other changes than those that the exercise asks for."];
  const [next, departs] = await Promise.all([
    partOf("next", passes.after.tokens.length - 1, "after"),
    partOf("departs", null, "difference"),
  ]);
  const p = (piece) => next.find((one) => one.piece === piece)?.after ?? 0;
  return isDone({ p, departs })
    ? [true, done]
    : [false, `Not yet: ${watched.map((piece) => `“${piece.slice(1)}” has ${percent(p(piece))}`).join(", ")}.`];
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
