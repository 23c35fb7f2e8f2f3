"""The command line: one file per verb, found by its name; `main.py` calls them.

A verb's file has `add_parser(verbs, parents)`, which adds its flags, and `run(args)`, which calls
the library, prints the answer and returns the exit code. What is heavy is imported inside `run`.
"""
