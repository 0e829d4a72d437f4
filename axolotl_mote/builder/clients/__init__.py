"""Clients: what answers a call.

The modules, each importing only those before it:

    calls     Call and Completion, the ways a call can fail, the budget
    cooldown  how long a replica cools down: what its headers ask for, or longer with every failure
    replies   what a server sent, as a completion or an error
    local     a transformers model in this process
    server    any OpenAI-compatible server
"""
