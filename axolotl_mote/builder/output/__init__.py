"""What a build leaves behind: the data files, the manifest and the statistics.

The modules, each importing only those before it:

    selfbleu    Self-BLEU of a set of texts, exact and in linear time
    statistics  the numbers of a chain data set
    tables      these numbers as tables in the terminal
    report      these numbers as an HTML page
    results     chains.jsonl, rejected.jsonl, manifest.json and statistics.html
"""
