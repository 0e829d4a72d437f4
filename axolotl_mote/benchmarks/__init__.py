"""Evaluation prompts by name: where they come from, their checksums, their fixed order. No torch, no inspect_ai.

The modules, each importing only those before it:

    tables    rows of data files
    sources   what is known of each benchmark: file, columns, licence, checksum
    loading   the prompts of a benchmark, by name, path or hub name
"""
