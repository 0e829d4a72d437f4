"""Evaluation: does training align the model, and at what cost in over-refusal and tokens?

    eval.yml -> systems x tasks -> inspect_ai logs -> results.jsonl -> figures, comparisons -> tables, report.html

The modules and sub-packages, each importing only those before it:

    statistics   intervals, kappa, paired tests, numbers of prompts
    agreement    a judge against human labels
    judges       who decides: the refusal judge, and prompts and verdicts of LLM judges
    attacks      transforms of forbidden prompts that need no second model
    thinking     reasoning in the text of a model without steps
    systems      models to measure: a MoTE adapter, a plain LoRA or a base model, loaded once
    compat       every private name of inspect_ai
    provider     those systems as an inspect_ai provider, ``mote/DIR``
    scorers      judges as inspect_ai scorers
    tasks        benchmarks as inspect_ai tasks
    registry     what inspect_ai finds by the entry point
    settings     the evaluation file: its schema and its hash
    results      inspect_ai logs to rows of results.jsonl
    figures      rows to figures: rates with intervals, bounds, comparisons of systems
    page         the figures as one HTML report
    running      what a run is made of: cells, models, answers, judgements, results
    run          systems x tasks through inspect_ai, then the tables and the report

``compat``, ``provider``, ``scorers``, ``tasks``, ``registry``, ``results``, ``running`` and ``run`` need inspect_ai
(the extra ``eval``); the others do not.
"""
