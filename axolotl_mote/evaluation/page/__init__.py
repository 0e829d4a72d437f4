"""The figures as one HTML page, with every answer beside its verdict; and summary.json. No inspect_ai.

The modules, each importing only those before it:

    plots     figures as plots: a color per system, a marker per mode, a legend below
    answers   prompts, answers and verdicts, to be opened one by one
    sections  the page, section by section
    files     manifest and rows to summary.json and report.html
"""
