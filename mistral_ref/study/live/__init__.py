"""The page of a pass, live: a server for one reader on this machine. `mistral-ref explore` starts it.

server.py       HTTP on 127.0.0.1: who may ask, and what can be asked
work.py         the computations, one after another, in one thread
session.py      what is computed for the page: the passes of a text without changes and with them
parts.py        the parts of these passes that the page asks for
going_on.py     the next token: what it is drawn from, and drafts
sweeping.py     sweeps, for the page
exercises.py    the course's exercises
checking.py     whether a reader has done one
live_pass.py    one pass, whose values are found when they are asked for
"""
