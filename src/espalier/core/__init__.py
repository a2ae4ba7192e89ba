"""The nouns: Method, Technique, Recipe, Task, Metric, Context, Selection, Representation, Plan, Target, Record.

Importing this package imports no torch; import the module of the noun you need.
"""
