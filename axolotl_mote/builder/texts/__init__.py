"""Everything about text: questions, prompts, defects, verdicts. No module here imports a model or a client.

The modules, each importing only those before it:

    sources      rows of JSONL, JSON, CSV and Parquet files and of Hugging Face data sets
    hygiene      generated text: cleaned, and checked for defects
    jaccard      sets that overlap, found without comparing all
    similarity   near-duplicates and contained texts; ContaminationFilter
    questions    rows to questions; duplicates and evaluation prompts are dropped
    verdict      the judge's text to safe, unsafe or unparsed
    prompts      Jinja2 templates to chat messages
"""
