"""`axolotl mote doctor`: proofs on the user's own model, data and configuration.

Faults of a training run that raise no error: experts that never learn, a mask that is ignored, documents that see each
other, an adapter that is saved incomplete. Each is looked for by computing the same thing in two ways. The modules,
each importing only those before it:

    lines       names of the lines, verdicts, findings; no torch
    comparing   two results against a limit, and against what a fault would make
    memory      what a training process holds
    session     a run's configuration, data, model and trainer, read as `axolotl train` reads them
    probes      the chain that is tested, and the states in which it is
    reading     lines about versions, configuration, data and markers
    routes      lines about one model: routing, gradients, masks, generation
    trained     lines about short training runs: saving, resuming
    launched    lines about several processes
    estimate    memory and speed
    run         every line in order

Everything is written to a folder that is given; nothing else is touched.
"""
