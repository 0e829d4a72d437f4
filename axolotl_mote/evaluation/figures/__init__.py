"""Rows of results.jsonl to figures: rates with intervals, what is missing, comparisons of systems. No inspect_ai.

    rows -> Measure -> Estimate -> Figures of a cell, Comparison of two systems -> Summary

Every figure is taken over what was scored. What was not scored is counted beside it, with the value that the figure
would have if all of it counted against the system. Answers to one prompt form a cluster.

The modules, each importing only those before it:

    measures     what is measured: one scorer's value over rows of one label
    estimates    a mean with its interval and its worst case
    cells        the figures of one system in one mode on one task
    comparisons  two systems on the same prompts
    missing      what is missing, in words
    summary      all figures and comparisons, as tables and as JSON
"""
