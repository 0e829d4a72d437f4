"""The adaptive loop and its record. No module here imports a client.

The modules, each importing only those before it:

    generator  one generator per question: yields calls, is sent completions, returns the outcome
    journal    append-only record of every finished call
"""
