"""The walk through a pass in a terminal.

walker.py       the commands of a walk
commands.py     what each command does: the text of `help`
shell.py        reads commands and runs them
view.py         prints the step at which the walk stands
focus.py        the part of a value that the reader looks at
selection.py    the words that choose a part of a value, such as `head 3`
"""
