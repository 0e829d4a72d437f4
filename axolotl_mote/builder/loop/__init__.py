"""The adaptive loop and its record. No module here imports a client.

The modules, each importing only those before it:

    backlog    the questions, on disk; memory holds an offset for each
    generator  one generator per question: yields calls, is sent completions, returns the outcome
    journal    append-only record of every finished call; one sync for several
    replay     the outcome that the journal holds for a question
"""
