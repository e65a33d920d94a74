"""What the commands of a walk are called, what they take, and what they do: the text of `help`."""

from __future__ import annotations

from mistral_ref.cli.walker.shell import Command

COMMANDS = {
    command.name: command
    for command in (
        Command("next [N]", "go to the next step, or to the end of the next layer; N: go on N times (Enter is `next`)"),
        Command("back [N]", "go to the step before, or to the end of the layer before; N: go back N times"),
        Command("into", "go into this layer (at the embedding: into the first layer), and then step by step"),
        Command("out", "go to the end of this layer, and then layer by layer"),
        Command(
            "jump NAME",
            "go to the step `layers.2.heads`; `heads`: in this layer; `2`: the first of layer 2",
            "NAME may also be a glob such as `*.heads`: the walk goes to the next step that matches it.",
        ),
        Command("where", "list the steps of this layer, and mark the one at which the walk stands"),
        Command(
            "show [SEL]",
            "print the value as numbers, or a part of it: `show token 2 head 0`",
            "A value with three axes is not printed whole unless SEL says so: the last token, or head 0 of scores and "
            "attention weights, is shown. `show token : head :` prints everything.",
        ),
        Command(
            "map [SEL]",
            "draw the value as a heat map, or a part of it: `map head 3`",
            "Of a value with three axes two are drawn. Unless SEL chooses another part, the last token is drawn, or "
            "head 0 of scores and attention weights.",
        ),
        Command("top [SEL]", "print the strongest keys, the likeliest next pieces, or the largest values of this step"),
        Command("token N", "from now on `show`, `map` and `top` look at token N only; `all` ends this"),
        Command("head N", "from now on `show`, `map` and `top` look at head N only; `all` ends this"),
        Command("all", "look at all tokens and heads again"),
        Command(
            "merges [N]",
            "print how the word of token N (without N: the last one) was merged, pair by pair",
            "The word begins as bytes or characters. Of the pairs that may be merged, the one that training merged "
            "first comes next. The parts of the last line are tokens.",
        ),
        Command("source", "print the lines that computed this step"),
        Command(
            "cost [all]",
            "print what this step costs; `cost all`: what every kind of step costs",
            "The costs are operations and bytes. `cost all` also shows two times: the time that the machine's limits "
            "predict, and the time measured.",
        ),
        Command("why", "print which heads and layers made the likeliest next token likely"),
        Command("zero [SEL]", "set the value to 0, or a part of it: `zero head 3`, `zero token 2`"),
        Command("scale FACTOR [SEL]", "multiply the value, or a part of it, by a factor"),
        Command("set NUMBER [SEL]", "set the value, or a part of it, to a number"),
        Command(
            "swap AXIS I J",
            "exchange two indices of an axis: `swap token 1 4` exchanges the values of these tokens",
        ),
        Command("undo", "take back the last change"),
        Command("edits", "list the changes made so far"),
        Command("predict", "finish the pass and print the likeliest next tokens, with the changes and without them"),
        Command(
            "generate [N]",
            "continue the text by N tokens (default 20), with the changes and without them",
            "Each new token is the likeliest one. Every pass begins at the first token, and every change is made again "
            "in it. A change of `token 2` or `head 3` stays a change of this index.",
        ),
        Command("compare", "print how far each step departs from the pass without edits"),
        Command("quit", "end the walk (Ctrl-D does the same)"),
        Command("help [COMMAND]", "list all commands, or explain one"),
    )
}
