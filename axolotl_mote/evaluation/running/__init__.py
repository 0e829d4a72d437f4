"""What a run is made of: cells, models, answers, judgements, results.

    settings -> cells -> answering -> judging -> outputs

A cell is one system in one mode on one task. Its logs are in a folder of their own, named after the hash of everything
that decides the answers, so that answers under other settings, data or weights are never taken for those of now.

The modules, each importing only those before it:

    endpoints  systems and grader as models of inspect_ai: made, reached, freed
    cells      what there is to do, and how much of it is done
    logs       logs of inspect_ai: replaced whole, without API keys, one for each finished cell
    answering  the answers that a cell lacks
    judging    the scores that answers lack
    outputs    all logs to manifest, results.jsonl, summary.json and report.html
    costs      what a run would cost
"""
