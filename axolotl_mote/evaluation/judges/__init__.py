"""Judges of answers.

The modules and sub-packages, each importing only those before it:

    verdicts   what a judge may say, and how a reply of an LLM judge is read
    prompts    prompts of LLM judges
    refusal    the local judge of refusals: one linear model
"""
