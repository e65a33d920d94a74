"""The walk through a pass in a terminal: its commands, what it prints, and which part of a value is looked at."""
